"""Which samples make up which micro-batch: an endless, seeded order, planned ahead from token lengths."""

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler


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
        return self.places(epoch, place, place + 1)[0]

    def places(self, epoch: int, start: int, stop: int) -> list[tuple[int, int]]:
        """place() of the positions from start to stop of an epoch."""
        return [(source_pass, index) for source_pass, index in self._places_of(epoch)[start:stop].tolist()]

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


def assign_packs(lengths: np.ndarray, budget: int) -> np.ndarray:
    """The pack of each sample, by best fit decreasing, in all rows at once. A sample longer than budget is alone.

    lengths: int (rows, samples), tokens; 0 is no sample. Returns int (rows, samples), the packs of a row from 0 on.
    Source: Johnson et al. 1974, "Worst-case performance bounds for simple one-dimensional packing algorithms"."""
    rows, most, packs = np.arange(len(lengths)), 0, np.zeros_like(lengths)
    left = np.full_like(lengths, budget)
    for samples in np.argsort(-lengths, axis=1, kind="stable").T:
        needed = lengths[rows, samples].clip(max=budget)
        room = left[:, : most + 1]  # of the packs of a row, and of an empty one
        packs[rows, samples] = chosen = np.where(room < needed[:, None], budget + 1, room).argmin(axis=1)
        left[rows, chosen] -= needed
        most = max(most, int(chosen.max()) + 1)
    return packs


def samples_of_packs(lengths: np.ndarray, packs: np.ndarray) -> list[np.ndarray]:
    """The numbers of the samples of each pack of a row, the longest first."""
    order = np.lexsort((-lengths, packs))
    return np.split(order, np.cumsum(np.bincount(packs))[:-1])


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
    """As many samples as fit into budget tokens, planned from their lengths, block by block.

    lengths: int (samples,), tokens of each. window: samples that are packed together, in the order of the mixture,
        which so stays mixed. Then their packs are shuffled, because the first ones have the long samples."""

    mixture: Mixture
    lengths: np.ndarray
    budget: int
    window: int = 2000
    block: int = 64  # windows that are planned at once: a step waits for 0.2 s

    def batch(self, number: int) -> list[tuple[int, int]]:
        while self._starts[-1] <= number:
            self._start(len(self._starts))
        window = bisect.bisect_right(self._starts, number) - 1
        return self._plan(window)[number - self._starts[window]]

    def count(self, num_train_epochs: float) -> int:
        part, whole = math.modf(num_train_epochs)
        start = self._start(int(whole) * self._windows)
        return start + math.ceil(part * (self._start(int(whole + 1) * self._windows) - start)) if part else start

    @property
    def fill(self) -> float:
        """Share of the budget that is used in the first epoch."""
        return float(self.lengths[self.mixture._places_of(0)[:, 1]].sum() / (self.count(1) * self.budget))

    def __post_init__(self) -> None:
        self._starts = [0]  # of each window of each epoch, the number of packs before it
        self._windows = -(-self.mixture.length // self.window)
        self._packs_of = lru_cache(maxsize=2)(self._assign)
        self._plan = lru_cache(maxsize=1)(self._make_plan)

    def _start(self, window: int) -> int:
        while len(self._starts) <= window:
            counts = self._packs_of(*divmod(len(self._starts) - 1, self._windows))[1].max(axis=1) + 1
            self._starts += (self._starts[-1] + np.cumsum(counts)).tolist()
        return self._starts[window]

    def _assign(self, epoch: int, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Lengths and packs (windows, window) of the block of an epoch from this window on; its last one may be cut."""
        indices = self.mixture._places_of(epoch)[first * self.window : (first + self.block) * self.window, 1]
        lengths = np.pad(self.lengths[indices], (0, -len(indices) % self.window)).reshape(-1, self.window)
        return lengths, assign_packs(lengths, self.budget)

    def _make_plan(self, number: int) -> list[list[tuple[int, int]]]:
        epoch, window = divmod(number, self._windows)
        start = window * self.window
        places = self.mixture.places(epoch, start, start + self.window)
        row = window % self.block
        lengths, packs = (each[row, : len(places)] for each in self._packs_of(epoch, window - row))
        samples = samples_of_packs(lengths, packs)
        order = np.random.default_rng((self.mixture.seed, epoch, start)).permutation(len(samples))
        return [[places[sample] for sample in samples[pack]] for pack in order]


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

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.first_step, self.num_steps):
            yield from self.of_step(step)

    def of_step(self, step: int) -> Iterator[list[tuple[int, int]]]:
        """step: from 0."""
        for micro_step in range(self.gradient_accumulation_steps):
            number = (step * self.gradient_accumulation_steps + micro_step) * self.world_size + self.rank
            yield self.batches.batch(number)
