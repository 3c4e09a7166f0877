"""clip-phi inspect, download, draw-data, plan and doctor: data, memory and the machine, before a run."""

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


def run_plan(arguments: argparse.Namespace) -> None:
    from ..training.arguments import STAGES

    options = {"optim": arguments.optim, "gradient_checkpointing": arguments.gradient_checkpointing}
    for name, stage in {"captions_per_image": 1, "lora_r": 2, "tune_decoder": 2, "quantization": 2}.items():
        if (value := getattr(arguments, name)) is not None:
            options[name] = value
            if stage != arguments.stage:
                raise ValueError(f"--{name} requires --stage {stage}, not --stage {arguments.stage}")
    if arguments.tune_decoder == "full" and arguments.quantization in ("nf4", "int8"):
        raise ValueError(f"--quantization {arguments.quantization}: quantized weights cannot be trained")
    if arguments.tune_decoder == "full" and arguments.lora_r:
        raise ValueError("--lora_r has no effect with --tune_decoder full")
    from modeling_clip_phi import ClipPhiConfig

    from ..hub.retry import load_with_retries
    from ..tools.plan import format_plan, make_plan
    from ..training.memory import CARDS

    if arguments.gpu not in CARDS:
        raise ValueError(f"unknown --gpu {arguments.gpu}: it is one of {', '.join(CARDS)}")
    check_model(arguments.model or ".")
    model = arguments.model
    config = ClipPhiConfig() if model is None else load_with_retries(ClipPhiConfig.from_pretrained, model)
    training = STAGES[arguments.stage](stage=arguments.stage, **options)
    plan = make_plan(training, CARDS[arguments.gpu], arguments.mfu, config)
    print(json.dumps(plan) if arguments.json else format_plan(plan))


def run_doctor(arguments: argparse.Namespace) -> int:
    from ..tools.doctor import doctor

    return doctor(arguments.json, arguments.debug)
