"""Samples to token ids, and what to do with those that are too long or teach nothing."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ..data.report import RecordError, Report, Skip
from ..data.sample import Conversation, Sample, as_messages

IGNORE_INDEX = -100


class Encoded(NamedTuple):
    """A branch behind the image: its token ids, and its labels, -100 where nothing is supervised."""

    ids: list[int]
    labels: list[int]


def encode_samples(
    samples: Sequence[Sample], processor: Any, max_length: int, report: Report
) -> Iterator[tuple[Sample, list[Encoded]]]:
    """Each Sample with its branches as token ids. What does not come back is counted in the report.

    A branch longer than max_length tokens, image included, is cut behind the last answer that fits. If not even the
    first fits, it is skipped. A sample whose tree would be longer is split into several, each with the image."""
    flat = [(sample, number) for sample in samples for number in range(len(sample.conversations))]
    messages = [as_messages(sample.conversations[number], sample.image is not None) for sample, number in flat]
    rows = iter(_encode(messages, processor))
    for sample in samples:
        prefix = processor.num_image_tokens if sample.image is not None else 0
        kept: list[tuple[Conversation, str, Encoded]] = []
        for conversation, origin in zip(sample.conversations, sample.origins, strict=True):
            try:
                conversation, tokens = _fit(conversation, next(rows), max_length, origin, report)
            except RecordError as defect:
                report.skip(Skip(defect.kind, origin, defect.detail))
            else:
                assert processor.image_token_id not in tokens.ids[prefix:], "the template must put the image first"
                kept.append((conversation, origin, Encoded(tokens.ids[prefix:], tokens.labels[prefix:])))
        part = 0
        while kept:
            part += 1
            length, count = prefix, 0
            while count < len(kept) and (count == 0 or length + len(kept[count][2].ids) <= max_length):
                length += len(kept[count][2].ids)
                count += 1
            conversations, origins, tokens_of_all = zip(*kept[:count], strict=True)
            if part > 1:  # captions of one row share its origin, but an image is counted once an origin in training
                origins = tuple(f"{origin}#{part}" for origin in origins)
            yield replace(sample, conversations=conversations, origins=origins), list(tokens_of_all)
            del kept[:count]


def _encode(conversations: list[list[dict[str, Any]]], processor: Any) -> list[Encoded | RecordError]:
    """All at once; where one of them cannot be encoded, it is found by halving."""
    try:
        return [Encoded(*both) for both in processor.encode_batch(conversations)]
    except ValueError as error:
        if len(conversations) == 1:
            return [RecordError("text cannot be encoded", str(error))]
        half = len(conversations) // 2
        return _encode(conversations[:half], processor) + _encode(conversations[half:], processor)


def _fit(
    conversation: Conversation, tokens: Encoded | RecordError, max_length: int, origin: str, report: Report
) -> tuple[Conversation, Encoded]:
    """Raises RecordError if nothing that can be learnt is left."""
    if isinstance(tokens, RecordError):
        raise tokens
    if any(turn.speech is not None and turn.transcript is None for turn in conversation):
        raise RecordError("speech without a transcript", "run 'clip-phi speech transcribe --data DATA' first")
    labels = tokens.labels
    ends = [place + 1 for place in range(len(labels)) if labels[place] != IGNORE_INDEX]
    if not ends:
        raise RecordError("no supervised token")
    if len(tokens.ids) <= max_length:
        return conversation, tokens
    # An answer ends where the next token is not supervised.
    ends = [end for end in ends if end == len(labels) or labels[end] == IGNORE_INDEX]
    fitting = [end for end in ends if end <= max_length]
    if not fitting:
        raise RecordError(
            "longer than max_length", f"{ends[0]} tokens up to the end of the first answer, --max_length {max_length}"
        )
    cut = fitting[-1]
    answers = [place for place, turn in enumerate(conversation) if turn.role == "assistant"]
    report.repair("longer than max_length, and was cut behind an answer", origin, f"{len(labels)} tokens, now {cut}")
    return conversation[: answers[len(fitting) - 1] + 1], Encoded(tokens.ids[:cut], labels[:cut])
