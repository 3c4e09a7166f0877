"""Samples to micro-batches: the data sets, the collator and the loader."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..data.report import RecordError, Report, Skip
from ..data.sample import File, Images, Sample, images_of
from .encode import encode_samples, prefix_ids
from .feature_cache import FeatureCache, image_key
from .images import PixelMode, Preprocessor
from .index import Index
from .packing import PackedBatch, SharedPrefixSample, build_shared_prefix, pack_samples

GRACE_SECONDS = 5
REFRESH_SECONDS = 30  # between looks at what other processes have written to the cache


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
                yield self.read.load(build_shared_prefix(encoded, prefix, part.origins[0]), part.image, len(encoded))
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
