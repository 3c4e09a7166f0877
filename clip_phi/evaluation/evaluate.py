"""One evaluation: what a model says about images, beside what it says without them and about others.

A score alone tells little: many questions are answered by guessing. So each evaluation has its controls. Blind: the
same prompts without the image. Shuffled: each with another picture of the data. Question-only: the most frequent
answer to a question. What the model has above the best of blind and shuffled, the margin, it has from looking.
"""

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..batching.attention import PACKED_ATTENTION
from ..batching.encode import Encoded, encode_samples
from ..batching.images import Preprocessor
from ..batching.packing import build_shared_prefix, pack_samples
from ..data.report import Report
from ..data.sample import Sample
from .answers import AnswerFile, Request, answer_all
from .bootstrap import by_group, margin, margin_interval
from .generate import Answer, held_out_loss
from .tasks import (
    QUESTION,
    EvalSet,
    guess_from_questions,
    make_scorer,
    question_kind,
    tables,
)

CONTROLS = ("blind", "shuffled")


@dataclass(frozen=True)
class Decoding:
    """How answers are made. prompt: what is asked, "{question}" standing for the question; None for the usual."""

    prompt: str | None = None
    max_new_tokens: int = 64
    num_beams: int = 1
    batch_size: int = 32
    seed: int = 0  # of the shuffling and the bootstrap; answers are not drawn
    shuffles: int = 1  # ways to give each picture another one's place; the control is their mean


@dataclass
class Processes:
    """Those that share the work. gather: a list from each, joined, in all of them."""

    rank: int = 0
    world_size: int = 1
    gather: Callable[[list[Any]], list[Any]] = lambda values: values
    wait: Callable[[], Any] = lambda: None
    say: Callable[..., Any] = print


@dataclass
class EvalResult:
    """result: for json, without what is known of checkpoint and run. samples: a row for each item, for json."""

    result: dict[str, Any]
    samples: list[dict[str, Any]]


def prompt_of(eval_set: EvalSet, model: Any, wanted: str | None) -> str | None:
    """What is asked in the place of each question; None: nothing, as a bare image is captioned.

    Raises ValueError if the questions have no place in it."""
    if eval_set.task == "captions":
        return wanted if wanted is not None else model.config.caption_instruction
    if wanted is not None and QUESTION not in wanted:
        raise ValueError(f"--prompt {wanted!r} has no place for the question: write {QUESTION} into it")
    return wanted or QUESTION


def show_prompt(processor: Any, prompt: str | None) -> str:
    """The prompt as the model reads it, with one <image> for all of its tokens."""
    content: list[dict[str, Any]] = [{"type": "image"}] + ([{"type": "text", "text": prompt}] if prompt else [])
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def judge(
    model: Any,
    processor: Any,
    eval_set: EvalSet,
    decoding: Decoding,
    *,
    folder: Path | None = None,
    checkpoint: str = "",
    processes: Processes | None = None,
    progress: Callable[[Any], Any] = lambda batches: batches,
) -> EvalResult:
    """Ask, score, and compare with the controls. All processes call it, and all get the outcome.

    folder: where answers are kept as they come, bound to checkpoint (its hash); None to keep nothing."""
    processes = processes or Processes()
    prompt = prompt_of(eval_set, model, decoding.prompt)
    requests = _requests(eval_set, prompt, decoding)
    unique = list({request.key: request for asked in requests.values() for request in asked}.values())
    file = None
    if folder is not None:
        binding = {
            "checkpoint": checkpoint,
            "data": eval_set.fingerprint(),
            "prompt": show_prompt(processor, prompt),
            "max_new_tokens": decoding.max_new_tokens,
            "num_beams": decoding.num_beams,
            "dtype": str(model.dtype),
        }
        file = AnswerFile(folder, binding, processes.rank, processes.wait, processes.say)
        if had := sum(request.key in file.known for request in unique):
            processes.say(f"{had:,} of {len(unique):,} answers are there already")
    mine = answer_all(
        model,
        processor,
        unique,
        file,
        batch_size=decoding.batch_size,
        max_new_tokens=decoding.max_new_tokens,
        num_beams=decoding.num_beams,
        rank=processes.rank,
        world_size=processes.world_size,
        progress=progress,
    )
    answers = {key: Answer(*answer) for key, answer in processes.gather([(key, [*each]) for key, each in mine.items()])}
    said = {name: [answers[request.key] for request in asked] for name, asked in requests.items()}
    return _score(eval_set, said, show_prompt(processor, prompt), decoding)


