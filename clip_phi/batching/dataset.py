"""Samples to micro-batches: an endless, seeded order, planned ahead from token lengths; the data sets, the collator and
the loader."""

import bisect
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ..data.sample import File, Images, RecordError, Report, Sample, Skip, images_of
from .feature_cache import FeatureCache, image_key
from .images import PixelMode, Preprocessor
from .index import Index
from .packing import PackedBatch, SharedPrefixSample, build_shared_prefix, encode_samples, pack_samples, prefix_ids

GRACE_SECONDS = 5  # that a worker has after SIGTERM
REFRESH_SECONDS = 30  # between looks at what other processes have written to the cache


class Mixture:
    """Maps a position in training to a sample: a pure function of (sizes, weights, seed, position).

    sizes: samples of each source; their sum is the number of positions in an epoch.
    weights: relative share of each source in an epoch. None: as large as they are, so an epoch is one pass over all.
        Else a source continues in the next epoch where it ends in this one: no sample comes again before all are used.
    Raises ValueError if a source is empty or its weight gives it no place in an epoch."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, seed: int):
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.seed = seed
        self.length = int(self.sizes.sum())
        self.offsets = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        shares = self.sizes if weights is None else np.asarray(weights, dtype=np.float64)
        exact = shares / shares.sum() * self.length if self.length else shares * 0.0
        self.counts = np.floor(exact + 1e-9).astype(np.int64)
        for source in np.argsort(self.counts - exact, kind="stable")[: self.length - self.counts.sum()]:
            self.counts[source] += 1  # the largest remainders get what rounding leaves
        if len(sizes) == 0 or (self.counts == 0).any():
            raise ValueError(f"a source has no place in an epoch: {list(sizes)} samples, weights {weights}")
        self._places_of = lru_cache(maxsize=1)(self._make_epoch)

    def place(self, position: int) -> tuple[int, int]:
        """(pass over its source, index into all sources, concatenated) of the sample at this position."""
        epoch, place = divmod(position, self.length)
        source_pass, index = self._places_of(epoch)[place].tolist()
        return source_pass, index

    def _make_epoch(self, epoch: int) -> np.ndarray:
        sources = np.repeat(np.arange(len(self.sizes)), self.counts)
        sources = np.random.default_rng((self.seed, epoch)).permutation(sources)
        places = np.empty((self.length, 2), dtype=np.int64)
        for source, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            passes, turns = np.divmod(np.arange(epoch * count, (epoch + 1) * count), size)
            rngs = (np.random.default_rng((self.seed, each, source, 1)) for each in np.unique(passes))
            indices = np.stack([rng.permutation(size) for rng in rngs])[passes - passes[0], turns]
            places[sources == source] = np.stack([passes, indices + self.offsets[source]], axis=1)
        return places


def plan_packs(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Numbers of samples in packs of at most budget tokens, by best fit decreasing. A longer sample is a pack alone.

    Source: Johnson et al. 1974, "Worst-case performance bounds for simple one-dimensional packing algorithms"."""
    packs: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, pack), ascending
    for sample in sorted(range(len(lengths)), key=lambda sample: -lengths[sample]):
        length = int(lengths[sample])
        place = bisect.bisect_left(free, (length, -1))
        if place < len(free):
            left, pack = free.pop(place)
        else:
            left, pack = budget, len(packs)
            packs.append([])
        packs[pack].append(sample)
        if left > length:
            bisect.insort(free, (left - length, pack))
    return packs


