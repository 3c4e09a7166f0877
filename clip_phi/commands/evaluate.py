"""clip-phi evaluate and compare: how good a model is, and whether it uses the image."""

import argparse
import json
from pathlib import Path
from typing import Any

from ..data.report import plain
from .common import DATA, DEMO_MODEL, add_command, add_data, add_json, add_model, choose_model, positive

TASKS = ("captions", "vqa", "pope", "exact", "loss")


def add_to(commands: Any) -> None:
    help = "scores of a model, beside its scores without the image and with others"
    evaluate = add_command(commands, "evaluate", run_evaluate, help)
    add = evaluate.add_argument
    add_model(evaluate, argument=True)
    help = "captions: CIDEr-D and others; vqa: short answers by VQAv2's rules; pope: yes or no; exact: exact match, as "
    help += "in GQA; loss: cross-entropy of all answers in the data"
    add("--task", required=True, choices=TASKS, help=help)
    add_data(evaluate, f"data to evaluate on: {DATA} (default, for {DEMO_MODEL} alone: the demo's validation data)")
    add("--num_images", type=positive, metavar="N", help="only the first N images (default: all)")
    add("--max_bad_fraction", type=float, default=0.01, help="largest share of bad records")
    help = "prompt instead of the usual one; for questions with {question} in it (default: the question itself; for "
    add("--prompt", help=f"{help}captions the instruction that the model was trained with)")
    add("--num_beams", type=positive, default=1, help="beams of beam search (default: 1, greedy)")
    add("--max_new_tokens", type=positive, default=64, help="longest answer in tokens")
    add("--batch_size", type=positive, default=32, help="prompts in a batch")
    add("--shuffles", type=positive, default=1, help="shuffles of the images to average")
    help = "folder or Hub id of a CLIP model for CLIPScore (default: the vision tower's own, if it is stored here)"
    add("--clip", metavar="CLIP", help=help)
    add("--meteor", action="store_true", help="METEOR as well (needs Java and clip-phi[metrics])")
    add("--device", help="for example cuda:1 or cpu (default: what Accelerate finds)")
    help = "folder for result, samples, page, images and the results file that evaluation servers of VQAv2 and COCO"
    help += " read (default: MODEL/evaluation, or outputs/evaluation for one on the Hub)"
    add("--output_dir", metavar="DIR", help=help)

    help = "the better one of two evaluated models, with a confidence interval"
    compare = add_command(commands, "compare", run_compare, help)
    help = "two folders of evaluated models, or TASK.json files in them"
    compare.add_argument("models", nargs="*", metavar="MODEL", help=help)
    compare.add_argument("--model", action="append", default=[], metavar="PATH", help="the same as MODEL, twice")
    compare.add_argument("--task", choices=TASKS, help="result to compare, if a folder has several")

    for command in (evaluate, compare):
        command.add_argument("--seed", type=int, default=0, help="random seed of every random choice")
        command.add_argument("--output", metavar="FILE", help="one more copy of the result as json")
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
