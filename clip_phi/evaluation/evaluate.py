"""One evaluation: the score of a model, beside its scores without the image and with another image.

A score alone shows little, since many questions can be guessed. So each evaluation has controls. Blind: the same
prompts without the image. Shuffled: each prompt with another image of the data. Question-only: the most frequent answer
to a question. The margin is the score minus the better of blind and shuffled: what the model gains from the image.
"""

import hashlib
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..batching.attention import context_length, decoder_attention
from ..batching.encode import Encoded, encode_samples, prefix_ids
from ..batching.images import Preprocessor
from ..batching.packing import build_shared_prefix, pack_samples
from ..data.report import Report
from ..data.sample import Sample, images_of, user_message
from .answers import ALONE, Decoding, Processes, Question, answer_all, answer_likelihoods
from .bootstrap import by_group, margin_interval
from .confidence import assess
from .generate import GeneratedAnswer, held_out_loss
from .tasks import QUESTION, EvalItem, EvalSet, guess_by_question, make_scorer, official_results, question_kind, tables

CONTROLS = ("blind", "shuffled")
MAX_LENGTH = 2048  # in tokens, of a conversation for the loss: the default of training


class EvalResult(NamedTuple):
    """For json."""

    result: dict[str, Any]  # scores, margin and settings, without model and environment
    samples: list[dict[str, Any]]  # one for each item
    official: list[dict[str, Any]] = []  # noqa: RUF012  # of official_results


def evaluate_answers(
    model: Any, processor: Any, eval_set: EvalSet, decoding: Decoding, *, folder: Path | None = None, model_hash: str =
    "", confidence: bool = False, processes: Processes = ALONE,
) -> EvalResult:  # fmt: skip
    """Generate the answers of the model and of its controls, and score them. All processes call it, and get the result.

    model: a ClipPhiForCausalLM in eval mode. eval_set: of any task but loss. folder: where answers are saved as they
    are generated; None to save none. model_hash: saved answers of another model are not used. confidence: how sure the
    answers are as well, if scored by 0 to 1. Raises ValueError if the prompt for questions lacks "{question}"."""
    prompt = decoding.prompt  # in the end None for the caption of a bare image
    if prompt is None:
        prompt = model.config.caption_instruction if eval_set.task == "captions" else QUESTION
    elif eval_set.task != "captions" and QUESTION not in prompt:
        raise ValueError(f"--prompt {prompt!r} must contain {QUESTION}, which is replaced by the question")
    shown = processor.apply_chat_template([user_message(prompt, 1)], add_generation_prompt=True)
    questions = _questions(eval_set, prompt, decoding)
    unique = list({question.key: question for asked in questions.values() for question in asked}.values())
    binding = {"checkpoint": model_hash, "dtype": str(model.dtype), "data": eval_set.fingerprint(), "prompt": shown}
    answers = answer_all(model, processor, unique, decoding, processes, folder, binding | decoding.about())
    generated = {name: [answers[question.key] for question in asked] for name, asked in questions.items()}
    unscored = generated.pop("unscored")
    official = official_results(eval_set, [answer.text for answer in generated["score"] + unscored])
    if eval_set.items:
        result, samples = _score(eval_set, generated, shown, decoding)
        if confidence:
            texts = [answer.text for answer in generated["score"]]
            pairs = [pair for name in ("score", "blind") for pair in zip(questions[name], texts, strict=True)]
            likelihoods, blind = answer_likelihoods(model, processor, pairs, decoding, processes).reshape(2, -1)
            for sample, likelihood, gain in zip(samples, likelihoods, likelihoods - blind, strict=True):
                sample |= {"likelihood": round(float(likelihood), 6), "gain": round(float(gain), 6)}
            right, digests = ([sample[key] for sample in samples] for key in ("score", "image_digest"))
            result["confidence"] = assess(likelihoods, likelihoods - blind, np.array(right), digests)
    else:
        result, samples = {"task": eval_set.task, "data": _about_data(eval_set), "seed": decoding.seed}, []
        result |= {"answers": {"score": _count(unscored)}, "prompt": shown, "decoding": decoding.about()}
    return EvalResult(result, samples, official)


def _questions(eval_set: EvalSet, prompt: str | None, decoding: Decoding) -> dict[str, list[Question]]:
    """Those of the model and of each control, one for each item; equal ones have equal keys and are generated once."""

    def ask(shown: Sequence[tuple[str, Any]], items: Sequence[EvalItem] = eval_set.items) -> list[Question]:
        questions = []
        for item in items:
            text = prompt if item.question is None else (prompt or QUESTION).replace(QUESTION, item.question)
            digest, source = shown[item.image]
            transcript = "" if item.transcript is None else f"|{item.transcript}"
            key = hashlib.blake2b(f"{digest}|{text}{transcript}".encode(), digest_size=12).hexdigest()
            questions.append(Question(key, source, text, item.transcript))
        return questions

    images = list(zip(eval_set.digests, eval_set.images, strict=True))
    questions = {"unscored": ask(images, eval_set.unscored), "score": ask(images)}
    questions["blind"] = ask([("", None)] * len(images))
    for number in range(decoding.shuffles if eval_set.items else 0):
        partners = derange(eval_set.digests, decoding.seed, number)
        questions[f"shuffled {number}"] = ask([images[partner] for partner in partners])
    for place in range(max(len(images_of(image)) for image in eval_set.images) if eval_set.items else 0):
        if replaced := _replace_one(images, place, decoding.seed):
            questions[f"image {place + 1}"] = ask(replaced)
    return questions


