"""The command clip-phi."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from .commands.common import COMMANDS, Parser, print_error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns 0; 1 if the doctor found a problem or an image was bad; 2 after one line on stderr about bad input.
    Exits with status 2 and one such line if the options themselves are wrong."""
    arguments = make_parser().parse_args(argv)
    try:
        module, function = arguments.run.split(".")
        status: int = getattr(import_module(f"clip_phi.commands.{module}"), function)(arguments) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `| head` closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError, RecursionError) as error:
        if arguments.debug:
            raise
        print_error(error)
        return 2


def make_parser() -> Parser:
    parser = Parser(
        "clip-phi",
        description="Use a Clip-Phi model: caption images, answer questions about them, serve, evaluate and share it.",
        epilog="Each command explains its options: clip-phi COMMAND --help. Training: train_accelerate.py --help.",
    )
    parser.add_commands("COMMAND", COMMANDS)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
