"""clip-phi inspect, download and draw-data: training data."""

import argparse
import json
from pathlib import Path
from typing import Any

from ..data.catalog import DATASETS
from ..environment import cpu_cores
from .common import DATA, MODELS, add_command, add_data, add_json, add_options, check_model, natural, newest_model


def add_to(commands: Any) -> None:
    inspect = add_command(commands, "inspect", run_inspect, "the model's view of a data set, and the errors in it")
    add_data(inspect, f"data to inspect: {DATA}")
    add_data(inspect, "validation data, whose images are searched for in the data (with the summary)", "--eval_data")
    add_options(inspect, "inspect")
    help = f"folder or Hub id of the model whose tokenizer is used (default: the newest of {', '.join(MODELS)}, or "
    inspect.add_argument("--model", metavar="PATH_OR_ID", help=f"{help}else the small backbones of the project)")
    help = "processes that open images; 0: this process alone (default: %(default)s, the number of cores)"
    inspect.add_argument("--num_workers", type=natural, default=cpu_cores(), help=help)
    add_json(inspect, "the summary as one json object")

    help = "a public data set, into the folders that training reads by default"
    download = add_command(commands, "download", run_download, help)
    names = "; ".join(f"{name}: {dataset.about}" for name, dataset in DATASETS.items())
    download.add_argument("name", choices=DATASETS, metavar="NAME", help=names)
    help = "a small synthetic data set in the layouts of COCO and LLaVA-Instruct"
    draw = add_command(commands, "draw-data", run_draw_data, help)
    for name, command in (("download", download), ("draw-data", draw)):
        add_options(command, name)
        add_json(command)


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
