"""The order in which several sources are trained on."""

from collections.abc import Sequence

import numpy as np


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
        self._epoch = -1
        self._places = np.empty((0, 2), dtype=np.int64)

    def place(self, position: int) -> tuple[int, int]:
        """(pass over its source, index into all sources, concatenated) of the sample at this position."""
        epoch, place = divmod(position, self.length)
        if epoch != self._epoch:
            self._epoch, self._places = epoch, self._make_epoch(epoch)
        source_pass, index = self._places[place].tolist()
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
