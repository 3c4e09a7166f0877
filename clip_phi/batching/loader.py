"""The endless, seeded order of samples, and the loader that turns it into packs."""

import bisect
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ..samples import File, Sample
from ..sources.mixture import Mixture
from ..sources.report import Defect, Report, Skip
from .encode import encode_samples
from .features import FeatureCache, image_key
from .images import PixelMode, Preprocessor
from .index import Index
from .packing import plan_packs
from .tree import Pack, Tree, build_tree, pack_trees

GRACE_SECONDS = 5
REFRESH_SECONDS = 30  # between looks at what others have put into the cache


class Picture(NamedTuple):
    """An image for the model. tensor: float32 pixel values (3, height, width), or with a FeatureCache that has them,
    bfloat16 features (patches, vision hidden). key: of the cache, if there is one."""

    tensor: torch.Tensor
    key: bytes | None = None


Item = tuple[Tree, Picture | None] | Skip


class PictureReader:
    """Images as Pictures, in a worker. Raises Defect if one cannot be read."""

    def __init__(self, processor: Any, pixels: PixelMode = "exact", cache: FeatureCache | None = None):
        self.preprocess = Preprocessor(processor.image_processor, pixels)
        self.cache = cache
        self._refreshed = time.monotonic()

    def __call__(self, image: File | bytes) -> Picture:
        if self.cache is None:
            return Picture(self.preprocess(image))
        key = image_key(image)
        if key not in self.cache and time.monotonic() - self._refreshed > REFRESH_SECONDS:
            self.cache.refresh()  # the training process writes, in this run too
            self._refreshed = time.monotonic()
        features = torch.empty((1, *self.cache.shape), dtype=torch.bfloat16)
        if self.cache.get_into([key], features)[0]:
            return Picture(features[0], key)
        return Picture(self.preprocess(image), key)


class TreeDataset(Dataset):
    """Sources as trees and pixels, on demand, in a worker; items are asked for as (pass over the source, index).

    An item is a tree and its Picture or None, or a Skip if its image cannot be read."""

    def __init__(self, sources: Sequence[Index], read: PictureReader, branches_per_image: int | None = None):
        """branches_per_image: None for all; otherwise so many, and the next pass takes the next ones."""
        self.sources = sources
        self.read = read
        self.branches_per_image = branches_per_image
        self.stops = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self.stops[-1])

    def lengths(self) -> np.ndarray:
        """int64 (samples,): tokens of each tree; with fewer branches than there are, of the longest that can be."""
        return np.concatenate([source.tree_lengths(self.branches_per_image) for source in self.sources])

    def __getitem__(self, place: tuple[int, int]) -> Item:
        source_pass, index = place
        source, index = self._find(index)
        taken, available = self.branches_per_image, source.num_branches(index)
        branches = None
        if taken is not None and taken < available:
            branches = [(source_pass * taken + step) % available for step in range(taken)]
        return _item(source.tree(index, branches), source.image(index), available, self.read)

    def origin(self, index: int) -> str:
        """Where a sample comes from, and its image."""
        source, index = self._find(index)
        image = source.image(index)
        return source.tree(index).origin + (f" ({image})" if isinstance(image, File) else "")

    def _find(self, index: int) -> tuple[Index, int]:
        number = int(np.searchsorted(self.stops, index, side="right"))
        return self.sources[number], index - (int(self.stops[number]) - len(self.sources[number]))


class TreeStream(IterableDataset):
    """Samples as they come, endlessly: for data that is not on disk. There is no position to come back to.

    Items are those of TreeDataset, and what is wrong with records comes among them as Skips, since a worker's report
    would stay in the worker."""

    def __init__(
        self, samples: Callable[[Report], Iterator[Sample]], read: PictureReader, processor: Any, max_length: int
    ):
        self.samples = samples
        self.read = read
        self.processor = processor
        self.max_length = max_length

    def __iter__(self) -> Iterator[Item]:
        prefix = [self.processor.image_token_id] * self.processor.num_image_tokens
        report = _Messenger()
        for sample in self.samples(report):
            for whole, encoded in encode_samples([sample], self.processor, self.max_length, report):
                tree = build_tree(encoded, prefix if whole.image is not None else (), whole.origins[0])
                yield _item(tree, whole.image, len(encoded), self.read)
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


def _item(tree: Tree, image: File | bytes | None, num_branches: int, read: PictureReader) -> Item:
    try:
        return tree, None if image is None else read(image)
    except Defect as defect:
        return Skip(defect.kind, tree.origin, defect.detail, num_branches)


@dataclass
class Collator:
    """Items to a Pack."""

    pad_token_id: int

    def __call__(self, items: Sequence[Item]) -> Pack:
        whole = [item for item in items if not isinstance(item, Skip)]
        pictures = [picture for _, picture in whole if picture is not None]
        pixels = [picture.tensor for picture in pictures if picture.tensor.dim() == 3]
        features = [picture.tensor for picture in pictures if picture.tensor.dim() == 2]
        pack = pack_trees([tree for tree, _ in whole], torch.stack(pixels) if pixels else None, self.pad_token_id)
        if features:
            pack.inputs["vision_features"] = torch.stack(features)
        pack.cached.extend((each.key, each.tensor.dim() == 2) for each in pictures if each.key is not None)
        pack.skipped.extend(item for item in items if isinstance(item, Skip))
        return pack


