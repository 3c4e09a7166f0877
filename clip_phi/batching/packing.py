"""Trees: the image once, then its branches, each of which sees the image and itself only.

Five captions of one image share its features: 107 tokens instead of 308 for the same loss and the same gradients.
Positions restart after the prefix, so that a branch stands where it would stand alone; the mask keeps it alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..data.report import Skip
from .attention import PackLayout, make_pack_layout
from .encode import IGNORE_INDEX, Encoded


@dataclass(frozen=True)
class SharedPrefixSample:
    """A Sample as token ids; all lists are int and tokens long, but for the last two, which are supervised long.

    conversation_ids: 0 in the prefix, 1, 2, ... in the rest. kept: the positions whose next token is supervised; the
    end of the prefix is kept once for each branch that begins there. targets: those next tokens."""

    input_ids: list[int]
    position_ids: list[int]
    conversation_ids: list[int]
    kept: list[int]
    targets: list[int]
    origin: str


def build_shared_prefix(conversations: Sequence[Encoded], prefix: Sequence[int], origin: str) -> SharedPrefixSample:
    """One tree of encoded branches. prefix: the image tokens before each of them, or nothing.

    A branch's last token (the end token) is a target but no input: nothing follows it."""
    input_ids, position_ids, conversation_ids = list(prefix), list(range(len(prefix))), [0] * len(prefix)
    kept: list[int] = []
    targets: list[int] = []
    for number, (ids, labels) in enumerate(conversations, start=1):
        offset = len(input_ids)
        for index, label in enumerate(labels):
            if label != IGNORE_INDEX:
                assert index > 0 or prefix, "nothing stands before the first token to predict it"
                kept.append(offset + index - 1 if index > 0 else len(prefix) - 1)
                targets.append(label)
        inside = ids[:-1]
        input_ids += inside
        position_ids += range(len(prefix), len(prefix) + len(inside))
        conversation_ids += [number] * len(inside)
    return SharedPrefixSample(input_ids, position_ids, conversation_ids, kept, targets, origin)


@dataclass(frozen=True)
class PackedBatch:
    """What the model eats. inputs: keyword arguments of ClipPhiForCausalLM.forward, whose decoder must use
    PACKED_ATTENTION.

    num_supervised: tokens that are learnt from. num_conversations: captions or conversations. origins: of the samples.
    skipped: samples that would have been here if their image could be read. cached: with a FeatureCache, the key of
    each image, and whether its features came with the pack."""

    inputs: dict[str, Any]
    num_supervised: int
    num_conversations: int
    origins: list[str]
    skipped: list[Skip] = field(default_factory=list)
    cached: list[tuple[bytes, bool]] = field(default_factory=list)

    def to(self, device: torch.device) -> "PackedBatch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "PackedBatch":
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "PackedBatch":
        inputs = {
            name: value.map(function) if isinstance(value, PackLayout) else function(value)
            for name, value in self.inputs.items()
        }
        return replace(self, inputs=inputs)


def pack_samples(
    trees: Sequence[SharedPrefixSample], pixel_values: torch.Tensor | None, pad_token_id: int, multiple_of: int = 8
) -> PackedBatch:
    """Trees one behind the other in one row, filled up with padding to a multiple of multiple_of tokens.

    pixel_values: float (images, 3, height, width), in the order of those trees that have an image, or None. No tree at
    all is a row of padding, with a loss of 0: every process of a step must have something to run."""
    length = sum(len(tree.input_ids) for tree in trees)
    padding = -length % multiple_of or (0 if trees else multiple_of)
    input_ids = [token for tree in trees for token in tree.input_ids] + [pad_token_id] * padding
    position_ids = [position for tree in trees for position in tree.position_ids] + list(range(padding))
    kept: list[int] = []
    start = 0
    for tree in trees:
        kept += [start + position for position in tree.kept]
        start += len(tree.input_ids)
    targets = [target for tree in trees for target in tree.targets]
    conversation_ids = [tree.conversation_ids for tree in trees] + ([[1] * padding] if padding else [])
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([input_ids]),
        "position_ids": torch.tensor([position_ids]),
        "logits_to_keep": torch.tensor([kept or [0]]),
        "shift_labels": torch.tensor([targets or [IGNORE_INDEX]]),
        "pack_layout": make_pack_layout(conversation_ids),
    }
    if pixel_values is not None:
        inputs["pixel_values"] = pixel_values
    return PackedBatch(
        inputs,
        num_supervised=len(targets),
        num_conversations=sum(len(set(tree.conversation_ids) - {0}) for tree in trees),
        origins=[tree.origin for tree in trees],
    )
