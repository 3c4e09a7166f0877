"""Numbered features for the tests of the feature cache, also for processes that those tests start and kill."""

import numpy as np
import torch

from clip_phi.batching.feature_cache import FeatureCache, image_key

FINGERPRINT = "0123456789abcdef" * 2
SHAPE = (3, 5)


def key_of(number: int) -> bytes:
    return image_key(str(number).encode())


def features_of(numbers, shape=SHAPE) -> torch.Tensor:
    """Features that depend on the number alone: bfloat16 (numbers, *shape), any bits, NaN and infinity among them."""
    size = shape[0] * shape[1]
    bits = [np.random.default_rng(number).integers(-(2**15), 2**15, size, dtype=np.int16) for number in numbers]
    return torch.from_numpy(np.stack(bits)).view(torch.bfloat16).view(len(bits), *shape)


def put(cache: FeatureCache, *numbers: int) -> None:
    cache.put([key_of(number) for number in numbers], features_of(numbers, cache.shape))
