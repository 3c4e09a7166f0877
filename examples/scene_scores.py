"""What a text says of the drawn scenes: the scores of the demo. Needs nothing but the words of the scenes."""

import re
from collections import Counter

from clip_phi.data.synthetic import COLORS, NUMBERS, SHAPES

_SINGULARS = {plural: shape for shape, plural in SHAPES.items()} | {shape: shape for shape in SHAPES}
_MENTION = re.compile(
    rf"\b(?:({'|'.join(NUMBERS)}) )?({'|'.join(COLORS)}) ({'|'.join(sorted(_SINGULARS, key=len, reverse=True))})\b"
)


def question_kind(question: str) -> str:
    """The kind of a question of dialogue: color, shape, presence, count, left_right or above_below."""
    text = question.lower()
    if text.startswith("is the "):
        return "above_below" if " above " in text or " below " in text else "left_right"
    kinds = {"how many": "count", "color": "color", "shape": "shape"}
    return next((kind for words, kind in kinds.items() if words in text), "presence")


def mentioned_objects(text: str) -> "Counter[tuple[str, str]]":
    """Count the (color, shape) pairs in a text, in any case. "two blue squares" counts twice."""
    found: Counter[tuple[str, str]] = Counter()
    for number, color, shape in _MENTION.findall(text.lower()):
        found[color, _SINGULARS[shape]] += NUMBERS.index(number) if number else 1
    return found


def object_f1(predicted_text: str, truth: "Counter[tuple[str, str]]") -> float:
    """F1 in [0, 1] between the objects that a text names and a scene's composition, with their numbers."""
    predicted = mentioned_objects(predicted_text)
    return 2 * (predicted & truth).total() / max(1, predicted.total() + truth.total())
