"""The command clip-phi: caption, ask, inspect, plan, doctor, draw-data."""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

DEMO_CHECKPOINT = "outputs/demo/model"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0; 1 if the doctor found a problem; 2 after one line on stderr about bad input."""
    arguments = make_parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except (ValueError, OSError, ImportError) as error:
        if arguments.debug:
            raise
        print(f"clip-phi: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("clip-phi", description="Use a Clip-Phi model: caption images, ask about them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    caption = commands.add_parser("caption", help="say what images show")
    caption.add_argument("images", nargs="+", metavar="IMAGE", help="image file")
    caption.set_defaults(run=run_caption)

    ask = commands.add_parser("ask", help="ask a question about an image")
    ask.add_argument("image", metavar="IMAGE", help="image file")
    ask.add_argument("question", metavar="QUESTION", help="for example: 'What color is the circle?'")
    ask.set_defaults(run=run_ask)

    for command in (caption, ask):
        command.add_argument(
            "--checkpoint",
            default=DEMO_CHECKPOINT,
            help="folder or Hub id of a trained model (default: %(default)s, which 'make demo' writes)",
        )
        command.add_argument("--device", help="for example cuda:1 or cpu (default: CUDA if there is one)")
        command.add_argument(
            "--int8", action="store_true", help="on the CPU: the decoder in 8 bits, smaller, faster, a little rougher"
        )
        command.add_argument(
            "--max_new_tokens", type=_positive, default=64, help="longest answer (default: %(default)s)"
        )
        command.add_argument("--json", action="store_true", help="print one json object a line instead of the text")

    look = commands.add_parser("inspect", help="show what the model sees of a data set, and what is wrong with it")
    look.add_argument(
        "data", nargs="+", metavar="DATA", help="as --data of train_accelerate.py: [KIND:]PATH[,option=value...]"
    )
    look.add_argument(
        "--sample", type=_natural, default=0, metavar="N", help="the first sample to show (default: %(default)s)"
    )
    look.add_argument(
        "--num", type=_positive, default=1, metavar="N", help="how many samples to show (default: %(default)s)"
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
        type=_positive,
        default=2048,
        help="longest sample in tokens, as in training (default: %(default)s)",
    )
    look.add_argument(
        "--num_workers",
        type=_natural,
        default=os.cpu_count(),
        help="processes that open images; 0: this one alone (default: %(default)s, the number of cores)",
    )
    look.set_defaults(run=run_inspect)

    draw = commands.add_parser("draw-data", help="draw a small data set in the layouts of COCO and LLaVA-Instruct")
    draw.add_argument("folder", metavar="DIR", help="where it goes")
    draw.add_argument("--num_train", type=_positive, default=4000, help="training images (default: %(default)s)")
    draw.add_argument("--num_val", type=_positive, default=400, help="held-out images (default: %(default)s)")
    draw.add_argument("--seed", type=int, default=0, help="the same seed draws the same files (default: %(default)s)")
    draw.add_argument("--json", action="store_true", help="print what was written as a json object")
    draw.set_defaults(run=run_draw_data)

    plan = commands.add_parser("plan", help="what a training run needs: memory by item, the largest step, hours")
    cards = "a100-40, a100-80, h100-80, h200-141, l4-24, t4-16, rtx-8, rtx-24, or cpu-16 (no GPU, in float32)"
    plan.add_argument("--gpu", required=True, help=cards)
    plan.add_argument("--stage", type=int, choices=(1, 2), default=1, help="of training (default: %(default)s)")
    plan.add_argument("--checkpoint", help="plan for this checkpoint's parts instead of TinyCLIP and phi-2")
    plan.add_argument("--mfu", type=float, default=0.4, help="assumed share of the card's peak (default: %(default)s)")
    optimizers = ("auto", "adam8bit", "paged_adam8bit", "adamw")
    plan.add_argument("--optimizer", choices=optimizers, default="auto", help="(default: %(default)s, as in training)")
    plan.add_argument("--captions_per_image", type=_positive, help="of stage 1 (default: that of training)")
    plan.add_argument("--lora_rank", type=_positive, help="of stage 2 (default: that of training)")
    plan.add_argument("--tune_decoder", choices=("lora", "full"), help="of stage 2 (default: lora)")
    plan.add_argument("--quantization", choices=("none", "nf4", "int8"), help="of stage 2 (default: none)")
    plan.add_argument("--gradient_checkpointing", action="store_true", help="recompute the decoder's activations")
    plan.add_argument("--json", action="store_true", help="print a json object instead of the table")
    plan.set_defaults(run=run_plan)

    doctor = commands.add_parser("doctor", help="check the installation and this machine, and how to mend each trap")
    doctor.add_argument("--json", action="store_true", help="print a json object instead of the lines")
    doctor.set_defaults(run=run_doctor)

    for command in (caption, ask, look, plan, draw, doctor):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, not {value}")
    return value


def run_caption(arguments: argparse.Namespace) -> None:
    from .batching.images import load_image

    images = [(name, load_image(name)) for name in arguments.images]  # a bad one is told before the model is loaded
    engine = _load_engine(arguments)
    for name, image in images:
        pieces = engine.caption(image, arguments.max_new_tokens)
        prefix = f"{name}: " if len(images) > 1 else ""
        _say(pieces, arguments, {"image": name}, "caption", prefix)


def run_ask(arguments: argparse.Namespace) -> None:
    from .batching.images import load_image

    image = load_image(arguments.image)
    engine = _load_engine(arguments)
    pieces = engine.stream(arguments.question, image, arguments.max_new_tokens)
    _say(pieces, arguments, {"image": arguments.image, "question": arguments.question}, "answer")


def run_inspect(arguments: argparse.Namespace) -> None:
    from .inspection import inspect

    inspect(arguments, DEMO_CHECKPOINT)


def run_plan(arguments: argparse.Namespace) -> None:
    from .training.arguments import STAGES

    if not 0 < arguments.mfu <= 1:
        raise ValueError(f"--mfu must be more than 0 and at most 1, not {arguments.mfu}")
    options = {"optimizer": arguments.optimizer, "gradient_checkpointing": arguments.gradient_checkpointing}
    own = {"captions_per_image": 1, "lora_rank": 2, "tune_decoder": 2, "quantization": 2}
    for name, stage in own.items():
        value = getattr(arguments, name)
        if value is not None and stage != arguments.stage:
            raise ValueError(f"--{name} is of stage {stage}, not of stage {arguments.stage}")
        if value is not None:
            options[name] = value
    if arguments.tune_decoder == "full" and arguments.quantization in ("nf4", "int8"):
        raise ValueError(f"--quantization {arguments.quantization}: quantised weights cannot be trained")
    from .plan import CARDS, as_text, make_plan

    if arguments.gpu not in CARDS:
        raise ValueError(f"unknown --gpu {arguments.gpu}: it is one of {', '.join(CARDS)}")
    config = None
    if arguments.checkpoint is not None:
        from modeling_clip_phi import ClipPhiConfig

        config = ClipPhiConfig.from_pretrained(arguments.checkpoint)
    plan = make_plan(
        STAGES[arguments.stage](stage=arguments.stage, **options), CARDS[arguments.gpu], arguments.mfu, config
    )
    print(json.dumps(plan) if arguments.json else as_text(plan))


def run_doctor(arguments: argparse.Namespace) -> int:
    from .doctor import doctor

    return doctor(arguments.json, arguments.debug)


def run_draw_data(arguments: argparse.Namespace) -> None:
    from .sources.drawn import write_dataset

    write_dataset(arguments.folder, arguments.num_train, arguments.num_val, arguments.seed)
    written = {"folder": arguments.folder, "num_train": arguments.num_train, "num_val": arguments.num_val}
    print(
        json.dumps(written | {"seed": arguments.seed})
        if arguments.json
        else f"{arguments.num_train} training and {arguments.num_val} held-out images are in {arguments.folder}"
    )


def _load_engine(arguments: argparse.Namespace) -> Any:
    from pathlib import Path

    if arguments.checkpoint == DEMO_CHECKPOINT and not Path(DEMO_CHECKPOINT).is_dir():
        raise ValueError(f"no model at {DEMO_CHECKPOINT}: run 'make demo' first, or give --checkpoint")
    from .serving.engine import Engine

    return Engine(arguments.checkpoint, arguments.device, arguments.int8)


def _say(
    pieces: Iterator[str], arguments: argparse.Namespace, record: dict[str, str], key: str, prefix: str = ""
) -> None:
    if arguments.json:
        print(json.dumps(record | {key: "".join(pieces).strip()}), flush=True)
        return
    print(prefix, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
