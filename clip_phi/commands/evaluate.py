"""clip-phi evaluate and compare: how good a model is, and whether it looks at the image."""

import argparse
import json
from pathlib import Path
from typing import Any

from .common import DEMO_CHECKPOINT, need_checkpoint, positive

TASKS = ("captions", "vqa", "pope", "exact", "loss")


def add_to(commands: Any) -> None:
    judge = commands.add_parser("evaluate", help="score a model, beside what it scores without the image and by others")
    judge.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or Hub id of a trained model")
    judge.add_argument(
        "--task",
        required=True,
        choices=TASKS,
        help="captions: CIDEr-D and others; vqa: short answers by VQAv2's rules; pope: yes or no; exact: equal to the "
        "answer, as GQA has it; loss: of all that the data say",
    )
    judge.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="DATA",
        help="as --data of train_accelerate.py: KIND:PATH[,option=value...]; may be given several times (default: what "
        f"'make demo' drew, if CHECKPOINT is {DEMO_CHECKPOINT})",
    )
    judge.add_argument("--num_images", type=positive, metavar="N", help="judge on the first N images (default: all)")
    judge.add_argument(
        "--max_bad_fraction", type=float, default=0.01, help="stop if more records are bad (default: %(default)s)"
    )
    judge.add_argument(
        "--prompt",
        help="what is asked; of a question, with {question} in it (default: the question itself, and for a caption "
        "what the checkpoint was trained to be asked)",
    )
    judge.add_argument("--num_beams", type=positive, default=1, help="beam search (default: %(default)s, greedy)")
    judge.add_argument("--max_new_tokens", type=positive, default=64, help="longest answer (default: %(default)s)")
    judge.add_argument("--batch_size", type=positive, default=32, help="prompts at once (default: %(default)s)")
    judge.add_argument("--shuffles", type=positive, default=1, help="shufflings to take the mean of (default: 1)")
    judge.add_argument("--seed", type=int, default=0, help="of shuffling and bootstrap (default: %(default)s)")
    judge.add_argument(
        "--clip",
        metavar="CLIP",
        help="folder or Hub id of a CLIP for CLIPScore (default: the one that the tower is from, if it is at hand)",
    )
    judge.add_argument("--meteor", action="store_true", help="METEOR as well (needs Java and clip-phi[metrics])")
    judge.add_argument("--device", help="for example cuda:1 or cpu (default: what Accelerate finds)")
    judge.add_argument(
        "--output_dir",
        metavar="DIR",
        help="where result, samples, page and pictures go (default: CHECKPOINT/evaluation, or outputs/evaluation for "
        "one on the Hub)",
    )
    judge.add_argument("--json", metavar="FILE", help="write the result there, too")
    judge.set_defaults(run=run_evaluate)

    compare = commands.add_parser("compare", help="which of two evaluated models is better, and how sure that is")
    for name in ("A", "B"):
        compare.add_argument(name, help="an evaluated checkpoint's folder, or TASK.json in its evaluation folder")
    compare.add_argument("--task", choices=TASKS, help="which result, if a folder has several")
    compare.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    compare.add_argument("--json", metavar="FILE", help="write it as json, too")
    compare.set_defaults(run=run_compare)


def run_evaluate(arguments: argparse.Namespace) -> None:
    need_checkpoint(arguments.checkpoint)
    from ..evaluation.run import evaluate

    evaluate(arguments, DEMO_CHECKPOINT)


def run_compare(arguments: argparse.Namespace) -> None:
    from ..evaluation.report import compare, find_result, format_comparison

    first, second = (find_result(place, arguments.task) for place in (arguments.A, arguments.B))
    found = compare(first, second, arguments.seed)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(format_comparison(found))
