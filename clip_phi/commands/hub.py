"""clip-phi push: give a trained model to others."""

import argparse
import json
import sys
from typing import Any


def add_to(commands: Any) -> None:
    push = commands.add_parser("push", help="push a trained model to the Hub, with its model card")
    push.add_argument("folder", metavar="RUN", help="folder of a training run, or of a saved model")
    push.add_argument("repo_id", metavar="USER/NAME", help="repository on the Hub; it is made if it is not there")
    push.add_argument(
        "--merged", action="store_true", help="one whole checkpoint, LoRA folded in, instead of the trained weights"
    )
    push.add_argument("--private", action="store_true", help="if the repository is made: only you can see it")
    push.add_argument("--revision", metavar="BRANCH", help="push to this branch, made if need be (default: main)")
    push.add_argument("--tag", help="name the pushed commit (default: a name made from the weights' hash)")
    push.add_argument("--create_pr", action="store_true", help="offer it as a pull request")
    push.add_argument("--message", help="of the commit")
    push.add_argument("--no_pictures", action="store_true", help="leave the sample pictures out of the card")
    push.add_argument("--json", action="store_true", help="print a json object instead of the line")
    push.set_defaults(run=run_push)


def run_push(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    from ..hub.push import Target, push

    pushed = push(
        arguments.folder,
        Target(
            arguments.repo_id,
            private=arguments.private or None,
            branch=arguments.revision,
            tag=arguments.tag,
            create_pr=arguments.create_pr,
        ),
        merged=arguments.merged,
        message=arguments.message,
        pictures=not arguments.no_pictures,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(json.dumps(asdict(pushed)) if arguments.json else pushed)