def _replace_one(images: Sequence[tuple[str, Any]], place: int, seed: int) -> list[tuple[str, Any]]:
    """Where a sample has several images, the one at `place` is another sample's. Empty if none can be replaced."""
    parts = {number: digest.split("+") for number, (digest, _) in enumerate(images) if "+" in digest}
    at_place = {number: each[place] for number, each in parts.items() if len(each) > place}
    if len(set(at_place.values())) < 2:
        return []
    replaced, rows = list(images), list(at_place)
    for number, partner in zip(rows, derange([*at_place.values()], seed), strict=True):
        digests, files = list(parts[number]), list(images_of(images[number][1]))
        digests[place], files[place] = at_place[rows[partner]], images_of(images[rows[partner]][1])[place]
        replaced[number] = "+".join(digests), tuple(files)
    return replaced


def derange(digests: Sequence[str], seed: int = 0, number: int = 0) -> list[int]:
    """For each image the index of its replacement: of an image with another digest, each used about once.

    Several images are replaced by as many. number: each gives another shuffle. Raises ValueError if none can replace
    one."""
    if len(set(digests)) < 2:
        raise ValueError("all images are the same: none can replace another")
    count = len(digests)
    order, partners = list(range(count)), [0] * count
    random.Random(seed).shuffle(order)
    for place, index in enumerate(order):
        steps = (order[(place + 1 + number + step) % count] for step in range(count))
        digest, size = digests[index], digests[index].count("+")
        found = (other for other in steps if digests[other] != digest and digests[other].count("+") == size)
        if (partner := next(found, None)) is None:
            raise ValueError(f"only one sample has {size + 1} images: none can replace them")
        partners[index] = partner
    return partners


