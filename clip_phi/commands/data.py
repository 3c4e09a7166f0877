"""clip-phi inspect, download and draw-data: training data."""

import argparse
import json
from pathlib import Path

from ..data.catalog import DATASETS
from .common import check_model, newest_model


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
