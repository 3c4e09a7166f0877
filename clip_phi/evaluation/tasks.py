"""The tasks of an evaluation: which items the data have for each, and how answers are scored."""

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import Any, NamedTuple

import numpy as np

from ..batching.images import load_image
from ..data.report import RecordError, Report, Skip
from ..data.sample import Images, Sample, images_of
from ..data.source import DataSource
from .answer_metrics import exact_match, normalise, pope, says_yes, vqa_accuracy
from .caption_metrics import CaptionScorer

# The main metric of each task. In loss, nothing is generated.
METRICS = {"captions": "CIDEr-D", "vqa": "vqa_accuracy", "pope": "accuracy", "exact": "exact_match", "loss": "loss"}
METRICS["pointing"] = "hit_rate"
OFFICIAL = {"captions": "json", "vqa": "json", "pope": "jsonl"}  # tasks with a results file, and how it ends
QUESTION = "{question}"  # the prompt of a question, unless --prompt is given
MAX_ANSWER_WORDS = 3  # of a short answer in a conversation
LENGTHS = {0: "0", 1: "1", 3: "2-3", 7: "4-7", 12: "8-12", 20: "13-20", math.inf: "21+"}  # in words, by the longest


class EvalItem(NamedTuple):
    """A question or caption about an image. The image is an index in EvalSet.images; the origin is "file:record"."""

    image: int
    question: str | None  # None for a caption
    references: tuple[str, ...]  # accepted answers or captions
    origin: str
    transcript: str | None = None  # of speech before the question, which may be all of it
    id: tuple[int, Any] = (0, None)  # place among the records, and question_id or, of a caption, image id

    @property
    def full_question(self) -> str:
        """All words of the question, spoken and written."""
        return " ".join(filter(None, (self.transcript, self.question)))


@dataclass
class EvalSet:
    """The items of a task, and their images. unscored: questions without a reference answer."""

    task: str
    items: list[EvalItem]
    images: list[Images]
    digests: list[str]  # of the bytes of each image; of several joined by "+"
    report: Report  # bad records of the data
    left_out: Counter[str] = field(default_factory=Counter)  # records that are no items of the task, by kind
    unscored: list[EvalItem] = field(default_factory=list)

    @property
    def metric(self) -> str:
        return METRICS[self.task]

    def fingerprint(self) -> str:
        """Hex digest of the questions, the accepted answers, and the bytes of the images, in their order."""
        digest = hashlib.blake2b(digest_size=16)
        for item in self.items + self.unscored:
            content = [self.digests[item.image], item.question, list(item.references)]
            content += [item.transcript] if item.transcript is not None else []
            digest.update(json.dumps(content).encode())
        return digest.hexdigest()

    def describe_image(self, number: int) -> dict[str, str]:
        """The name of an image without its folders, or a part of its digest, and the digest."""
        names = (
            f"image {digest[:12]}" if isinstance(image, bytes) else (image.member or image.path).rsplit("/", 1)[-1]
            for image, digest in zip(images_of(self.images[number]), self.digests[number].split("+"), strict=True)
        )
        return {"image": " + ".join(names), "image_digest": self.digests[number]}


def read_samples(sources: Sequence[DataSource], report: Report) -> list[Sample]:
    """All samples of the sources, with the transcripts that 'clip-phi speech transcribe' has saved."""
    filled = (source.transcripts().fill(source.read(source.media(), report), report) for source in sources)
    return [sample for samples in filled for sample in samples]