def _score(
    eval_set: EvalSet, generated: dict[str, list[GeneratedAnswer]], prompt: str, decoding: Decoding
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    score = make_scorer(eval_set)
    texts = {name: [answer.text for answer in answers] for name, answers in generated.items()}
    corpus, each = {}, {}
    for name, answers in texts.items():
        corpus[name], each[name] = score(answers)
    one_replaced = {name: each.pop(name) for name in [*each] if name.startswith("image ")}
    shuffles = [name for name in each if name.startswith("shuffled")]
    each["shuffled"] = np.mean([each.pop(name) for name in shuffles], axis=0)
    corpus["shuffled"] = {key: float(np.mean([corpus[name][key] for name in shuffles])) for key in corpus["score"]}
    metrics = {key: {name: corpus[name][key] for name in each} for key in corpus["score"]}
    means = {name: float(values.mean()) for name, values in each.items()}
    digests = [eval_set.digests[item.image] for item in eval_set.items]
    sums, counts = by_group(np.stack([*each.values()], axis=1), digests)
    result = shared_result(eval_set, means, sums, counts, decoding.seed) | {"metrics": metrics}
    if one_replaced:
        several = np.array(["+" in digest for digest in digests])
        scores = one_replaced | {"score": each["score"]}
        result["one_image_shuffled"] = {name: float(values[several].mean()) for name, values in scores.items()}
    if (guesses := guess_by_question(eval_set)) is not None:
        result["question_only"] = {"score": float(score(guesses)[1].mean())}
    generated["shuffled"], texts["shuffled"] = generated[shuffles[0]], texts[shuffles[0]]
    result |= {
        "answers": {name: _count(generated[name]) for name in each},
        "tables": tables(eval_set, texts["score"], each["score"]),
        "prompt": prompt,
        "decoding": decoding.about(),
        "shuffles": decoding.shuffles,
    }
    samples = []
    for number, item in enumerate(eval_set.items):
        sample: dict[str, Any] = eval_set.describe_image(item.image)
        if item.id[1] is not None:
            sample["image_id" if item.question is None else "question_id"] = item.id[1]
        if item.question is not None:
            sample |= {"question": item.question, "type": question_kind(item.full_question)}
            sample |= {"transcript": item.transcript} if item.transcript is not None else {}
        sample |= {"references": list(item.references), "answer": texts["score"][number]}
        sample |= {f"{name}_answer": texts[name][number] for name in CONTROLS}
        samples.append(sample | {name: round(float(values[number]), 6) for name, values in each.items()})
    return result, samples


def shared_result(
    eval_set: EvalSet, means: dict[str, float], sums: np.ndarray, counts: np.ndarray, seed: int, upside: int = 1
) -> dict[str, Any]:
    """The part that all tasks share. means: score, blind and shuffled. sums, counts: float (groups, 3) and (groups,),
    of the same over each image. upside: 1 if higher is better, -1 if lower is."""
    return {
        "task": eval_set.task,
        "metric": eval_set.metric,
        **means,
        "margin": upside * means["score"] - max(upside * means[name] for name in CONTROLS),
        "margin_ci95": list(margin_interval(upside * sums, counts, seed)),
        "data": _about_data(eval_set),
        "seed": seed,
    }


def _about_data(eval_set: EvalSet) -> dict[str, Any]:
    return {
        "fingerprint": eval_set.fingerprint(),
        "images": len(eval_set.images),
        "samples": len(eval_set.items),
        **({"without_reference": len(eval_set.unscored)} if eval_set.unscored else {}),
        "skipped": dict(eval_set.report.skipped),
        "left_out": dict(+eval_set.left_out),
    }


def _count(answers: Sequence[GeneratedAnswer]) -> dict[str, Any]:
    """empty: no text. cut: no end token within max_new_tokens. never_ended: of these, the ones that repeat themselves
    and would not end later either."""
    return {
        "empty": sum(not answer.text for answer in answers),
        "cut": sum(not answer.ended for answer in answers),
        "never_ended": sum(not answer.ended and repeats_itself(answer.text) for answer in answers),
        "mean_tokens": round(sum(answer.tokens for answer in answers) / len(answers), 2),
    }


def repeats_itself(text: str) -> bool:
    """Whether a text ends with the same words three times in a row."""
    words = text.split()
    sizes = range(1, len(words) // 3 + 1)
    return any(words[-size:] == words[-2 * size : -size] == words[-3 * size : -2 * size] for size in sizes)


def evaluate_loss(
    model: Any, processor: Any, samples: Sequence[Sample], eval_set: EvalSet, decoding: Decoding,
    processes: Processes = ALONE,
) -> EvalResult:  # fmt: skip
    """The held-out loss in nats per supervised token, with the image, without it, and with another image.

    A bare caption without its image begins after the end token. The margin is the better control minus the loss, so a
    positive one is good, as for all tasks. One sample is one forward pass. All processes call it, and get the result.

    model: a ClipPhiForCausalLM in eval mode. eval_set: of the same samples, for the task loss: one item an image.
    decoding: its seed. As in training, a longer conversation than MAX_LENGTH or the decoder's context is cut."""
    preprocess, report = Preprocessor(processor.image_processor), Report()
    partners = derange(eval_set.digests, decoding.seed)
    pad, end = processor.tokenizer.pad_token_id, processor.tokenizer.eos_token_id
    max_length = min(MAX_LENGTH, context_length(model.config) or MAX_LENGTH)
    encoded = list(encode_samples(samples, processor, max_length, report))
    places = {image: number for number, image in enumerate(eval_set.images)}
    known = [(places[sample.image], conversations) for sample, conversations in encoded if sample.image in places]

    def loss(conversations: list[Encoded], image: int | None) -> list[float]:
        bare = any(labels[0] >= 0 for _, labels in conversations)
        images = images_of(None if image is None else eval_set.images[image])
        prefix = prefix_ids(processor, len(images)) or ([end] if bare else [])
        pixels = torch.stack([preprocess(each) for each in images]) if images else None
        pack = pack_samples([build_shared_prefix(conversations, prefix, "")], pixels, pad).to(model.device)
        return held_out_loss(model, [pack], model.device).tolist()

    found = []
    with decoder_attention(model):
        for number in processes.progress(range(processes.rank, len(known), processes.world_size)):
            place, conversations = known[number]
            with_image, blind, shuffled = (loss(conversations, image) for image in (place, None, partners[place]))
            found.append([number, place, with_image[0], blind[0], shuffled[0], with_image[1]])
    table = np.array(sorted(processes.gather(found)))
    images, losses, tokens = table[:, 1].astype(int), table[:, 2:5], table[:, 5]
    sums, counts = by_group(losses, [eval_set.digests[image] for image in images], tokens)
    means = dict(zip(("score", *CONTROLS), (sums.sum(0) / counts.sum()).tolist(), strict=True))
    result = shared_result(eval_set, means, sums, counts, decoding.seed, upside=-1)
    skipped = dict(eval_set.report.skipped + report.skipped)
    result["data"] |= {"samples": len(table), "supervised_tokens": int(tokens.sum()), "skipped": skipped}
    result["metrics"] = {"loss": means, "perplexity": {name: math.exp(mean) for name, mean in means.items()}}
    result |= {"prompt": "the turns before each answer", "lower_is_better": True}
    each = [
        eval_set.describe_image(image)
        | {"tokens": int(count)}
        | {name: round(float(value / count), 6) for name, value in zip(means, row, strict=True)}
        for image, row, count in zip(images.tolist(), losses, tokens, strict=True)
    ]
    return EvalResult(result, each)
