"""clip-phi preferences: a better and a worse answer to one prompt, in the layout of TRL's DPOTrainer.

DPO (arXiv 2305.18290) makes the worse one less likely, so that is a sample of the model itself."""

import argparse
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from datasets import Dataset, Image, List

from ..batching.images import load_image
from ..data.report import Report, plain
from ..data.sample import images_of, user_message
from ..data.source import parse_files
from ..evaluation.answer_metrics import vqa_accuracy
from ..evaluation.chair import ChairScorer, objects_file
from ..evaluation.tasks import EvalSet, make_eval_set, read_samples
from .common import load_engine

RIGHT = 0.5  # VQA accuracy of an answer that counts as right: two of ten people gave it


def run_preferences(arguments: argparse.Namespace) -> None:
    if arguments.file.suffix != ".parquet" or arguments.file.exists():
        raise ValueError(f"{arguments.file} must end in .parquet, and not exist yet")
    sources, report = parse_files(arguments.data), Report()
    samples = read_samples(sources, report)
    eval_set = make_eval_set(arguments.task, samples, report, arguments.num_images, arguments.max_bad_fraction)
    objects = objects_file(arguments.objects, sources)
    if (objects is None) != (arguments.task == "vqa"):
        raise ValueError("--objects FILE, the objects that are in the images, is for --task captions, and needed there")
    chair = ChairScorer(eval_set, objects) if objects else None
    account = Counter({"no pair: no reference": len(eval_set.unscored)})
    account.update({f"left out: {kind}": count for kind, count in eval_set.left_out.items()})
    account.update({f"skipped: {kind}": count for kind, count in report.skipped.items()})
    with load_engine(arguments) as engine, ThreadPoolExecutor(8) as pool:  # so many prompts are in the engine at once
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
