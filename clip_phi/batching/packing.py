"""Conversations about one image share its tokens; samples are packed into one sequence.

Five captions of one image share its features: 107 tokens instead of 308, with the same loss and gradients. Positions
restart after the prefix, and attention is masked, so that each conversation is computed as if it were alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from modeling_clip_phi.configuration_clip_phi import IGNORE_INDEX

from ..data.report import Skip
from .attention import make_pack_layout
from .encode import Encoded


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
