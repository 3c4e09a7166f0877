"""Trees: the image once, then its branches, each of which sees the image and itself only.

Five captions of one image share its features: 107 tokens instead of 308 for the same loss and the same gradients.
Positions restart after the prefix, so that a branch stands where it would stand alone; the mask keeps it alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..samples import Sample, as_messages

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Tree:
    """A Sample as token ids; all lists are int and tokens long, but for the last two, which are supervised long.

    branch_ids: 0 in the prefix, 1, 2, ... in the branches. kept: the positions whose next token is supervised; the end
    of the prefix is kept once for each branch that begins there. targets: those next tokens."""

    input_ids: list[int]
    position_ids: list[int]
    branch_ids: list[int]
    kept: list[int]
    targets: list[int]
    origin: str


def build_tree(sample: Sample, processor: Any, max_length: int) -> Tree:
    """Render a Sample with the processor's template into one tree.

    A branch's last token (the end token) is a target but no input: nothing follows it.
    Raises ValueError, with the sample's origin, if a branch is longer than max_length tokens with its image, or
    supervises nothing."""
    prefix = [processor.image_token_id] * processor.num_image_tokens if sample.image is not None else []
    input_ids, position_ids, branch_ids = list(prefix), list(range(len(prefix))), [0] * len(prefix)
    kept: list[int] = []
    targets: list[int] = []
    for number, branch in enumerate(sample.branches, start=1):
        try:
            ids, labels = processor.encode(as_messages(branch, has_image=sample.image is not None))
        except ValueError as error:
            raise ValueError(f"{sample.origin}: {error}") from error
        if len(ids) > max_length:
            raise ValueError(f"{sample.origin}: {len(ids)} tokens are more than --max_length {max_length}")
        if all(label == IGNORE_INDEX for label in labels):
            raise ValueError(f"{sample.origin}: branch {number} has no answer to learn from")
        assert ids[: len(prefix)] == prefix, "the template must put the image first"
        # Index in the tree of the branch's own token i, for tokens behind the prefix.
        offset = len(input_ids) - len(prefix)
        for index, label in enumerate(labels):
            if label != IGNORE_INDEX:
                assert index > 0, "nothing stands before the first token to predict it"
                before = index - 1
                kept.append(before if before < len(prefix) else before + offset)
                targets.append(label)
        inside = ids[len(prefix) : -1]
        input_ids += inside
        position_ids += range(len(prefix), len(prefix) + len(inside))
        branch_ids += [number] * len(inside)
    return Tree(input_ids, position_ids, branch_ids, kept, targets, sample.origin)


@dataclass(frozen=True)
class Pack:
    """What the model eats. inputs: keyword arguments of ClipPhiForCausalLM.forward.

    num_supervised: tokens that are learnt from. num_branches: captions or conversations. origins: of the samples."""

    inputs: dict[str, torch.Tensor]
    num_supervised: int
    num_branches: int
    origins: list[str]

    def to(self, device: torch.device) -> "Pack":
        inputs = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        return Pack(inputs, self.num_supervised, self.num_branches, self.origins)

    def pin_memory(self) -> "Pack":
        inputs = {name: value.pin_memory() for name, value in self.inputs.items()}
        return Pack(inputs, self.num_supervised, self.num_branches, self.origins)


def pack_trees(
    trees: Sequence[Tree], pixel_values: torch.Tensor | None, pad_token_id: int, multiple_of: int = 8
) -> Pack:
    """Trees as rows of one batch, padded on the right to a multiple of multiple_of tokens.

    pixel_values: float (images, 3, height, width), in the order of those trees that have an image, or None.
    Where every tree has one branch the rows are plain sequences: padding on the right is invisible to a causal model,
    so no mask is made and the fast kernels stay in use."""
    length = -(-max(len(tree.input_ids) for tree in trees) // multiple_of) * multiple_of
    num_kept = max(len(tree.kept) for tree in trees)
    input_ids = torch.full((len(trees), length), pad_token_id)
    logits_to_keep = torch.zeros((len(trees), num_kept), dtype=torch.long)
    shift_labels = torch.full((len(trees), num_kept), IGNORE_INDEX)
    for row, tree in enumerate(trees):
        input_ids[row, : len(tree.input_ids)] = torch.tensor(tree.input_ids)
        logits_to_keep[row, : len(tree.kept)] = torch.tensor(tree.kept)
        shift_labels[row, : len(tree.targets)] = torch.tensor(tree.targets)
    inputs = {"input_ids": input_ids, "logits_to_keep": logits_to_keep, "shift_labels": shift_labels}
    if any(tree.branch_ids and tree.branch_ids[-1] > 1 for tree in trees):
        position_ids = torch.zeros((len(trees), length), dtype=torch.long)
        branch_ids = torch.full((len(trees), length), -1)
        for row, tree in enumerate(trees):
            position_ids[row, : len(tree.position_ids)] = torch.tensor(tree.position_ids)
            branch_ids[row, : len(tree.branch_ids)] = torch.tensor(tree.branch_ids)
        query, key = branch_ids.unsqueeze(2), branch_ids.unsqueeze(1)
        sees = ((key == 0) | (key == query)).tril()  # padding is a branch of its own, so no row is left blind
        inputs |= {"position_ids": position_ids, "attention_mask": sees.unsqueeze(1)}
    if pixel_values is not None:
        inputs["pixel_values"] = pixel_values
    return Pack(
        inputs,
        num_supervised=sum(len(tree.targets) for tree in trees),
        num_branches=sum(len(set(tree.branch_ids) - {0}) for tree in trees),
        origins=[tree.origin for tree in trees],
    )
