"""The endless, seeded order of samples, and the loader that turns it into packs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ..samples import File, Sample
from ..sources.mixture import Mixture
from ..sources.report import Defect, Report, Skip
from .encode import encode_samples
from .images import load_image
from .index import Index
from .tree import Pack, Tree, build_tree, pack_trees

Item = tuple[Tree, torch.Tensor | None] | Skip


class TreeDataset(Dataset):
    """Sources as trees and pixels, on demand, in a worker; items are asked for as (pass over the source, index).

    An item is a tree and float pixel values (3, height, width) or None, or a Skip if its image cannot be read."""

    def __init__(self, sources: Sequence[Index], processor: Any, branches_per_image: int | None = None):
        """branches_per_image: None for all; otherwise so many, and the next pass takes the next ones."""
        self.sources = sources
        self.processor = processor
        self.branches_per_image = branches_per_image
        self.stops = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self.stops[-1])

    def __getitem__(self, place: tuple[int, int]) -> Item:
        source_pass, index = place
        number = int(np.searchsorted(self.stops, index, side="right"))
        source = self.sources[number]
        index -= int(self.stops[number]) - len(source)
        taken, available = self.branches_per_image, source.num_branches(index)
        branches = None
        if taken is not None and taken < available:
            branches = [(source_pass * taken + step) % available for step in range(taken)]
        return _item(source.tree(index, branches), source.image(index), available, self.processor)


class TreeStream(IterableDataset):
    """Samples as they come, endlessly: for data that is not on disk. There is no position to come back to.

    Items are those of TreeDataset, and what is wrong with records comes among them as Skips, since a worker's report
    would stay in the worker."""

    def __init__(self, read: Callable[[Report], Iterator[Sample]], processor: Any, max_length: int):
        self.read = read
        self.processor = processor
        self.max_length = max_length

    def __iter__(self) -> Iterator[Item]:
        prefix = [self.processor.image_token_id] * self.processor.num_image_tokens
        report = _Messenger()
        for sample in self.read(report):
            for whole, encoded in encode_samples([sample], self.processor, self.max_length, report):
                tree = build_tree(encoded, prefix if whole.image is not None else (), whole.origins[0])
                yield _item(tree, whole.image, len(encoded), self.processor)
            yield from report.messages
            report.messages.clear()


class _Messenger(Report):
    """A report that keeps what it is told, to be passed on."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[Skip] = []

    def skip(self, skip: Skip) -> None:
        self.messages.append(skip)

    def mend(self, kind: str, origin: str, detail: str = "") -> None:
        self.messages.append(Skip(kind, origin, detail, records=0))


def _item(tree: Tree, image: File | bytes | None, num_branches: int, processor: Any) -> Item:
    if image is None:
        return tree, None
    try:
        pixels = load_image(image)
    except Defect as defect:
        return Skip(defect.kind, tree.origin, defect.detail, num_branches)
    return tree, processor.image_processor(pixels, return_tensors="pt")["pixel_values"][0]


@dataclass
class Collator:
    """Items to a Pack."""

    pad_token_id: int

    def __call__(self, items: Sequence[Item]) -> Pack:
        whole = [item for item in items if not isinstance(item, Skip)]
        pixels = [pixel_values for _, pixel_values in whole if pixel_values is not None]
        pack = pack_trees([tree for tree, _ in whole], torch.stack(pixels) if pixels else None, self.pad_token_id)
        pack.skipped.extend(item for item in items if isinstance(item, Skip))
        return pack


@dataclass
class EndlessSampler(Sampler):
    """Micro-batches of (pass, index) for one rank, in the order of a Mixture.

    The stream has no seams: a step takes the next samples, across the end of an epoch if need be, so every batch is
    full and a position in training is one integer, the step."""

    mixture: Mixture
    batch_size: int
    gradient_accumulation_steps: int
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
        for step in range(self.first_step, self.num_steps):
            for micro_batch in range(self.gradient_accumulation_steps):
                turn = micro_batch * self.world_size + self.rank
                start = step * self.global_batch_size + turn * self.batch_size
                yield [self.mixture.place(position) for position in range(start, start + self.batch_size)]


def make_loader(
    dataset: TreeDataset | TreeStream, batches: Any, processor: Any, num_workers: int, pin_memory: bool = False
) -> DataLoader:
    """batches: an EndlessSampler or any list of lists of (pass, index); for a TreeStream the size of a batch."""
    how = {"batch_size": batches} if isinstance(dataset, TreeStream) else {"batch_sampler": batches}
    return DataLoader(
        dataset,
        collate_fn=Collator(processor.tokenizer.pad_token_id),
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        **how,
    )
