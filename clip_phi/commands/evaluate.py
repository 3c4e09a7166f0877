"""clip-phi evaluate and compare: how good a model is, and whether it uses the image."""

import argparse
import json
from pathlib import Path
from typing import Any

from ..data.report import plain
from .common import DATA, DEMO_MODEL, add_command, add_data, add_json, add_model, add_options, choose_model


def add_to(commands: Any) -> None:
    help = "scores of a model, beside its scores without the image and with others"
    evaluate = add_command(commands, "evaluate", run_evaluate, help)
    add_model(evaluate, argument=True)
    add_data(evaluate, f"data to evaluate on: {DATA} (default, for {DEMO_MODEL} alone: the demo's validation data)")
    help = "the better one of two evaluated models, with a confidence interval"
    compare = add_command(commands, "compare", run_compare, help)
    for name, command in (("evaluate", evaluate), ("compare", compare)):
        add_options(command, name, "result")
        add_json(command, "the result as one json object")


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
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found) if arguments.json else plain(format_comparison(found)))
