"""The command clip-phi."""

import os
import sys
from collections.abc import Sequence

from .commands import data, evaluate, generate, hub, serving, speech, system
from .commands.common import Parser, print_error

# The order in which a newcomer needs the commands: try a model, serve it, look at data, train, evaluate, share.
TOPICS = (generate, serving, data, speech, system, evaluate, hub)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns 0; 1 if the doctor found a problem or an image was bad; 2 after one line on stderr about bad input.
    Exits with status 2 and one such line if the options themselves are wrong."""
    arguments = make_parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments) or 0
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
    commands = parser.add_commands("COMMAND")
    for topic in TOPICS:
        topic.add_to(commands)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
