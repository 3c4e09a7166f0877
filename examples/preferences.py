"""Pairs of a better and a worse answer to one prompt, in the layout of TRL's DPOTrainer.

    python examples/preferences.py outputs/stage2 outputs/pairs.parquet --task vqa --data llava:...
    python examples/trl_train.py --method dpo --model outputs/stage2 --data outputs/pairs.parquet

DPO (arXiv 2305.18290) makes the worse one less likely, so that is a sample of the model itself."""

import argparse
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from datasets import Dataset, Image, List

from clip_phi.batching.images import load_image
from clip_phi.data.report import Report, plain
from clip_phi.data.sample import images_of, user_message
from clip_phi.data.source import parse_files
from clip_phi.evaluation.answer_metrics import vqa_accuracy
from clip_phi.evaluation.chair import ChairScorer
from clip_phi.evaluation.tasks import EvalSet, make_eval_set, read_samples
from clip_phi.serving.engine import Engine

RIGHT = 0.5  # VQA accuracy of an answer that counts as right: two of ten people gave it


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="folder or Hub id of a trained model")
    parser.add_argument("file", type=Path, metavar="OUT.parquet", help="file to write; it holds the images")
    parser.add_argument("--data", nargs="+", required=True, help="data with references, as in train_accelerate.py")
    parser.add_argument("--task", choices=["captions", "vqa"], required=True, help="captions, or short answers")
    parser.add_argument("--objects", type=Path, help="captions: COCO's instances file of the images")
    parser.add_argument("--samples", type=int, default=8, help="samples of each prompt, at most 32")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sampling")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest sample; one that is cut is not used")
    parser.add_argument("--num_images", type=int, help="only the first so many images (default: all)")
    parser.add_argument("--max_bad_fraction", type=float, default=0.01, help="largest share of bad records")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the samples")
    parser.add_argument("--device", help="for example cuda:1 or cpu (default: CUDA if there is one)")
    return parser.parse_args(words)


def write_pairs(arguments: argparse.Namespace) -> None:
    """Raises ValueError in one line if nothing gave a pair."""
    if arguments.file.suffix != ".parquet" or arguments.file.exists():
        raise ValueError(f"{arguments.file} must end in .parquet, and not exist yet")
    sources, report = parse_files(arguments.data), Report()
    samples = read_samples(sources, report)
    eval_set = make_eval_set(arguments.task, samples, report, arguments.num_images, arguments.max_bad_fraction)
    objects = arguments.objects
    if (objects is None) != (arguments.task == "vqa"):
        raise ValueError("--objects FILE, the objects that are in the images, is for --task captions, and needed there")
    chair = ChairScorer(eval_set, objects) if objects else None
    account = Counter({"no pair: no reference": len(eval_set.unscored)})
    account.update({f"left out: {kind}": count for kind, count in eval_set.left_out.items()})
    account.update({f"skipped: {kind}": count for kind, count in report.skipped.items()})
    with (
        Engine.from_pretrained(arguments.model, arguments.device) as engine,
        ThreadPoolExecutor(8) as pool,
    ):  # so many prompts are in the engine at once
        results = list(pool.map(lambda n: _compare(n, engine, eval_set, chair, arguments), range(len(eval_set.items))))
    account = sum((counts for _, counts in results), account)
    lines = "".join(f"\n{count:9,} {kind}" for kind, count in sorted(account.items()) if count)
    if not (rows := [row for row, _ in results if row]):
        raise ValueError(f"no pair:{lines}")
    Dataset.from_list(rows).cast_column("images", List(Image())).to_parquet(arguments.file)
    print(plain(f"{len(rows):,} pairs in {arguments.file}, of {len(results):,} prompts{lines}"))


def _compare(
    number: int, engine: Any, eval_set: EvalSet, chair: ChairScorer | None, options: argparse.Namespace
) -> tuple[dict[str, Any] | None, Counter[str]]:
    """The pair that the samples of an item give, or None, and counts of what happened.

    Rejected is the sample with most that is wrong. Chosen is, of samples and references with nothing wrong, the one
    with most that is right, if that is no less than in the rejected one. Of equals, the most frequent sample."""

    def judge(text: str) -> tuple[int, float]:
        """What is wrong and what is right: in objects, or by VQA accuracy."""
        if chair is None:
            score = float(vqa_accuracy([text], [item.references])[0])
            return int(score < RIGHT), score
        names = chair.words.mentions(text)
        return sum(name not in chair.allowed[number] for name in names), len(chair.there[number].intersection(names))

    item, many = eval_set.items[number], options.samples
    if not (prompt := item.question or engine.model.config.caption_instruction):
        raise ValueError("this model captions bare images, and TRL's prompts have words: take a model of stage 2")
    if item.transcript is not None:
        return None, Counter({"no pair: a spoken question": 1})
    images = images_of(eval_set.images[item.image])
    messages, pixels = [user_message(prompt, len(images))], [load_image(image) for image in images]
    sampling = {name: getattr(options, name) for name in ("temperature", "max_new_tokens")}
    completions = engine.submit_many(messages, pixels, [None] * many, seed=options.seed + number * many, **sampling)
    texts = [text for each in completions if (text := each.result().strip()) and each.finish_reason == "stop"]
    said = [text for text, _ in Counter(texts).most_common()]
    judged = {text: judge(text) for text in (*said, *item.references)}
    counts = Counter(f"samples: {'wrong' if judged[text][0] else 'right'}" for text in texts)
    counts["samples: empty or cut"] = many - len(texts)
    best = max(judged, key=lambda text: (not judged[text][0], judged[text][1]))
    worst = max(said, key=lambda text: judged[text][0], default=best)
    if not judged[worst][0] or judged[best][0] or judged[best][1] < max(judged[worst][1], 0.1):
        return None, counts + Counter([f"no pair: {'nothing is better' if judged[worst][0] else 'no sample is wrong'}"])
    turns = {"prompt": ("user", prompt), "chosen": ("assistant", best), "rejected": ("assistant", worst)}
    row: dict[str, Any] = {name: [{"role": role, "content": text}] for name, (role, text) in turns.items()}
    row["images"] = [{"bytes": image if isinstance(image, bytes) else image.read()} for image in images]
    return row, counts + Counter({f"pair: the better one is a {'sample' if best in said else 'reference'}": 1})


if __name__ == "__main__":
    try:
        write_pairs(parse_arguments())
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