@dataclass
class FixedBatches:
    """size samples each, in the order of a mixture. The last one of an epoch is filled from the next epoch."""

    mixture: Mixture
    size: int

    def batch(self, number: int) -> list[tuple[int, int]]:
        """(pass over its source, index) of each sample of a micro-batch; there are endlessly many."""
        return [self.mixture.place(position) for position in range(number * self.size, (number + 1) * self.size)]

    def count(self, num_train_epochs: float) -> int:
        """Micro-batches of all ranks in so many epochs."""
        return -int(-num_train_epochs * self.mixture.length // self.size)


@dataclass
class PackedBatches:
    """As many samples as fit into budget tokens, planned from their lengths, epoch by epoch.

    lengths: int (samples,), tokens of each. window: samples that are packed together, in the order of the mixture,
        which so stays mixed. Then their packs are shuffled, because the first ones have the long samples."""

    mixture: Mixture
    lengths: np.ndarray
    budget: int
    window: int = 2000

    def batch(self, number: int) -> list[tuple[int, int]]:
        while self._starts[-1] <= number:
            self._plan_next()
        epoch = bisect.bisect_right(self._starts, number) - 1
        return self._plan(epoch)[number - self._starts[epoch]]

    def count(self, num_train_epochs: float) -> int:
        whole = int(num_train_epochs)
        while len(self._starts) < whole + 2:
            self._plan_next()
        start, stop = self._starts[whole : whole + 2]
        return start + math.ceil((num_train_epochs - whole) * (stop - start))

    @property
    def fill(self) -> float:
        """Share of the budget that is used in the first epoch."""
        plan = self._plan(0)
        return sum(int(self.lengths[index]) for pack in plan for _, index in pack) / (len(plan) * self.budget)

    def __post_init__(self) -> None:
        self._starts = [0]  # of each epoch, the number of packs before it
        self._plan = lru_cache(maxsize=1)(self._make_plan)

    def _plan_next(self) -> None:
        self._starts.append(self._starts[-1] + len(self._plan(len(self._starts) - 1)))

    def _make_plan(self, epoch: int) -> list[list[tuple[int, int]]]:
        first, plan = epoch * self.mixture.length, []
        for start in range(0, self.mixture.length, self.window):
            stop = min(start + self.window, self.mixture.length)
            places = [self.mixture.place(first + position) for position in range(start, stop)]
            packs = plan_packs([self.lengths[index] for _, index in places], self.budget)
            order = np.random.default_rng((self.mixture.seed, epoch, start)).permutation(len(packs))
            plan += [[places[sample] for sample in packs[pack]] for pack in order]
        return plan


Batches = FixedBatches | PackedBatches


@dataclass
class EndlessSampler(Sampler):
    """The micro-batches of one rank. A step takes the next gradient_accumulation_steps x world_size of the sequence.

    So a position in training is one integer, the step, and two ranks do the work of two accumulation steps."""

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
        """step: from 0."""
        for micro_step in range(self.gradient_accumulation_steps):
            number = (step * self.gradient_accumulation_steps + micro_step) * self.world_size + self.rank
            yield self.batches.batch(number)


class LoadedImage(NamedTuple):
    """An image for the model, and its key in the FeatureCache, if there is one.

    tensor: float32 pixel values (3, height, width), or bfloat16 features (patches, vision hidden) of the cache."""

    tensor: torch.Tensor
    key: bytes | None = None


Item = tuple[SharedPrefixSample, list[LoadedImage]] | Skip


class ImageReader:
    """Loads images, in a worker. Raises RecordError if one cannot be read."""

    def __init__(self, processor: Any, pixels: PixelMode = "exact", cache: FeatureCache | None = None):
        self.preprocess, self.cache = Preprocessor(processor.image_processor, pixels), cache
        self._refreshed = time.monotonic()

    def __call__(self, image: File | bytes) -> LoadedImage:
        if self.cache is None:
            return LoadedImage(self.preprocess(image))
        key = image_key(image)
        if key not in self.cache and time.monotonic() - self._refreshed > REFRESH_SECONDS:
            self.cache.refresh()  # the training process writes, in this run too
            self._refreshed = time.monotonic()
        features = self.cache.get(key)
        return LoadedImage(self.preprocess(image) if features is None else features, key)

    def load(self, sample: SharedPrefixSample, image: Images | None, num_conversations: int) -> Item:
        """The sample with its images, or a Skip of its conversations if one cannot be read."""
        try:
            return sample, [self(each) for each in images_of(image)]
        except RecordError as error:
            return Skip(error.kind, sample.origin, error.detail, num_conversations)


class SampleDataset(Dataset):
    """Samples of all sources with their images, loaded on demand, in a worker.

    An item is asked for as (pass over the source, index of the sample)."""

    def __init__(self, sources: Sequence[Index], read: ImageReader, conversations_per_image: int | None = None):
        """conversations_per_image: None for all. Otherwise so many, and the next pass takes the next ones."""
        self.sources, self.read, self.conversations_per_image = sources, read, conversations_per_image
        self.stops = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self.stops[-1])

    def lengths(self) -> np.ndarray:
        """int64 (samples,): tokens of each sample; with conversations_per_image, the most that it can have."""
        return np.concatenate([source.packed_lengths(self.conversations_per_image) for source in self.sources])

    def __getitem__(self, place: tuple[int, int]) -> Item:
        source_pass, (source, index) = place[0], self._find(place[1])
        available = source.num_conversations(index)
        taken = min(self.conversations_per_image or available, available)
        conversations = [(source_pass * taken + step) % available for step in range(taken)]
        return self.read.load(source.shared_prefix_sample(index, conversations), source.image(index), available)

    def origin(self, index: int) -> str:
        """Where a sample comes from, and its image."""
        source, index = self._find(index)
        names = [str(image) for image in images_of(source.image(index)) if isinstance(image, File)]
        return source.origins(index)[0] + (f" ({', '.join(names)})" if names else "")

    def _find(self, index: int) -> tuple[Index, int]:
        number = int(np.searchsorted(self.stops, index, side="right"))
        return self.sources[number], index - (int(self.stops[number]) - len(self.sources[number]))


