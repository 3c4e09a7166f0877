"""Short answers against references: VQA accuracy, exact match, and POPE's yes or no.

Imports nothing of the project: the file is part of the metric on the Hub.
"""

import re
from collections.abc import Sequence

import numpy as np

ARTICLES = {"a", "an", "the"}
_NUMBERS = "zero one two three four five six seven eight nine ten"
NUMBERS = {name: str(value) for value, name in enumerate(_NUMBERS.split())} | {"none": "0"}
# The official evaluation restores one missing apostrophe in these words. It has somebody'd the other way round, and
# neither i'm nor let's.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place in range(len(word))
    if word[place] == "'"
} | {"somebody'd": "somebodyd"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_COMMA = re.compile(r"\d,\d")
MOST_PERIODS = 32  # the official evaluation removes no more
AGREEING = 3  # other people who must give an answer for it to count in full


def normalise(answer: str) -> str:
    """As the official VQA evaluation compares answers (arXiv 1505.00468): without case, punctuation and articles,
    numbers as digits, apostrophes restored."""
    answer = " ".join(answer.replace("\t", " ").splitlines()).strip()
    text = answer
    has_number = _COMMA.search(answer) is not None
    for sign in PUNCTUATION:
        beside_space = f"{sign} " in answer or f" {sign}" in answer
        text = text.replace(sign, "" if beside_space or has_number else " ")
    text = _PERIOD.sub("", text, count=MOST_PERIODS)
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answers: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """VQA accuracy of each answer, float64 (answers,) in 0 to 1 (arXiv 1505.00468).

    references: what people answered, ten for each question in VQAv2. For each of them in turn, an answer that three of
    the others gave counts in full, and in thirds below; the mean over all is its accuracy. With fewer than four people,
    all others must have given it; with one, that one.
    Raises ValueError if a question has no reference, or there are not as many of them as answers."""
    return np.array([_accuracy(*pair) for pair in _normalised(answers, references)])


def _accuracy(answer: str, references: Sequence[str]) -> float:
    equal = sum(reference == answer for reference in references)
    if len(references) == 1:
        return float(equal)
    needed = min(AGREEING, len(references) - 1)
    # Left out in turn: one of those who agree, or one of those who do not.
    agreeing, others = min(1, (equal - 1) / needed), min(1, equal / needed)
    return (equal * agreeing + (len(references) - equal) * others) / len(references)


def exact_match(answers: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """1 where an answer equals one of its references, both normalised, else 0: float64 (answers,).

    Raises ValueError as vqa_accuracy does."""
    return np.array([answer in accepted for answer, accepted in _normalised(answers, references)], dtype=np.float64)


def says_yes(answer: str) -> bool:
    """POPE's reading of an answer: no if its first sentence holds the word no, No or not, else yes (arXiv 2305.10355,
    its evaluate.py)."""
    return not {"No", "no", "not"} & set(answer.split(".")[0].replace(",", "").split(" "))


def pope(answers: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of "yes", and the share of yes among the answers (arXiv 2305.10355).

    labels: yes or no. A score whose denominator is 0 is 0. Raises ValueError for another label or number of them."""
    if len(answers) != len(labels) or not answers:
        raise ValueError(f"{len(answers):,} answers for {len(labels):,} labels: give equally many, at least one")
    if unknown := sorted(set(labels) - {"yes", "no"}):
        raise ValueError(f"POPE's labels are yes and no, not {', '.join(map(repr, unknown[:3]))}")
    yes, true = np.array([says_yes(answer) for answer in answers]), np.array([label == "yes" for label in labels])
    hits = int((yes & true).sum())
    precision, recall = hits / max(int(yes.sum()), 1), hits / max(int(true.sum()), 1)
    return {
        "accuracy": float((yes == true).mean()),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes_share": float(yes.mean()),
    }


def _normalised(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[tuple[str, list[str]]]:
    if len(answers) != len(references) or not answers:
        raise ValueError(f"{len(answers):,} answers for {len(references):,} questions: give equally many, at least one")
    if not all(references):
        raise ValueError("each question needs at least one reference answer")
    return [(normalise(a), [normalise(r) for r in rs]) for a, rs in zip(answers, references, strict=True)]
