"""Samples to token ids, and these to packs, in which conversations about one image share its tokens.

What is too long is cut or skipped; what has no answer to learn is skipped. Five captions of one image share its
features: 107 tokens instead of 308, with the same loss and gradients. Positions restart after the prefix, and attention
is masked, so that each conversation is computed as if it were alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map_only

from modeling_clip_phi.configuration_clip_phi import IGNORE_INDEX

from ..data.sample import Conversation, RecordError, Report, Sample, Skip, as_messages, images_of
from .attention import make_pack_layout


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


@dataclass(frozen=True)
class SharedPrefixSample:
    """A Sample as token ids. The first three lists have an entry for each token, the next two for each supervised one.

    conversation_ids: 0 in the prefix, 1, 2, ... in the conversations.
    logits_to_keep: positions whose next token is supervised. The end of the prefix is there once for each
        conversation whose first token is. shift_labels: those next tokens."""

    input_ids: list[int]
    position_ids: list[int]
    conversation_ids: list[int]
    logits_to_keep: list[int]
    shift_labels: list[int]
    origin: str


def build_shared_prefix(conversations: Sequence[Encoded], prefix: Sequence[int], origin: str) -> SharedPrefixSample:
    """Concatenate conversations after their prefix. prefix: the token ids (BOS, image) before each of them, or none.

    The last token of a conversation (the end token) is a label but no input: nothing follows it."""
    input_ids, position_ids, conversation_ids = list(prefix), list(range(len(prefix))), [0] * len(prefix)
    logits_to_keep, shift_labels = [], []
    for number, (ids, labels) in enumerate(conversations, start=1):
        offset = len(input_ids)
        for index, label in enumerate(labels):
            if label != IGNORE_INDEX:
                assert index > 0 or prefix, "no token precedes the first one, to predict it from"
                logits_to_keep.append(offset + index - 1 if index > 0 else len(prefix) - 1)
                shift_labels.append(label)
        input_ids += ids[:-1]
        position_ids += range(len(prefix), len(prefix) + len(ids) - 1)
        conversation_ids += [number] * (len(ids) - 1)
    return SharedPrefixSample(input_ids, position_ids, conversation_ids, logits_to_keep, shift_labels, origin)


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch.

    inputs: keyword arguments of ClipPhiForCausalLM.forward, whose decoder must use PACKED_ATTENTION.
    num_supervised: tokens. num_conversations: captions or conversations. origins: of the samples.
    skipped: samples that are left out because their image cannot be read.
    cached: with a FeatureCache, the key of each image, and whether the batch has its features."""

    inputs: dict[str, Any]
    num_supervised: int
    num_conversations: int
    origins: list[str]
    skipped: list[Skip] = field(default_factory=list)
    cached: list[tuple[bytes, bool]] = field(default_factory=list)

    def to(self, device: torch.device) -> "PackedBatch":
        move = partial(torch.Tensor.to, device=device, non_blocking=True)
        return replace(self, inputs=tree_map_only(torch.Tensor, move, self.inputs))

    def pin_memory(self) -> "PackedBatch":
        return replace(self, inputs=tree_map_only(torch.Tensor, torch.Tensor.pin_memory, self.inputs))


def pack_samples(
    samples: Sequence[SharedPrefixSample], pixel_values: torch.Tensor | None, pad_token_id: int
) -> PackedBatch:
    """Concatenate samples into one sequence, padded to a multiple of 8 tokens.

    pixel_values: float (images, 3, height, width), in the order of the samples that have an image, or None.
    Without samples the sequence is padding, with a loss of 0: every process of a step must have something to run."""
    length = sum(len(sample.input_ids) for sample in samples)
    padding = -length % 8 or (0 if samples else 8)
    lists: dict[str, list[int]] = {"input_ids": [], "position_ids": [], "logits_to_keep": [], "shift_labels": []}
    for sample in samples:
        lists["logits_to_keep"] += [len(lists["input_ids"]) + place for place in sample.logits_to_keep]
        for name in ("input_ids", "position_ids", "shift_labels"):
            lists[name] += getattr(sample, name)
    num_supervised = len(lists["shift_labels"])
    lists["input_ids"] += [pad_token_id] * padding
    lists["position_ids"] += range(padding)
    if not num_supervised:
        lists |= {"logits_to_keep": [0], "shift_labels": [IGNORE_INDEX]}
    conversation_ids = [sample.conversation_ids for sample in samples] + ([[1] * padding] if padding else [])
    inputs: dict[str, Any] = {name: torch.tensor([values]) for name, values in lists.items()}
    inputs |= {"pack_layout": make_pack_layout(conversation_ids)}
    inputs |= {} if pixel_values is None else {"pixel_values": pixel_values}
    num_conversations = sum(len(set(sample.conversation_ids) - {0}) for sample in samples)
    return PackedBatch(inputs, num_supervised, num_conversations, [sample.origin for sample in samples])
