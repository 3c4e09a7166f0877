"""clip-phi inspect and draw-data: what is trained on."""

import argparse
import json
import os
from typing import Any

from .common import DEMO_CHECKPOINT, natural, positive


def add_to(commands: Any) -> None:
    look = commands.add_parser("inspect", help="show what the model sees of a data set, and what is wrong with it")
    look.add_argument(
        "data", nargs="+", metavar="DATA", help="as --data of train_accelerate.py: [KIND:]PATH[,option=value...]"
    )
    look.add_argument(
        "--sample", type=natural, default=0, metavar="N", help="the first sample to show (default: %(default)s)"
    )
    look.add_argument(
        "--num", type=positive, default=1, metavar="N", help="how many samples to show (default: %(default)s)"
    )
    look.add_argument(
        "--summary", action="store_true", help="open every image, and count what training would use and skip"
    )
    look.add_argument(
        "--val",
        action="append",
        default=[],
        metavar="DATA",
        help="validation data: look for its images in DATA (with --summary; may be given several times)",
    )
    look.add_argument("--json", metavar="FILE", help="write the summary as json (with --summary)")
    look.add_argument("--html", metavar="FILE", help="write one page: the samples, and the summary with --summary")
    look.add_argument("--png", metavar="FILE", help="draw how long samples are, and the pictures of those shown")
    look.add_argument(
        "--checkpoint",
        help=f"folder or Hub id of the model whose tokenizer is used (default: {DEMO_CHECKPOINT}, or else the small "
        "backbones that come with the project)",
    )
    look.add_argument(
        "--max_length",
        type=positive,
        default=2048,
        help="longest sample in tokens, as in training (default: %(default)s)",
    )
    look.add_argument(
        "--num_workers",
        type=natural,
        default=os.cpu_count(),
        help="processes that open images; 0: this one alone (default: %(default)s, the number of cores)",
    )
    look.set_defaults(run=run_inspect)

    draw = commands.add_parser("draw-data", help="draw a small data set in the layouts of COCO and LLaVA-Instruct")
    draw.add_argument("folder", metavar="DIR", help="where it goes")
    draw.add_argument("--num_train", type=positive, default=4000, help="training images (default: %(default)s)")
    draw.add_argument("--num_val", type=positive, default=400, help="held-out images (default: %(default)s)")
    draw.add_argument("--seed", type=int, default=0, help="the same seed draws the same files (default: %(default)s)")
    draw.add_argument("--json", action="store_true", help="print what was written as a json object")
    draw.set_defaults(run=run_draw_data)


def run_inspect(arguments: argparse.Namespace) -> None:
    from ..tools.inspect import inspect

    inspect(arguments, DEMO_CHECKPOINT)


def run_draw_data(arguments: argparse.Namespace) -> None:
    from ..data.synthetic import write_dataset

    write_dataset(arguments.folder, arguments.num_train, arguments.num_val, arguments.seed)
    written = {"folder": arguments.folder, "num_train": arguments.num_train, "num_val": arguments.num_val}
    print(
        json.dumps(written | {"seed": arguments.seed})
        if arguments.json
        else f"{arguments.num_train} training and {arguments.num_val} held-out images are in {arguments.folder}"
    )
