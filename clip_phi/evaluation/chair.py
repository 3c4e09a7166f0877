"""CHAIR: how often captions name objects that are not in the image (Rohrbach et al. 2018, arXiv 1809.02156).

An object is there if an instance has its category or a reference caption names it. CHAIRi is the share of all mentions
of objects that name one that is not there; CHAIRs is the share of captions with such a mention. Lower is better.
chair.json has the words of COCO's categories: this project's own list, not the authors'. Those under "" hold the name
of an object and mean none."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..data.coco import read_instances
from ..data.source import DataSource
from .bootstrap import by_group, margin_interval
from .caption_metrics import tokenise
from .evaluate import EvalResult
from .tasks import EvalSet

WORDS: dict[str, list[str]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
RATIOS = {"CHAIRi": (0, 1), "CHAIRs": (2, 3), "object_recall": (4, 5)}  # columns of ChairScorer's counts


class ObjectWords:
    """Finds the objects that a text names. categories: one that chair.json does not have is found by its own name."""

    def __init__(self, categories: Iterable[str]):
        words = {name: WORDS.get(name, [_read(name)]) for name in ("", *categories)}
        self.names = {form: name for name in words for word in words[name] for form in (word, _plural(word))}
        longest_first = sorted(map(re.escape, self.names), key=len, reverse=True)
        self.pattern = re.compile(rf"(?<!\S)(?:{'|'.join(longest_first)})(?!\S)")

    def mentions(self, text: str) -> list[str]:
        """The category of each mention, in order. Of overlapping words, the longest are read: no bear in teddy bear."""
        words = _read(text)
        if "toilet" in words:  # its seat is no chair, by the authors' rules too
            words = re.sub(r"\bseats?\b", "", words)
        return [name for found in self.pattern.findall(words) if (name := self.names[found])]


def _read(text: str) -> str:
    return " ".join(tokenise(re.sub("[-_]", " ", text)))


def _plural(word: str) -> str:
    """The regular one; chair.json lists the others."""
    return re.sub(r"(?<=[^aeiou])y$", "ie", re.sub(r"([sxz]|[cs]h)$", r"\1e", word)) + "s"


def find_objects(eval_set: EvalSet, file: Path | None) -> list[list[tuple[str, list[float]]]]:
    """Of each item, category and bbox of the objects in its image, by COCO's instances. Raises ValueError if the file
    lacks an image, or if the id of a caption means another one than its image's name."""
    objects, found = {} if file is None else read_instances(file)[1], []
    for item in eval_set.items:
        keys = (item.id[1], eval_set.describe_image(item.image)["image"])
        if not (known := [key for key in keys if key in objects]):
            raise ValueError(f"{file} lacks image {keys[1]}: --objects FILE is the instances file of all images")
        if objects[known[0]] is not objects[known[-1]]:
            raise ValueError(f"in {file} the image with id {keys[0]} is not {keys[1]}: the ids are of other data")
        found.append(objects[known[0]])
    return found


class ChairScorer:
    """file: COCO's instances file of the items' images. Raises ValueError if it lacks one.

    there: the categories of each item's instances. allowed: these, and what the reference captions name."""

    def __init__(self, eval_set: EvalSet, file: Path):
        self.words = ObjectWords(read_instances(file)[0])
        self.there = [{name for name, _ in objects} for objects in find_objects(eval_set, file)]
        both = zip(self.there, eval_set.items, strict=True)
        self.allowed = [there.union(*map(self.words.mentions, item.references)) for there, item in both]

    def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, list[list[str]]]:
        """For the caption of each item, what RATIOS divide, float64 (captions, 6), and the categories named wrongly.

        The columns: mentions of what is not there, and all; whether there is one, and 1; categories named, and all."""
        rows, hallucinated = [], []
        for caption, there, allowed in zip(captions, self.there, self.allowed, strict=True):
            names = self.words.mentions(caption)
            hallucinated.append(wrong := [name for name in names if name not in allowed])
            rows.append([len(wrong), len(names), bool(wrong), 1, len(there.intersection(names)), len(there)])
        return np.array(rows, dtype=np.float64), hallucinated


def objects_file(file: Path | None, sources: Sequence[DataSource]) -> Path | None:
    """The given file, or instances_*.json beside the captions_*.json that is the only source, if there is one."""
    paths = [path for source in sources if (path := Path(source.path)).name.startswith("captions_")]
    beside = [path.with_name(f"instances_{path.name.removeprefix('captions_')}") for path in paths]
    return file or (beside[0] if len(sources) == len(beside) == 1 and beside[0].is_file() else None)


def add_chair(evaluation: EvalResult, eval_set: EvalSet, scorer: ChairScorer, texts: dict[str, list[str]]) -> None:
    """Add the scores, the margins of CHAIRi and CHAIRs over the better control, and what each caption names wrongly.

    texts: captions of the model, then of the controls. A share of nothing is 0: captions that name no object have a
    CHAIRi of 0. object_recall is the share of the instances' categories that are named."""
    result, found = evaluation.result, {name: scorer(captions) for name, captions in texts.items()}
    result["chair"], digests = {}, [eval_set.digests[item.image] for item in eval_set.items]
    for metric, columns in RATIOS.items():
        counts = (np.stack([each[:, column] for each, _ in found.values()], axis=1) for column in columns)
        upper, lower = (by_group(count, digests)[0] for count in counts)
        means = upper.sum(0) / np.maximum(lower.sum(0), 1)
        result["metrics"][metric] = dict(zip(found, means.tolist(), strict=True))
        if metric != "object_recall":
            interval = list(margin_interval(-upper, lower, result["seed"]))
            result["chair"][metric] = {"margin": float(means[1:].min() - means[0]), "margin_ci95": interval}
    for sample, names in zip(evaluation.samples, found["score"][1], strict=True):
        sample["hallucinated"] = names
