"""Trees: the image once, then its branches, each of which sees the image and itself only.

Five captions of one image share its features: 107 tokens instead of 308 for the same loss and the same gradients.
Positions restart after the prefix, so that a branch stands where it would stand alone; the mask keeps it alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ..sources.report import Skip
from .encode import IGNORE_INDEX, Encoded


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


def build_tree(branches: Sequence[Encoded], prefix: Sequence[int], origin: str) -> Tree:
    """One tree of encoded branches. prefix: the image tokens before each of them, or nothing.

    A branch's last token (the end token) is a target but no input: nothing follows it."""
    input_ids, position_ids, branch_ids = list(prefix), list(range(len(prefix))), [0] * len(prefix)
    kept: list[int] = []
    targets: list[int] = []
    for number, (ids, labels) in enumerate(branches, start=1):
        offset = len(input_ids)
        for index, label in enumerate(labels):
            if label != IGNORE_INDEX:
                assert index > 0 or prefix, "nothing stands before the first token to predict it"
                kept.append(offset + index - 1 if index > 0 else len(prefix) - 1)
                targets.append(label)
        inside = ids[:-1]
        input_ids += inside
        position_ids += range(len(prefix), len(prefix) + len(inside))
        branch_ids += [number] * len(inside)
    return Tree(input_ids, position_ids, branch_ids, kept, targets, origin)


@dataclass(frozen=True)
class Pack:
    """What the model eats. inputs: keyword arguments of ClipPhiForCausalLM.forward.

    num_supervised: tokens that are learnt from. num_branches: captions or conversations. origins: of the samples.
    skipped: samples that would have been here if their image could be read."""

    inputs: dict[str, torch.Tensor]
    num_supervised: int
    num_branches: int
    origins: list[str]
    skipped: list[Skip] = field(default_factory=list)

    def to(self, device: torch.device) -> "Pack":
        inputs = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        return replace(self, inputs=inputs)

    def pin_memory(self) -> "Pack":
        inputs = {name: value.pin_memory() for name, value in self.inputs.items()}
        return replace(self, inputs=inputs)


def pack_trees(
    trees: Sequence[Tree], pixel_values: torch.Tensor | None, pad_token_id: int, multiple_of: int = 8
) -> Pack:
    """Trees as rows of one batch, padded on the right to a multiple of multiple_of tokens.

    pixel_values: float (images, 3, height, width), in the order of those trees that have an image, or None.
    Where every tree has one branch the rows are plain sequences: padding on the right is invisible to a causal model,
    so no mask is made and the fast kernels stay in use. No tree at all is one row of padding, with a loss of 0: every
    process of a step must have something to run."""
    num_rows = max(len(trees), 1)
    length = -(-max([len(tree.input_ids) for tree in trees], default=1) // multiple_of) * multiple_of
    num_kept = max([len(tree.kept) for tree in trees], default=1)
    input_ids = torch.full((num_rows, length), pad_token_id)
    logits_to_keep = torch.zeros((num_rows, num_kept), dtype=torch.long)
    shift_labels = torch.full((num_rows, num_kept), IGNORE_INDEX)
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