def complete(pack: Pack, model: Any, cache: FeatureCache | None) -> Pack:
    """A pack with the features of all its images: those that the cache had, and those that the tower makes now, which
    the cache takes. All are rounded to bfloat16, so that a run does not depend on what the cache had.

    Without a cache, or images, the pack itself."""
    if cache is None or not pack.cached:
        return pack
    inputs = dict(pack.inputs)
    had, pixel_values = inputs.pop("vision_features", None), inputs.pop("pixel_values", None)
    device = inputs["input_ids"].device
    features = torch.empty((len(pack.cached), *cache.shape), dtype=torch.bfloat16, device=device)

    def places(wanted: bool) -> torch.Tensor:
        return torch.tensor([place for place, (_, found) in enumerate(pack.cached) if found == wanted], device=device)

    if had is not None:
        features[places(True)] = had
    if pixel_values is not None:
        made = model.get_vision_features(pixel_values).to(torch.bfloat16)
        features[places(False)] = made
        cache.put([key for key, found in pack.cached if not found], made)
    return replace(pack, inputs=inputs | {"vision_features": features}, cached=[])


class Batches(Protocol):
    """The endless stream of micro-batches of all ranks; each is a list of (pass over its source, index)."""

    def batch(self, number: int) -> list[tuple[int, int]]: ...

    def count(self, num_epochs: float) -> int:
        """Micro-batches in so many epochs."""
        ...


@dataclass
class FixedBatches:
    """size samples each, in the order of a mixture; without seams, so that the last of an epoch is full as well."""

    mixture: Mixture
    size: int

    def batch(self, number: int) -> list[tuple[int, int]]:
        return [self.mixture.place(position) for position in range(number * self.size, (number + 1) * self.size)]

    def count(self, num_epochs: float) -> int:
        return -int(-num_epochs * self.mixture.length // self.size)


@dataclass
class PackedBatches:
    """As many samples as fit into budget tokens, planned from their lengths, epoch by epoch.

    lengths: int (samples,), tokens of each. The order of a mixture is packed window by window, so that the mixture
    stays mixed, and the packs of a window are shuffled, since the first hold the long samples."""

    mixture: Mixture
    lengths: np.ndarray
    budget: int
    window: int = 2000

    def batch(self, number: int) -> list[tuple[int, int]]:
        epoch = bisect.bisect_right(self._ends_until(lambda ends: ends[-1] > number), number)
        return self._plan(epoch)[number - (self._ends[epoch - 1] if epoch else 0)]

    def count(self, num_epochs: float) -> int:
        whole = int(num_epochs)
        ends = [0, *self._ends_until(lambda ends: len(ends) > whole)]
        return ends[whole] + math.ceil((num_epochs - whole) * (ends[whole + 1] - ends[whole]))

    @property
    def fill(self) -> float:
        """Share of the budget that is used in the first epoch."""
        plan = self._plan(0)
        return sum(int(self.lengths[index]) for pack in plan for _, index in pack) / (len(plan) * self.budget)

    def __post_init__(self) -> None:
        self._ends: list[int] = []  # of each epoch, the number of packs until its end
        self._planned: tuple[int, list[list[tuple[int, int]]]] = (-1, [])

    def _ends_until(self, enough: Callable[[list[int]], bool]) -> list[int]:
        while not self._ends or not enough(self._ends):
            self._ends.append((self._ends[-1] if self._ends else 0) + len(self._plan(len(self._ends))))
        return self._ends

    def _plan(self, epoch: int) -> list[list[tuple[int, int]]]:
        if self._planned[0] != epoch:
            first, plan = epoch * self.mixture.length, []
            for start in range(0, self.mixture.length, self.window):
                stop = min(start + self.window, self.mixture.length)
                places = [self.mixture.place(first + position) for position in range(start, stop)]
                packs = plan_packs([self.lengths[index] for _, index in places], self.budget)
                order = np.random.default_rng((self.mixture.seed, epoch, start)).permutation(len(packs))
                plan += [[places[sample] for sample in packs[pack]] for pack in order]
            self._planned = (epoch, plan)
        return self._planned[1]


@dataclass
class EndlessSampler(Sampler):
    """The micro-batches of one rank: a step takes the next gradient_accumulation_steps x world_size of the stream, so
    a position in training is one integer, the step, and ranks and accumulation can be traded for one another."""

    batches: Batches
    gradient_accumulation_steps: int
    num_steps: int
    rank: int = 0
    world_size: int = 1
    first_step: int = 0

    def __len__(self) -> int:
        return (self.num_steps - self.first_step) * self.gradient_accumulation_steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.first_step, self.num_steps):
            yield from self.of_step(step)

    def of_step(self, step: int) -> Iterator[list[tuple[int, int]]]:
        """Steps count from 0 here."""
        for turn in range(self.gradient_accumulation_steps):
            number = (step * self.gradient_accumulation_steps + turn) * self.world_size + self.rank
            yield self.batches.batch(number)


def _outlive_the_step(worker: int) -> None:
    """Who stops a run often signals all its processes, and the step that is under way needs its data.

    So a worker ends after SIGTERM, but later: that is how Python itself ends it at exit. It ends without an error, or
    torch would make one of it in the training process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE_SECONDS))


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
        worker_init_fn=_outlive_the_step,
        generator=torch.Generator(),  # or each pass would draw from the one that dropout uses
        persistent_workers=num_workers > 0,
        **how,
    )
