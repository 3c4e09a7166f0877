"""CHAIR: how often captions name objects that are not in the image (Rohrbach et al. 2018, arXiv 1809.02156).

An object is there if an instance has its category or a reference caption names it. CHAIRi is the share of all mentions
of objects that name one that is not there; CHAIRs is the share of captions with such a mention. Lower is better.
chair.json has the words of COCO's categories: this project's own list, not the authors'. Those under "" hold the name
of an object and mean none."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.coco import read_instances
from .bootstrap import by_group, margin_interval
from .caption_metrics import tokenise
from .tasks import EvalSet

WORDS: dict[str, list[str]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
RATIOS = {"CHAIRi": (0, 1), "CHAIRs": (2, 3), "object_recall": (4, 5)}  # columns of ChairScorer


class ObjectWords:
    """Finds the objects that a text names. categories: one that chair.json does not have is found by its own name."""

    def __init__(self, categories: Iterable[str]):
        words = {name: WORDS.get(name, [name.lower()]) for name in ("", *categories)}
        self.names = {form: name for name in words for word in words[name] for form in (word, _plural(word))}
        longest_first = sorted(map(re.escape, self.names), key=len, reverse=True)
        self.pattern = re.compile(rf"(?<!\S)(?:{'|'.join(longest_first)})(?!\S)")

    def mentions(self, text: str) -> list[str]:
        """The category of each mention, in order. Of overlapping words, the longest are read: no bear in teddy bear."""
        words = " ".join(tokenise(text.replace("-", " ")))
        if "toilet" in words:  # its seat is no chair, by the authors' rules too
            words = re.sub(r"\bseats?\b", "", words)
        return [name for found in self.pattern.findall(words) if (name := self.names[found])]


def _plural(word: str) -> str:
    """The regular one; chair.json lists the others."""
    return re.sub(r"(?<=[^aeiou])y$", "ie", re.sub(r"([sxz]|[cs]h)$", r"\1e", word)) + "s"


class ChairScorer:
    """files: COCO's instances files of the items' images. Raises ValueError if an image is in none, or differs in two.

    there: the categories of each item's instances. allowed: these, and what the reference captions name."""

    def __init__(self, eval_set: EvalSet, files: Sequence[Path]):
        categories, objects, self.there = dict[str, None](), dict[Any, Any](), list[set[str]]()
        for names, found in map(read_instances, files):
            if clash := [key for key in found.keys() & objects.keys() if found[key] != objects[key]]:
                raise ValueError(f"image {clash[0]} has other objects in another file")
            categories, objects = categories | dict.fromkeys(names), objects | found
        for item in eval_set.items:
            keys = (item.id[1], eval_set.describe_image(item.image)["image"])
            if not (known := [key for key in keys if key in objects]):
                raise ValueError(f"{' + '.join(map(str, files))}: no image {keys[1]}")
            self.there.append({name for name, _ in objects[known[0]]})
        self.words = ObjectWords(categories)
        named = [set().union(*map(self.words.mentions, item.references)) for item in eval_set.items]
        self.allowed = [first | second for first, second in zip(self.there, named, strict=True)]

    def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, list[list[str]]]:
        """For the caption of each item, float64 (captions, 6) for RATIOS, and the categories that are named wrongly.

        The columns: mentions of what is not there, and all; whether there is one, and 1; the instances' categories that
        are named, and all."""
        rows, hallucinated = [], []
        for caption, there, allowed in zip(captions, self.there, self.allowed, strict=True):
            names = self.words.mentions(caption)
            hallucinated.append(wrong := [name for name in names if name not in allowed])
            rows.append([len(wrong), len(names), bool(wrong), 1, len(there.intersection(names)), len(there)])
        return np.array(rows, dtype=np.float64), hallucinated


def chair(counts: dict[str, np.ndarray], groups: np.ndarray, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores by metric, and margins of CHAIRi and CHAIRs over the better control, with intervals; for a result.

    counts: of ChairScorer, for the model, then the controls. groups: of EvalSet. A share of nothing is 0: captions that
    name no object have a CHAIRi of 0. object_recall is the share of the instances' categories that are named."""
    scores, margins = {}, {}
    for metric, columns in RATIOS.items():
        upper, lower = (by_group(np.stack([n[:, c] for n in counts.values()], 1), groups)[0] for c in columns)
        means = upper.sum(0) / np.maximum(lower.sum(0), 1)
        scores[metric] = dict(zip(counts, means.tolist(), strict=True))
        interval = list(margin_interval(-upper, lower, seed))
        margins[metric] = {"margin": float(means[1:].min() - means[0]), "margin_ci95": interval}
    del margins["object_recall"]
    return scores, margins
