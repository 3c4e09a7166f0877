"""The endless, seeded order of samples, and the loader that turns it into packs."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..data.report import RecordError, Report, Skip
from ..data.sample import File, Sample
from .encode import encode_samples
from .feature_cache import FeatureCache, image_key
from .images import PixelMode, Preprocessor
from .index import Index
from .packing import PackedBatch, SharedPrefixSample, build_shared_prefix, pack_samples

GRACE_SECONDS = 5
REFRESH_SECONDS = 30  # between looks at what others have put into the cache


class LoadedImage(NamedTuple):
    """An image for the model. tensor: float32 pixel values (3, height, width), or with a FeatureCache that has them,
    bfloat16 features (patches, vision hidden). key: of the cache, if there is one."""

    tensor: torch.Tensor
    key: bytes | None = None


Item = tuple[SharedPrefixSample, LoadedImage | None] | Skip


class ImageReader:
    """Images as Pictures, in a worker. Raises RecordError if one cannot be read."""

    def __init__(self, processor: Any, pixels: PixelMode = "exact", cache: FeatureCache | None = None):
        self.preprocess = Preprocessor(processor.image_processor, pixels)
        self.cache = cache
        self._refreshed = time.monotonic()

    def __call__(self, image: File | bytes) -> LoadedImage:
        if self.cache is None:
            return LoadedImage(self.preprocess(image))
        key = image_key(image)
        if key not in self.cache and time.monotonic() - self._refreshed > REFRESH_SECONDS:
            self.cache.refresh()  # the training process writes, in this run too
            self._refreshed = time.monotonic()
        features = torch.empty((1, *self.cache.shape), dtype=torch.bfloat16)
        if self.cache.get_into([key], features)[0]:
            return LoadedImage(features[0], key)
        return LoadedImage(self.preprocess(image), key)


class SampleDataset(Dataset):
    """Sources as trees and pixels, on demand, in a worker; items are asked for as (pass over the source, index).

    An item is a tree and its Picture or None, or a Skip if its image cannot be read."""

    def __init__(self, sources: Sequence[Index], read: ImageReader, conversations_per_image: int | None = None):
        """branches_per_image: None for all; otherwise so many, and the next pass takes the next ones."""
        self.sources = sources
        self.read = read
        self.conversations_per_image = conversations_per_image
        self.stops = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self.stops[-1])

    def lengths(self) -> np.ndarray:
        """int64 (samples,): tokens of each tree; with fewer branches than there are, of the longest that can be."""
        return np.concatenate([source.packed_lengths(self.conversations_per_image) for source in self.sources])

    def __getitem__(self, place: tuple[int, int]) -> Item:
        source_pass, index = place
        source, index = self._find(index)
        taken, available = self.conversations_per_image, source.num_conversations(index)
        conversations = None
        if taken is not None and taken < available:
            conversations = [(source_pass * taken + step) % available for step in range(taken)]
        return _item(source.tree(index, conversations), source.image(index), available, self.read)

    def origin(self, index: int) -> str:
        """Where a sample comes from, and its image."""
        source, index = self._find(index)
        image = source.image(index)
        return source.tree(index).origin + (f" ({image})" if isinstance(image, File) else "")

    def _find(self, index: int) -> tuple[Index, int]:
        number = int(np.searchsorted(self.stops, index, side="right"))
        return self.sources[number], index - (int(self.stops[number]) - len(self.sources[number]))


class SampleStream(IterableDataset):
    """Samples as they come, endlessly: for data that is not on disk. There is no position to come back to.

    Items are those of SampleDataset, and what is wrong with records comes among them as Skips, since a worker's report
    would stay in the worker."""

    def __init__(
        self, samples: Callable[[Report], Iterator[Sample]], read: ImageReader, processor: Any, max_length: int
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
                tree = build_shared_prefix(encoded, prefix if whole.image is not None else (), whole.origins[0])
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

    def repair(self, kind: str, origin: str, detail: str = "") -> None:
        self.messages.append(Skip(kind, origin, detail, records=0))


def _item(tree: SharedPrefixSample, image: File | bytes | None, num_conversations: int, read: ImageReader) -> Item:
    try:
        return tree, None if image is None else read(image)
    except RecordError as defect:
        return Skip(defect.kind, tree.origin, defect.detail, num_conversations)


@dataclass
class Collator:
    """Items to a Pack."""

    pad_token_id: int

    def __call__(self, items: Sequence[Item]) -> PackedBatch:
        whole = [item for item in items if not isinstance(item, Skip)]
        pictures = [picture for _, picture in whole if picture is not None]
        pixels = [picture.tensor for picture in pictures if picture.tensor.dim() == 3]
        features = [picture.tensor for picture in pictures if picture.tensor.dim() == 2]
        pack = pack_samples([tree for tree, _ in whole], torch.stack(pixels) if pixels else None, self.pad_token_id)
        if features:
            pack.inputs["vision_features"] = torch.stack(features)
        pack.cached.extend((each.key, each.tensor.dim() == 2) for each in pictures if each.key is not None)
        pack.skipped.extend(item for item in items if isinstance(item, Skip))
        return pack


def add_image_features(pack: PackedBatch, model: Any, cache: FeatureCache | None) -> PackedBatch:
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


def _outlive_the_step(worker: int) -> None:
    """Who stops a run often signals all its processes, and the step that is under way needs its data.

    So a worker ends after SIGTERM, but later: that is how Python itself ends it at exit. It ends without an error, or
    torch would make one of it in the training process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE_SECONDS))


def make_loader(
    dataset: SampleDataset | SampleStream, batches: Any, processor: Any, num_workers: int, pin_memory: bool = False
) -> DataLoader:
    """batches: an EndlessSampler or any list of lists of (pass, index); for a SampleStream the size of a batch."""
    how = {"batch_size": batches} if isinstance(dataset, SampleStream) else {"batch_sampler": batches}
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
