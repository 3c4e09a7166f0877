"""The command clip-phi."""

import argparse
import os
import sys
from collections.abc import Sequence

from .commands import (
    data,
    hub,
    serving,
    speech,
)
from .commands import (
    evaluate as judging,
)
from .commands import (
    generate as answers,
)
from .commands import (
    system as machine,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0; 1 if the doctor found a problem; 2 after one line on stderr about bad input."""
    parser = make_parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes "IMAGE --option QUESTION" for an image without a question, and a question too many (bpo-15112).
    if len(rest) == 1 and not rest[0].startswith("-") and getattr(arguments, "question", "") is None:
        arguments.question = rest.pop()
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        status = arguments.run(arguments) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:
        if arguments.debug:
            raise
        print(f"clip-phi: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("clip-phi", description="Use a Clip-Phi model: caption images, ask about them.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for topic in (answers, data, hub, judging, machine, serving, speech):
        topic.add_to(commands)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
