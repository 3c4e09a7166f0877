"""The command clip-phi."""

import argparse
import sys
from collections.abc import Sequence

from .commands import answers, data, machine, serving


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
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for topic in (answers, data, machine, serving):
        topic.add_to(commands)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