@dataclass
class SampleStream(IterableDataset):
    """Samples in the order of a stream, without end: for data that are not on disk. There is no position to resume at.

    Items are those of SampleDataset. Skipped and repaired records are items too: a report does not leave its worker."""

    samples: Callable[[Report], Iterator[Sample]]
    read: ImageReader
    processor: Any
    max_length: int

    def __iter__(self) -> Iterator[Item]:
        report, skips = Report(), list[Skip]()
        report.skip = skips.append  # type: ignore[method-assign, assignment]  # what it would count is passed on
        for sample in self.samples(report):
            for part, encoded in encode_samples([sample], self.processor, self.max_length, report):
                prefix = prefix_ids(self.processor, len(images_of(part.image)))
                shared = build_shared_prefix(encoded, prefix, part.origins[0])
                yield self.read.load(shared, part.image, len(encoded))
            yield from skips
            skips.clear()


def collate(items: Sequence[Item], pad_token_id: int) -> PackedBatch:
    loaded = [item for item in items if not isinstance(item, Skip)]
    images = [image for _, its_images in loaded for image in its_images]
    features, pixels = ([image.tensor for image in images if image.tensor.dim() == dim] for dim in (2, 3))
    batch = pack_samples([sample for sample, _ in loaded], torch.stack(pixels) if pixels else None, pad_token_id)
    if features:
        batch.inputs["vision_features"] = torch.stack(features)
    batch.cached.extend((image.key, image.tensor.dim() == 2) for image in images if image.key is not None)
    batch.skipped.extend(item for item in items if isinstance(item, Skip))
    return batch


def add_image_features(batch: PackedBatch, model: Any, cache: FeatureCache | None) -> PackedBatch:
    """A batch with the features of all its images: the cached ones, and those that the tower computes now, for the
    cache too. All are rounded to bfloat16, so that a run does not depend on what was cached."""
    if cache is None or not batch.cached:
        return batch
    inputs = dict(batch.inputs)
    cached, pixel_values = inputs.pop("vision_features", None), inputs.pop("pixel_values", None)
    device = inputs["input_ids"].device
    features = torch.empty((len(batch.cached), *cache.shape), dtype=torch.bfloat16, device=device)
    is_cached = np.array([found for _, found in batch.cached])
    if cached is not None:
        features[torch.tensor(np.flatnonzero(is_cached), device=device)] = cached
    if pixel_values is not None:
        computed = model.base_model.get_vision_features(pixel_values).to(torch.bfloat16)
        features[torch.tensor(np.flatnonzero(~is_cached), device=device)] = computed
        cache.put([key for key, found in batch.cached if not found], computed)
    return replace(batch, inputs=inputs | {"vision_features": features}, cached=[])


def _outlive_the_step(worker: int) -> None:
    """A signal that stops a run often goes to all its processes, but the step in progress needs its data: a worker ends
    some seconds after SIGTERM, as which Python's own exit comes too, and without an error that torch would raise."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE_SECONDS))


def make_loader(
    dataset: SampleDataset | SampleStream, batches: Any, processor: Any, num_workers: int, pin_memory: bool = False
) -> DataLoader:
    """batches: an EndlessSampler or any list of lists of (pass, index); for a SampleStream the size of a batch."""
    how: dict[str, Any] = {"batch_size" if isinstance(dataset, SampleStream) else "batch_sampler": batches}
    how |= {"num_workers": num_workers, "pin_memory": pin_memory, "persistent_workers": num_workers > 0}
    how["collate_fn"] = partial(collate, pad_token_id=processor.tokenizer.pad_token_id)
    how["generator"] = torch.Generator()  # else each pass would draw from the generator that dropout uses
    return DataLoader(dataset, worker_init_fn=_outlive_the_step, **how)