def _requests(eval_set: EvalSet, prompt: str | None, decoding: Decoding) -> dict[str, list[Request]]:
    """Of the model and of each control, one for each item; equal ones have equal keys, and are asked once."""
    texts = [item.question and (prompt or QUESTION).replace(QUESTION, item.question) for item in eval_set.items]
    if eval_set.task == "captions":
        texts = [prompt] * len(eval_set.items)

    def ask(partners: Sequence[int] | None) -> list[Request]:
        asked = []
        for item, text in zip(eval_set.items, texts, strict=True):
            place = None if partners is None else partners[item.image]
            picture = "" if place is None else eval_set.digests[place]
            said = "" if item.transcript is None else f"|{item.transcript}"
            key = hashlib.blake2b(f"{picture}|{text}{said}".encode(), digest_size=12).hexdigest()
            asked.append(Request(key, None if place is None else eval_set.images[place], text, item.transcript))
        return asked

    requests = {"score": ask(range(len(eval_set.images))), "blind": ask(None)}
    for number in range(decoding.shuffles):
        requests[f"shuffled {number}"] = ask(derange(eval_set.digests, decoding.seed, number))
    return requests


def derange(pictures: Sequence[str], seed: int = 0, number: int = 0) -> list[int]:
    """For each picture the place of one that differs, every place taken about once; another one for each number.

    pictures: equal where they show the same. Raises ValueError if all are the same."""
    count = len(pictures)
    order = list(range(count))
    random.Random(seed).shuffle(order)
    if len(set(pictures)) < 2:
        raise ValueError("all pictures are the same: none can be shown in the place of another")
    partners = [0] * count
    for place, index in enumerate(order):
        steps = (order[(place + 1 + number + step) % count] for step in range(count))
        partners[index] = next(other for other in steps if pictures[other] != pictures[index])
    return partners


def _score(eval_set: EvalSet, said: dict[str, list[Answer]], prompt: str, decoding: Decoding) -> EvalResult:
    score = make_scorer(eval_set)
    texts = {name: [answer.text for answer in answers] for name, answers in said.items()}
    scored = {name: score(answers) for name, answers in texts.items()}
    shuffles = [name for name in said if name.startswith("shuffled")]
    each = {
        "score": scored["score"][1],
        "blind": scored["blind"][1],
        "shuffled": np.mean([scored[name][1] for name in shuffles], axis=0),
    }
    metrics = {
        name: {
            "score": value,
            "blind": scored["blind"][0][name],
            "shuffled": float(np.mean([scored[other][0][name] for other in shuffles])),
        }
        for name, value in scored["score"][0].items()
    }
    result = _compare(eval_set, each, decoding.seed) | {"metrics": metrics}
    guesses = guess_from_questions(eval_set)
    if guesses is not None:
        result["question_only"] = {
            "score": float(score(guesses)[1].mean()),
            "what": "the most frequent answer to the question about the other images of these data",
        }
    result |= {
        "answers": {name: _count(said["shuffled 0" if name == "shuffled" else name]) for name in each},
        "tables": tables(eval_set, texts["score"], each["score"]),
        "prompt": prompt,
        "decoding": {"num_beams": decoding.num_beams, "max_new_tokens": decoding.max_new_tokens, "sampled": False},
        "seed": decoding.seed,
        "shuffles": decoding.shuffles,
    }
    samples = []
    for number, item in enumerate(eval_set.items):
        row: dict[str, Any] = {"image": eval_set.image_name(item.image), "image_digest": eval_set.digests[item.image]}
        if item.question is not None:
            row |= {"question": item.question, "type": question_kind(item.asked)}
            row |= {"transcript": item.transcript} if item.transcript is not None else {}
        row |= {"references": list(item.references), "answer": texts["score"][number]}
        row |= {"blind_answer": texts["blind"][number], "shuffled_answer": texts[shuffles[0]][number]}
        samples.append(row | {name: round(float(values[number]), 6) for name, values in each.items()})
    return EvalResult(result, samples)


def _compare(eval_set: EvalSet, each: dict[str, np.ndarray], seed: int) -> dict[str, Any]:
    """each: float (items,) of model and controls. Of higher scores, which are the better ones."""
    means = {name: float(values.mean()) for name, values in each.items()}
    sums, counts = by_group(np.stack([each["score"], *(each[name] for name in CONTROLS)], axis=1), eval_set.groups())
    return {
        "task": eval_set.task,
        "metric": eval_set.metric,
        **means,
        "margin": margin(means["score"], [means[name] for name in CONTROLS]),
        "margin_ci95": list(margin_interval(sums, counts, seed)),
        "data": {
            "fingerprint": eval_set.fingerprint(),
            "images": len(eval_set.images),
            "samples": len(eval_set.items),
            "skipped": dict(eval_set.report.skipped),
            "left_out": dict(+eval_set.left_out),
        },
    }


