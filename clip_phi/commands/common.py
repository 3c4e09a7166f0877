"""What several commands share: which model is meant, and kinds of numbers."""

import argparse
from pathlib import Path

DEMO_CHECKPOINT = "outputs/demo/model"


def add_checkpoint(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--checkpoint",
        default=DEMO_CHECKPOINT,
        help="folder or Hub id of a trained model (default: %(default)s, which 'make demo' writes)",
    )
    command.add_argument("--device", help="for example cuda:1 or cpu (default: CUDA if there is one)")


def add_quantization(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--quantization",
        choices=("nf4", "int8"),
        help="hold the decoder in 8 or 4 bits: smaller, a little rougher, and with int8 on a CPU faster "
        "(nf4, and int8 on a GPU: pip install 'clip-phi[cuda]')",
    )


def need_checkpoint(checkpoint: str) -> None:
    """Raises ValueError if it is the demo's, which was not made, or a folder that is not there."""
    if checkpoint == DEMO_CHECKPOINT and not Path(DEMO_CHECKPOINT).is_dir():
        raise ValueError(f"no model at {DEMO_CHECKPOINT}: run 'make demo' first, or give --checkpoint")
    if not Path(checkpoint).is_dir() and (checkpoint.count("/") > 1 or checkpoint.startswith((".", "/", "~"))):
        raise ValueError(f"no checkpoint {checkpoint}: there is no such folder, and a Hub id is user/name")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, not {value}")
    return value


def positive_number(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")
    return value