def make_eval_set(
    task: str, samples: Iterable[Sample], report: Report, num_images: int | None = None, max_bad_fraction: float = 0.01
) -> EvalSet:
    """The items that samples have for a task.

    task: a key of METRICS. samples: of all sources. report: of their reader; images are opened here, and damaged ones
    are added to it. num_images: use the first so many; None for all. Raises ValueError if more than max_bad_fraction of
    the records are bad, if no item is found, or if all items are about one image."""
    eval_set = EvalSet(task, [], [], [], report)
    places: dict[Images, int] = {}
    for sample in samples:
        if sample.image is None:
            eval_set.left_out["no image"] += len(sample.conversations)
            continue
        items = list(_items(task, sample, eval_set.left_out))
        if not items or (sample.image not in places and len(places) == num_images):
            continue
        if sample.image not in places:
            try:
                contents = []
                for image in images_of(sample.image):
                    load_image(image)
                    contents.append(image if isinstance(image, bytes) else image.read())
            except RecordError as defect:
                report.skip(Skip(defect.kind, sample.origins[0], defect.detail, len(sample.conversations)))
                continue
            places[sample.image] = len(places)
            eval_set.images.append(sample.image)
            eval_set.digests.append("+".join(hashlib.blake2b(each, digest_size=16).hexdigest() for each in contents))
        for item in items:
            (eval_set.items if item.references else eval_set.unscored).append(item._replace(image=places[sample.image]))
    report.refuse_bad(max_bad_fraction)
    if not (eval_set.items or eval_set.unscored):
        found = ", ".join(f"{count:,} x {kind}" for kind, count in eval_set.left_out.items()) or "no record"
        raise ValueError(f"{task}: these data have no item for this task ({found})")
    if eval_set.items and len(set(eval_set.digests)) < 2:
        raise ValueError(f"{task}: all items are about one image, so none can replace it as a control")
    return eval_set


def _items(task: str, sample: Sample, left_out: Counter[str]) -> Iterator[EvalItem]:
    """The items about the image of a sample; their image is -1. Counts what is left out."""
    first_turns = [conversation[0] for conversation in sample.conversations if conversation]
    captions = tuple(turn.text for turn in first_turns if turn.role == "assistant")
    ids = sample.ids or ((0, None),) * len(sample.origins)
    if task in ("captions", "pointing"):
        left_out["conversation, not a caption"] += len(first_turns) - len(captions)
        if captions or not first_turns:
            yield EvalItem(-1, None, captions, sample.origins[0], id=ids[0])
        return
    if task == "loss":
        answers = (turn.text for turns in sample.conversations for turn in turns if turn.role == "assistant")
        yield EvalItem(-1, None, tuple(answers), sample.origins[0])
        return
    left_out["caption, not a question"] += len(captions)
    for conversation, origin, its_id in zip(sample.conversations, sample.origins, ids, strict=True):
        for question, answer in zip_longest(conversation, conversation[1:]):
            if question.role != "user" or (answer is not None and answer.role != "assistant"):
                continue
            references = () if answer is None else answer.references or (answer.text,)
            if question.speech is not None and question.transcript is None:
                left_out["speech without a transcript: run 'clip-phi speech transcribe --data DATA' first"] += 1
            elif task == "pope" and not {reference.lower().strip(" .") for reference in references} <= {"yes", "no"}:
                left_out["answer is not yes or no"] += 1
            elif answer is not None and not answer.references and len(answer.text.split()) > MAX_ANSWER_WORDS:
                left_out[f"answer is longer than {MAX_ANSWER_WORDS} words"] += 1
            else:
                yield EvalItem(-1, question.text, references, origin, question.transcript, its_id)


def official_results(eval_set: EvalSet, answers: Sequence[str]) -> list[dict[str, Any]]:
    """What the task's own evaluation server or script reads, in the order of the data; empty if the data have no ids
    for it. answers: to the items, then to the unscored ones.

    VQAv2: [{"question_id", "answer"}]; COCO captions: [{"image_id", "caption"}]; POPE: lines of {"question", "answer"}
    in the order of its questions, here with their question_id."""
    items = eval_set.items + eval_set.unscored
    rows, ids = [], [item.id[1] for item in items]
    for item, answer in sorted(zip(items, answers, strict=True), key=lambda pair: pair[0].id[0]):
        if eval_set.task == "captions":
            rows.append({"image_id": item.id[1], "caption": answer})
        else:
            asked = {"question": item.full_question} if eval_set.task == "pope" else {}
            rows.append({"question_id": item.id[1], **asked, "answer": answer})
    has_ids = all(isinstance(each, int | str) for each in ids) and len(set(ids)) == len(ids)
    return rows if has_ids and eval_set.task in OFFICIAL else []


