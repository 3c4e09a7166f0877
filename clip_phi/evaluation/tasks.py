"""What is asked in each task, and how the answers are scored."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..batching.images import load_image
from ..data.report import RecordError, Report, Skip
from ..data.sample import File, Sample
from ..data.source import DataSource
from .answer_metrics import exact_match, normalise, pope, says_yes, vqa_accuracy
from .caption_metrics import CaptionScorer

# The metric that stands for each task; loss is of what the data say, and nothing is asked there.
METRICS = {"captions": "CIDEr-D", "vqa": "vqa_accuracy", "pope": "accuracy", "exact": "exact_match", "loss": "loss"}
QUESTION = "{question}"  # how a question is put, unless --prompt says otherwise
MAX_ANSWER_WORDS = 3  # of conversations, what is no longer is a short answer
WORD_RANGES = ((0, 0), (1, 1), (2, 3), (4, 7), (8, 12), (13, 20), (21, None))


class Item(NamedTuple):
    """What is asked about an image. image: its number in EvalSet.images. question: None for a caption. transcript: what
    is said before it; of a spoken question, the question itself."""

    image: int
    question: str | None
    references: tuple[str, ...]
    origin: str
    transcript: str | None = None

    @property
    def asked(self) -> str:
        """All words of the question, said and written."""
        return " ".join(filter(None, (self.transcript, self.question)))


@dataclass
class EvalSet:
    """The items of a task, and their images.

    digests: of the bytes of each image. left_out: what the data hold beside, by kind; report: what is wrong with them.
    """

    task: str
    items: list[Item]
    images: list[File | bytes]
    digests: list[str]
    report: Report
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def metric(self) -> str:
        return METRICS[self.task]

    def fingerprint(self) -> str:
        """Hex digest of what is asked, of the accepted answers, and of the bytes of the images, in their order."""
        digest = hashlib.blake2b(digest_size=16)
        for item in self.items:
            row = [self.digests[item.image], item.question, list(item.references)]
            row += [item.transcript] if item.transcript is not None else []
            digest.update(json.dumps(row).encode())
        return digest.hexdigest()

    def image_name(self, number: int) -> str:
        """A short one, without folders."""
        image = self.images[number]
        if isinstance(image, bytes):
            return f"image {self.digests[number][:12]}"
        return (image.member or image.path).rsplit("/", 1)[-1]

    def groups(self) -> np.ndarray:
        """int64 (items,): equal for items about the same picture, from 0 on."""
        numbers: dict[str, int] = {}
        return np.array([numbers.setdefault(self.digests[item.image], len(numbers)) for item in self.items])


def read_exam(
    task: str, sources: Sequence[DataSource], num_images: int | None = None, max_bad_fraction: float = 0.01
) -> EvalSet:
    """The items that the sources have for a task, about their first num_images images (None: all).

    Every image is opened, and left out and counted if it cannot be. Raises ValueError if more than max_bad_fraction of
    the records are bad, or if nothing is left."""
    report = Report()
    return make_eval_set(task, read_samples(sources, report), report, num_images, max_bad_fraction)


def read_samples(sources: Sequence[DataSource], report: Report) -> list[Sample]:
    """All samples of the sources, with the transcripts that 'clip-phi speech transcribe' stored."""
    return [
        sample
        for source in sources
        for sample in source.transcripts().fill(source.read(source.media(), report), report)
    ]


def make_eval_set(
    task: str, samples: Iterable[Sample], report: Report, num_images: int | None = None, max_bad_fraction: float = 0.01
) -> EvalSet:
    """read_exam, of samples that are there already; report: that of their reader."""
    eval_set = EvalSet(task, [], [], [], report)
    places: dict[File | bytes, int] = {}
    for sample in samples:
        if sample.image is None:
            eval_set.left_out["no image"] += len(sample.conversations)
            continue
        items = _items(task, sample, eval_set.left_out)
        if not items or (sample.image not in places and len(places) == num_images):
            continue
        if sample.image not in places:
            try:
                digest = _digest(sample.image)
            except RecordError as defect:
                report.skip(Skip(defect.kind, sample.origins[0], defect.detail, len(sample.conversations)))
                continue
            places[sample.image] = len(places)
            eval_set.images.append(sample.image)
            eval_set.digests.append(digest)
        eval_set.items += [Item(places[sample.image], *item) for item in items]
    report.refuse_bad(max_bad_fraction)
    if not eval_set.items:
        found = ", ".join(f"{count:,} x {kind}" for kind, count in eval_set.left_out.items()) or "no record"
        raise ValueError(f"{task}: nothing to ask in these data ({found})")
    if len(set(eval_set.digests)) < 2:
        raise ValueError(f"{task}: all is about one image, and no other can be shown in its place")
    return eval_set


def _digest(image: File | bytes) -> str:
    """Of the bytes, once it is known that they are an image. Raises RecordError otherwise."""
    load_image(image)
    return hashlib.blake2b(image if isinstance(image, bytes) else image.read(), digest_size=16).hexdigest()


def _items(
    task: str, sample: Sample, left_out: Counter[str]
) -> list[tuple[str | None, tuple[str, ...], str, str | None]]:
    """(question, references, origin, transcript) of each item about the image of a sample."""
    bare = [conversation[0].text for conversation in sample.conversations if conversation[0].role == "assistant"]
    if task == "captions":
        left_out["conversation, not a caption"] += len(sample.conversations) - len(bare)
        return [(None, tuple(bare), sample.origins[0], None)] if bare else []
    if task == "loss":
        texts = [
            turn.text for conversation in sample.conversations for turn in conversation if turn.role == "assistant"
        ]
        return [(None, tuple(texts), sample.origins[0], None)]
    left_out["caption, not a question"] += len(bare)
    found: list[tuple[str | None, tuple[str, ...], str, str | None]] = []
    for conversation, origin in zip(sample.conversations, sample.origins, strict=True):
        for asked, said in zip(conversation, conversation[1:], strict=False):
            if (asked.role, said.role) != ("user", "assistant"):
                continue
            references = said.references or (said.text,)
            if asked.speech is not None and asked.transcript is None:
                left_out["speech without a transcript: run 'clip-phi speech transcribe --data DATA' first"] += 1
            elif task == "pope" and not {reference.lower().strip(" .") for reference in references} <= {"yes", "no"}:
                left_out["answer is not yes or no"] += 1
            elif not said.references and len(said.text.split()) > MAX_ANSWER_WORDS:
                left_out[f"answer is longer than {MAX_ANSWER_WORDS} words"] += 1
            else:
                found.append((asked.text, references, origin, asked.transcript))
    return found


def make_scorer(eval_set: EvalSet) -> Callable[[Sequence[str]], tuple[dict[str, float], np.ndarray]]:
    """Gives, for the answers to all items, every metric, and float64 (items,), whose mean is the task's metric."""
    references = [item.references for item in eval_set.items]
    if eval_set.task == "captions":
        judge = CaptionScorer(references)

        def score(answers: Sequence[str]) -> tuple[dict[str, float], np.ndarray]:
            scores = judge(answers)
            return scores.corpus, scores.each[eval_set.metric]

    elif eval_set.task == "pope":
        labels = [reference[0].lower().strip(" .") for reference in references]

        def score(answers: Sequence[str]) -> tuple[dict[str, float], np.ndarray]:
            right = [says_yes(answer) == (label == "yes") for answer, label in zip(answers, labels, strict=True)]
            return pope(answers, labels), np.array(right, dtype=np.float64)

    else:
        measure = vqa_accuracy if eval_set.task == "vqa" else exact_match

        def score(answers: Sequence[str]) -> tuple[dict[str, float], np.ndarray]:
            each = measure(answers, references)
            other = exact_match(answers, references) if eval_set.task == "vqa" else each
            return {eval_set.metric: float(each.mean()), "exact_match": float(other.mean())}, each

    return score


