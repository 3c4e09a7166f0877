"""The endless, seeded order of samples, and the loader that turns it into packs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..samples import Sample
from .images import load_image
from .tree import Pack, build_tree, pack_trees


class TreeDataset(Dataset):
    """Samples as trees and pixels, on demand, in a worker; items are asked for as (epoch, index)."""

    def __init__(
        self, samples: Sequence[Sample], processor: Any, max_length: int, branches_per_image: int | None = None
    ):
        """branches_per_image: None for all; otherwise so many, and the next epoch takes the next ones."""
        self.samples = samples
        self.processor = processor
        self.max_length = max_length
        self.branches_per_image = branches_per_image

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: tuple[int, int]) -> tuple[Any, torch.Tensor | None]:
        epoch, index = place
        sample = self.samples[index]
        taken, available = self.branches_per_image, len(sample.branches)
        if taken is not None and taken < available:
            turns = [(epoch * taken + step) % available for step in range(taken)]
            sample = replace(sample, branches=tuple(sample.branches[turn] for turn in turns))
        tree = build_tree(sample, self.processor, self.max_length)
        if sample.image is None:
            return tree, None
        try:
            image = load_image(sample.image)
        except ValueError as error:
            raise ValueError(f"{sample.origin}: {error}") from error
        return tree, self.processor.image_processor(image, return_tensors="pt")["pixel_values"][0]

    def collate(self, items: Sequence[tuple[Any, torch.Tensor | None]]) -> Pack:
        pixels = [pixel_values for _, pixel_values in items if pixel_values is not None]
        pad_token_id = self.processor.tokenizer.pad_token_id
        return pack_trees([tree for tree, _ in items], torch.stack(pixels) if pixels else None, pad_token_id)


@dataclass
class EndlessSampler(Sampler):
    """Micro-batches of (epoch, index) for one rank: every epoch is a permutation made from (seed, epoch).

    The stream has no seams: a step takes the next samples, across the end of an epoch if need be, so every batch is
    full and a position in training is one integer, the step."""

    num_samples: int
    batch_size: int
    gradient_accumulation_steps: int
    seed: int
    num_steps: int
    rank: int = 0
    world_size: int = 1
    first_step: int = 0

    @property
    def global_batch_size(self) -> int:
        """Samples in one step over all ranks."""
        return self.batch_size * self.gradient_accumulation_steps * self.world_size

    def __len__(self) -> int:
        return (self.num_steps - self.first_step) * self.gradient_accumulation_steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.first_step, self.num_steps):
            for micro_batch in range(self.gradient_accumulation_steps):
                turn = micro_batch * self.world_size + self.rank
                start = step * self.global_batch_size + turn * self.batch_size
                places = []
                for position in range(start, start + self.batch_size):
                    if position // self.num_samples != epoch:
                        epoch = position // self.num_samples
                        order = np.random.default_rng((self.seed, epoch)).permutation(self.num_samples)
                    places.append((epoch, int(order[position % self.num_samples])))
                yield places


def make_loader(dataset: TreeDataset, batches: Any, num_workers: int, pin_memory: bool = False) -> DataLoader:
    """batches: an EndlessSampler, or any list of lists of (epoch, index)."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=dataset.collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
    )
