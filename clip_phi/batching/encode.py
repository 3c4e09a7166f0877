"""Samples to token ids. What is too long is cut or skipped; what has no answer to learn is skipped."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

from modeling_clip_phi.configuration_clip_phi import IGNORE_INDEX

from ..data.report import RecordError, Report, Skip
from ..data.sample import Conversation, Sample, as_messages, images_of


class Encoded(NamedTuple):
    """A conversation without BOS and image: token ids, and labels, -100 where nothing is supervised."""

    ids: list[int]
    labels: list[int]


def prefix_ids(processor: Any, num_images: int) -> list[int]:
    """Token ids before a conversation: BOS if the decoder has one, then num_image_tokens <image> tokens an image."""
    return processor.bos_ids + [processor.image_token_id] * processor.num_image_tokens * num_images


def encode_samples(
    samples: Sequence[Sample], processor: Any, max_length: int, report: Report
) -> Iterator[tuple[Sample, list[Encoded]]]:
    """Each Sample with its conversations as token ids. What is skipped is counted in the report.

    A conversation longer than max_length tokens, image included, is cut after the last answer that fits. If not even
    the first fits, it is skipped. A sample whose conversations are longer together becomes several, each with the
    image. Raises ValueError if the chat template puts anything but BOS before the image."""
    messages = [as_messages(each, len(images_of(sample.image))) for sample in samples for each in sample.conversations]
    encoded = iter(_encode(messages, processor))
    for sample in samples:
        prefix = len(prefix_ids(processor, count := len(images_of(sample.image))))
        start = [*processor.bos_ids, *[processor.image_token_id] * count]
        fitting: list[tuple[Conversation, str, Encoded]] = []
        for conversation, origin in zip(sample.conversations, sample.origins, strict=True):
            tokens = next(encoded)
            try:
                if isinstance(tokens, RecordError):
                    raise tokens
                if tokens.ids[: len(start)] != start or processor.image_token_id in tokens.ids[len(start) :]:
                    raise ValueError("the chat template must put the image first, after BOS if there is one")
                tokens = Encoded(tokens.ids[len(start) :], tokens.labels[len(start) :])
                conversation, tokens = _fit(conversation, tokens, prefix, max_length, origin, report)
                fitting.append((conversation, origin, tokens))
            except RecordError as error:
                report.skip(Skip(error.kind, origin, error.detail))
        parts, room = list[list[tuple[Conversation, str, Encoded]]](), 0
        for each in fitting:
            if not parts or len(each[2].ids) > room:
                parts.append([])
                room = max_length - prefix
            parts[-1].append(each)
            room -= len(each[2].ids)
        for number, part in enumerate(parts, start=1):
            conversations, origins, all_tokens = zip(*part, strict=True)
            if number > 1:  # captions of one record share its origin, but an image counts once an origin in training
                origins = tuple(f"{origin}#{number}" for origin in origins)
            yield replace(sample, conversations=conversations, origins=origins), list(all_tokens)


def _encode(conversations: list[list[dict[str, Any]]], processor: Any) -> list[Encoded | RecordError]:
    """All at once; one that cannot be encoded is found by halving."""
    try:
        return [Encoded(*both) for both in processor.encode_batch(conversations, expand_images=False)]
    except ValueError as error:
        if len(conversations) == 1:
            return [RecordError("text cannot be encoded", str(error))]
        half = len(conversations) // 2
        return _encode(conversations[:half], processor) + _encode(conversations[half:], processor)


def _fit(
    conversation: Conversation, tokens: Encoded, prefix: int, max_length: int, origin: str, report: Report
) -> tuple[Conversation, Encoded]:
    """Raises RecordError if nothing that can be learnt is left. prefix: how many tokens precede the conversation."""
    if any(turn.speech is not None and turn.transcript is None for turn in conversation):
        raise RecordError("speech without a transcript", "run 'clip-phi speech transcribe --data DATA' first")
    if not any(turn.role == "assistant" for turn in conversation):
        kind = "question without an answer" if conversation else "image without a caption"
        raise RecordError(kind, "it can be evaluated on, not trained on")
    # An answer ends where the next token is not supervised.
    pairs = pairwise([*tokens.labels, IGNORE_INDEX])
    ends = [place for place, (label, after) in enumerate(pairs, start=1) if label != IGNORE_INDEX == after]
    if not ends:
        raise RecordError("no supervised token")
    if prefix + len(tokens.ids) <= max_length:
        return conversation, tokens
    fitting = [end for end in ends if prefix + end <= max_length]
    if not fitting:
        detail = f"{prefix + ends[0]} tokens up to the end of the first answer, --max_length {max_length}"
        raise RecordError("longer than max_length", detail)
    cut = fitting[-1]
    answers = [place for place, turn in enumerate(conversation) if turn.role == "assistant"]
    detail = f"{prefix + len(tokens.ids)} tokens, now {prefix + cut}"
    report.repair("longer than max_length, and was cut after an answer", origin, detail)
    return conversation[: answers[len(fitting) - 1] + 1], Encoded(tokens.ids[:cut], tokens.labels[:cut])