def make_scorer(eval_set: EvalSet) -> Callable[[Sequence[str]], tuple[dict[str, float], np.ndarray]]:
    """A function from the answers to all items to (metrics, scores). scores: float64 (items,), whose mean is the task's
    main metric."""
    references = [item.references for item in eval_set.items]
    score_captions = CaptionScorer(references) if eval_set.task == "captions" else None

    def score(answers: Sequence[str]) -> tuple[dict[str, float], np.ndarray]:
        if score_captions is not None:
            corpus, by_name = score_captions(answers)
            return corpus, by_name[eval_set.metric]
        if eval_set.task == "pope":
            labels = [reference[0].lower().strip(" .") for reference in references]
            right = [says_yes(answer) == (label == "yes") for answer, label in zip(answers, labels, strict=True)]
            return pope(answers, labels), np.array(right, dtype=np.float64)
        exact = exact_match(answers, references)
        each = vqa_accuracy(answers, references) if eval_set.task == "vqa" else exact
        return {eval_set.metric: float(each.mean()), "exact_match": float(exact.mean())}, each

    return score


def guess_by_question(eval_set: EvalSet) -> list[str] | None:
    """The best guess for each item without an image: the most frequent answer to the question about the other images.

    If it has none there, that to questions of its kind, or to all. None if the task has no questions."""
    if eval_set.task == "captions":
        return None
    answers: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)  # of all images, and of each
    keys = []
    for item in eval_set.items:
        question, digest = item.full_question, eval_set.digests[item.image]
        general = [("question", normalise(question)), ("kind", question_kind(question)), ("all",)]
        keys.append([(key, (*key, digest)) for key in general])
        for key in chain(*keys[-1]):
            answers[key].update(item.references)
    guesses = []
    for pairs in keys:
        elsewhere = (answers[key] - answers[its_own] for key, its_own in pairs)
        found = next(filter(None, elsewhere), Counter({"": 1}))
        guesses.append(min(found, key=lambda answer: (-found[answer], answer)))
    return guesses


def question_kind(question: str | None) -> str:
    """The first two words of a question: how many, what color, is the."""
    return " ".join((question or "").lower().split()[:2]).strip("?., ")


def tables(eval_set: EvalSet, answers: Sequence[str], each: np.ndarray) -> dict[str, dict[str, dict[str, Any]]]:
    """Score and number of samples by length of the answer in words, kind of question, and kind of reference."""
    words = [len(answer.split()) for answer in answers]
    lengths = [next(name for most, name in LENGTHS.items() if count <= most) for count in words]
    found = {"by_length": _means(lengths, each)}
    if eval_set.task != "captions":
        found["by_question_type"] = _means([question_kind(item.full_question) for item in eval_set.items], each)
        found["by_answer_type"] = _means([_answer_type(item.references) for item in eval_set.items], each)
    return found


def _answer_type(references: Sequence[str]) -> str:
    usual = normalise(Counter(references).most_common(1)[0][0])
    return "yes/no" if usual in ("yes", "no") else "number" if usual.isdigit() else "other"


def _means(keys: Sequence[str], each: np.ndarray) -> dict[str, dict[str, Any]]:
    """The 20 most frequent keys, and all others as one."""
    groups: dict[str, list[float]] = {key: [] for key, _ in Counter(keys).most_common(20)}
    for key, score in zip(keys, each.tolist(), strict=True):
        groups.setdefault(key if key in groups else "(others)", []).append(score)
    return {key: {"samples": len(found), "score": round(float(np.mean(found)), 6)} for key, found in groups.items()}
