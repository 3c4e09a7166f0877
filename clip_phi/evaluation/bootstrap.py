"""Confidence intervals of differences, by a paired bootstrap over images."""

from collections.abc import Iterable
from typing import Any

import numpy as np

RESAMPLES = 2000
CHUNK = 250  # resamples in memory at once


def by_group(scores: np.ndarray, groups: Iterable[Any], weights: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Sums (groups, columns) of scores (samples, columns), and sums (groups,) of their weights, by default 1 each.

    groups: the group of each sample, such as the digest of its image. They come in the order of their first samples."""
    numbers: dict[Any, int] = {}
    places = [numbers.setdefault(group, len(numbers)) for group in groups]
    sums = np.zeros((len(numbers), scores.shape[1]))
    np.add.at(sums, places, scores)
    return sums, np.bincount(places, weights=weights).astype(np.float64)


def margin_interval(sums: np.ndarray, counts: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a mean's margin over the best of other means, by the percentile bootstrap (Efron 1979).

    sums: float (groups, 1 + others), of the score and of what it is compared with; counts: (groups,), their samples, or
    of each (groups, 1 + others). Whole groups are resampled, since questions about one image are not independent. The
    best of the others is chosen in each resample. The same seed gives the same interval."""
    rng = np.random.default_rng(seed)
    number = len(counts)
    found = []
    for _ in range(RESAMPLES // CHUNK):
        weights = np.stack([np.bincount(row, minlength=number) for row in rng.integers(0, number, (CHUNK, number))])
        means = (weights @ sums) / np.maximum(weights @ counts.reshape(number, -1), 1)
        found.append(means[:, 0] - means[:, 1:].max(axis=1))
    low, high = np.percentile(np.concatenate(found), [2.5, 97.5])
    return float(low), float(high)