def _count(answers: Sequence[Answer]) -> dict[str, Any]:
    """empty: no text. cut: no end token within max_new_tokens. never_ended: of these, those that go round in circles,
    and would not have ended later either."""
    return {
        "empty": sum(not answer.text for answer in answers),
        "cut": sum(not answer.ended for answer in answers),
        "never_ended": sum(not answer.ended and goes_in_circles(answer.text) for answer in answers),
        "mean_tokens": round(sum(answer.tokens for answer in answers) / len(answers), 2),
    }


def goes_in_circles(text: str) -> bool:
    """Whether a text ends with the same words three times in a row."""
    words = text.split()
    for size in range(1, len(words) // 3 + 1):
        if words[-size:] == words[-2 * size : -size] == words[-3 * size : -2 * size]:
            return True
    return False


def judge_loss(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    eval_set: EvalSet,
    decoding: Decoding,
    *,
    max_length: int = 2048,
    processes: Processes | None = None,
    progress: Callable[[Any], Any] = lambda batches: batches,
) -> EvalResult:
    """The held-out loss of what the data say, in nats per supervised token, with the image, without, and with another.

    exam: of the same samples, one item an image. A bare caption without its image begins behind the end token. The
    margin is what the best control has more; a positive one is good, as elsewhere. One sample is one forward pass."""
    processes = processes or Processes()
    model.set_attn_implementation({"text_config": PACKED_ATTENTION})
    preprocess = Preprocessor(processor.image_processor)
    partners = derange(eval_set.digests, decoding.seed)
    pad, end = processor.tokenizer.pad_token_id, processor.tokenizer.eos_token_id
    image_tokens = [processor.image_token_id] * processor.num_image_tokens
    report = Report()
    encoded = list(encode_samples(samples, processor, max_length, report))
    places = {image: number for number, image in enumerate(eval_set.images)}
    known = [(places[sample.image], conversations) for sample, conversations in encoded if sample.image in places]

    def loss(conversations: list[Encoded], image: int | None) -> list[float]:
        bare = any(labels[0] >= 0 for _, labels in conversations)
        prefix = image_tokens if image is not None else [end] if bare else []
        tree = build_shared_prefix(conversations, prefix, "")
        pixels = preprocess(eval_set.images[image]).unsqueeze(0) if image is not None else None
        pack = pack_samples([tree], pixels, pad).to(model.device)
        return held_out_loss(model, [pack], model.device).tolist()

    found = []
    for number in progress(range(processes.rank, len(known), processes.world_size)):
        place, conversations = known[number]
        with_image, blind, shuffled = (loss(conversations, image) for image in (place, None, partners[place]))
        found.append([number, place, with_image[0], blind[0], shuffled[0], with_image[1]])
    rows = np.array(sorted(processes.gather(found)))
    groups = np.unique([eval_set.digests[int(place)] for place in rows[:, 1]], return_inverse=True)[1]
    sums, _ = by_group(rows[:, 2:5], groups)
    counts = np.bincount(groups, weights=rows[:, 5])
    score, blind, shuffled = (sums.sum(0) / counts.sum()).tolist()
    low, high = margin_interval(-sums, counts, decoding.seed)
    result = {
        "task": "loss",
        "metric": "loss",
        **{"score": score, "blind": blind, "shuffled": shuffled},
        "margin": min(blind, shuffled) - score,
        "margin_ci95": [low, high],
        "metrics": {
            "loss": {"score": score, "blind": blind, "shuffled": shuffled},
            "perplexity": {"score": math.exp(score), "blind": math.exp(blind), "shuffled": math.exp(shuffled)},
        },
        "data": {
            "fingerprint": eval_set.fingerprint(),
            "images": len(eval_set.images),
            "samples": len(rows),
            "supervised_tokens": int(rows[:, 5].sum()),
            "skipped": dict(eval_set.report.skipped + report.skipped),
            "left_out": dict(+eval_set.left_out),
        },
        "prompt": "the turns before each answer",
        "seed": decoding.seed,
        "lower_is_better": True,
    }
    names = [eval_set.image_name(int(place)) for place in rows[:, 1]]
    samples_rows = [
        {"image": name, "image_digest": eval_set.digests[int(row[1])], "tokens": int(row[5])}
        | {key: round(float(value / row[5]), 6) for key, value in zip(("score", *CONTROLS), row[2:5], strict=True)}
        for name, row in zip(names, rows, strict=True)
    ]
    return EvalResult(result, samples_rows)
