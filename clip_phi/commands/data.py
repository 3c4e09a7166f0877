"""clip-phi inspect, download and draw-data: training data."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from ..data.catalog import DATASETS
from .common import DATA, MODELS, add_command, add_data, add_json, check_model, natural, newest_model, positive


def add_to(commands: Any) -> None:
    inspect = add_command(commands, "inspect", run_inspect, "the model's view of a data set, and the errors in it")
    add = inspect.add_argument
    add("data_argument", nargs="*", metavar="DATA", help="the same as --data")
    add_data(inspect, f"data to inspect: {DATA}")
    add("--sample", type=natural, default=0, metavar="N", help="first sample to show (default: 0)")
    add("--num", type=positive, default=1, metavar="N", help="number of samples to show (default: 1)")
    add("--summary", action="store_true", help="counts of what training would use and skip; opens every image")
    add_data(inspect, "validation data, whose images are searched for in the data (with the summary)", "--eval_data")
    add_json(inspect, "the summary as one json object")
    help = "file (several times: files); .json: the summary; .html: samples, and the summary with --summary; .png: "
    add("--output", action="append", default=[], metavar="FILE", help=f"{help}histograms of lengths, and images")
    help = f"(default: the newest of {', '.join(MODELS)}, or else the small backbones of the project)"
    add("--model", metavar="PATH_OR_ID", help=f"folder or Hub id of the model whose tokenizer is used {help}")
    add("--max_length", type=positive, default=2048, help="longest sample in tokens, as in training")
    help = "processes that open images; 0: this process alone (default: %(default)s, the number of cores)"
    add("--num_workers", type=natural, default=os.cpu_count(), help=help)

    help = "a public data set, into the folders that training reads by default"
    download = add_command(commands, "download", run_download, help)
    add = download.add_argument
    names = "; ".join(f"{name}: {dataset.about}" for name, dataset in DATASETS.items())
    add("name", choices=DATASETS, metavar="NAME", help=names)
    add("--output_dir", default="data", metavar="DIR", help="folder of all data")
    add("--keep_zip", action="store_true", help="images left in their zip archives, which training reads too")
    help = "http(s) address in place of the beginning of each official one, such as https://mirror.example; the paths "
    add("--mirror", metavar="URL", help=f"{help}behind it stay")
    add("--connections", type=positive, default=4, metavar="N", help="parts of a file that are fetched at once")
    add_json(download)

    help = "a small synthetic data set in the layouts of COCO and LLaVA-Instruct"
    draw = add_command(commands, "draw-data", run_draw_data, help)
    draw.add_argument("folder", metavar="DIR", help="folder to write")
    draw.add_argument("--num_train", type=positive, default=4000, help="training images")
    draw.add_argument("--num_val", type=positive, default=400, help="validation images")
    draw.add_argument("--seed", type=int, default=0, help="random seed; equal seeds give equal files")
    add_json(draw)


def run_inspect(arguments: argparse.Namespace) -> None:
    if bool(arguments.data) == bool(arguments.data_argument):
        raise ValueError("give DATA either as an argument or with --data" if arguments.data else "--data is required")
    arguments.data = arguments.data or arguments.data_argument
    arguments.model = arguments.model or newest_model()
    check_model(arguments.model or ".")
    from ..tools.inspect import inspect

    inspect(arguments)


def run_download(arguments: argparse.Namespace) -> None:
    from ..tools.download import download

    folder = arguments.output_dir
    files = download(arguments.name, Path(folder), arguments.mirror, arguments.keep_zip, arguments.connections)
    data = [text.format(folder) for text in DATASETS[arguments.name].data]
    lines = [f"{file['state']:<14} {file['path']}" for file in files] + [f"--data {text}" for text in data]
    print(json.dumps({"files": files, "data": data}) if arguments.json else "\n".join(lines))


def run_draw_data(arguments: argparse.Namespace) -> None:
    from ..data.synthetic import write_dataset

    written = {name: getattr(arguments, name) for name in ("folder", "num_train", "num_val", "seed")}
    write_dataset(**written)
    text = "{num_train} training and {num_val} validation images are in {folder}".format(**written)
    print(json.dumps(written) if arguments.json else text)