def guess_from_questions(eval_set: EvalSet) -> list[str] | None:
    """For each question the most frequent answer that it has about the other pictures; if it has none there, that of
    its kind of question, or of all. What can be had without looking. None if there are no questions."""
    if eval_set.task == "captions":
        return None
    by_key: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    here: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    keys = []
    for item, group in zip(eval_set.items, eval_set.groups(), strict=True):
        mine = [("question", normalise(item.asked)), ("kind", question_kind(item.asked)), ("all",)]
        keys.append(mine)
        for key in mine:
            by_key[key].update(item.references)
            here[*key, str(group)].update(item.references)
    guesses = []
    for mine, group in zip(keys, eval_set.groups(), strict=True):
        elsewhere = (by_key[key] - here[*key, str(group)] for key in mine)
        answers = next((found for found in elsewhere if found), Counter({"": 1}))
        guesses.append(min(answers, key=lambda answer: (-answers[answer], answer)))
    return guesses


def question_kind(question: str | None) -> str:
    """The first two words of a question: how many, what color, is the."""
    return " ".join((question or "").lower().split()[:2]).strip("?., ")


def tables(eval_set: EvalSet, answers: Sequence[str], each: np.ndarray) -> dict[str, dict[str, dict[str, Any]]]:
    """Score and number of samples by the length of the answer in words, and by kind of question and of right answer."""
    lengths = [_range_of(len(answer.split())) for answer in answers]
    found = {"by_length": _means(lengths, each)}
    if eval_set.task != "captions":
        found["by_question_type"] = _means([question_kind(item.asked) for item in eval_set.items], each)
        found["by_answer_type"] = _means([_answer_type(item.references) for item in eval_set.items], each)
    return found


def _range_of(length: int) -> str:
    low, high = next((low, high) for low, high in WORD_RANGES if high is None or length <= high)
    return f"{low}+" if high is None else str(low) if low == high else f"{low}-{high}"


def _answer_type(references: Sequence[str]) -> str:
    usual = normalise(Counter(references).most_common(1)[0][0])
    return "yes/no" if usual in ("yes", "no") else "number" if usual.isdigit() else "other"


def _means(keys: Sequence[str], each: np.ndarray) -> dict[str, dict[str, Any]]:
    """The most frequent 20 keys, the others together."""
    often = Counter(keys).most_common(20)
    known = {key for key, _ in often}
    names = np.array([key if key in known else "(others)" for key in keys])
    order = [key for key, _ in often] + (["(others)"] if len(set(keys)) > len(known) else [])
    return {
        key: {"samples": int((names == key).sum()), "score": round(float(each[names == key].mean()), 6)}
        for key in order
    }
