"""clip-phi evaluate and compare: how good a model is, and whether it uses the image."""

import argparse
import json

from ..data.report import plain
from .common import DEMO_MODEL, choose_model


def run_evaluate(arguments: argparse.Namespace) -> None:
    arguments.model = choose_model(arguments)
    from ..evaluation.run import run

    run(arguments, DEMO_MODEL)


def run_compare(arguments: argparse.Namespace) -> None:
    from ..evaluation.report import compare, find_result, format_comparison

    places = [*arguments.models, *arguments.model]
    if len(places) != 2:
        raise ValueError(f"compare needs two models, not {len(places)}: clip-phi compare MODEL MODEL")
    first, second = (find_result(place, arguments.task) for place in places)
    found = compare(first, second, arguments.seed)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found) if arguments.json else plain(format_comparison(found)))
