"""What is trained on, and what is held out: sources, their mixture, and the report of what was wrong with them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..batching.dataset import ImageReader, SampleDataset, SampleStream
from ..batching.index import Index, load_index
from ..batching.sampler import Batches, FixedBatches, PackedBatches
from ..data.mixture import Mixture
from ..data.report import RecordError, Report, Skip
from ..data.sample import Sample
from ..data.source import DataSource, parse_source
from .arguments import TrainingArguments

STREAM_WARM_UP = 1000  # records of a stream before its share of bad ones means anything


@dataclass
class Data:
    """batches: None for a stream. held_out: validation sets by name. report: of what is trained on; what turns out
    bad in training goes there, too. fingerprint: of the samples and their weights."""

    train: SampleDataset | SampleStream
    batches: Batches | None
    held_out: dict[str, Index]
    report: Report
    max_bad_fraction: float
    fingerprint: str

    def awaited(self, order: Any, step: int) -> str:
        """What this process needs for a step, counted from 1; order: the EndlessSampler, or of a stream anything."""
        if isinstance(self.train, SampleStream):
            return f"step {step} waits for the stream"
        places = [index for pack in order.of_step(step - 1) for _, index in pack]
        named = ", ".join(self.train.origin(index) for index in places[:4])
        return f"step {step} needs {named}{f' and {len(places) - 4} more' if len(places) > 4 else ''}"

    def count(self, num_conversations: int, skips: list[Skip]) -> None:
        """One step met so many records that are whole, and these that are not.

        Raises ValueError if more of all records are bad than --max_bad_fraction allows."""
        self.report.skip_once(skips)
        if self.batches is None:
            self.report.records += num_conversations + sum(skip.records for skip in skips)
        if skips and (self.batches is not None or self.report.records > STREAM_WARM_UP):
            self.report.refuse_bad(self.max_bad_fraction)


def read_data(
    arguments: TrainingArguments,
    processor: Any,
    read: ImageReader,
    rank: int,
    world_size: int,
    say: Callable[[str], Any],
) -> Data:
    """Read --data and --eval_data, or hold some images of --data out.

    Images are not opened, but for the few that are evaluated on. Raises ValueError if too many records are bad or
    nothing is left, and the errors of the readers."""
    sources = [parse_source(text) for text in arguments.data]
    held_out = {
        source.name: load_index(source, processor, arguments.max_length, arguments.dataloader_num_workers)
        for source in map(parse_source, arguments.eval_data)
    }
    report = Report()
    if any(source.streaming for source in sources):
        samples = partial(_stream, sources[0], arguments.seed, rank, world_size)
        train: SampleDataset | SampleStream = SampleStream(samples, read, processor, arguments.max_length)
        batches: Batches | None = None
        fingerprint = "stream"
        say(f"{sources[0].path} is streamed: what is wrong with it is counted as it comes")
    else:
        indexes = [
            load_index(source, processor, arguments.max_length, arguments.dataloader_num_workers) for source in sources
        ]
        for source, index in zip(sources, indexes, strict=True):
            say(describe(source.name, index))
            report.add(index.report)
        report.refuse_bad(arguments.max_bad_fraction)
        if not held_out:
            indexes, held_out["held_out"] = hold_out(indexes, arguments.holdout_images)
            say(f"{len(held_out['held_out']):,} images are held out of training")
        empty = [source.name for source, index in zip(sources, indexes, strict=True) if not len(index)]
        if empty:
            raise ValueError(f"no sample to train on in {', '.join(empty)} (of {report.records:,} records)")
        train = SampleDataset(indexes, read, arguments.conversations_per_image)
        weights = [source.weight for source in sources if source.weight is not None]
        fingerprint = " ".join([*(index.fingerprint() for index in indexes), *map(str, weights)])
        mixture = Mixture([len(index) for index in indexes], weights or None, arguments.seed)
        if arguments.max_tokens_per_batch:
            batches = PackedBatches(mixture, train.lengths(), arguments.max_tokens_per_batch)
            budget, fill = arguments.max_tokens_per_batch, batches.fill
            say(f"{batches.count(1):,} packs of {budget:,} tokens an epoch, {fill:.1%} full")
        else:
            batches = FixedBatches(mixture, arguments.per_device_train_batch_size)
    for name, index in held_out.items():
        held_out[name] = _readable(index, read, arguments, name)
        say(describe(name, held_out[name]))
    return Data(train, batches, held_out, report, arguments.max_bad_fraction, fingerprint)


def describe(name: str, index: Index) -> str:
    """A line on what was read, and one for each kind of what was wrong with it."""
    report = index.report
    text = f"{name}: {len(index):,} samples of {report.records:,} records, {report.num_skipped:,} records skipped"
    return "\n".join(filter(None, [text, report.table()]))


def hold_out(indexes: list[Index], num_images: int) -> tuple[list[Index], Index]:
    """The last samples of each source, in proportion, num_images in all, and the sources without these images.

    An image in several sources is held out of all of them."""
    total = sum(len(index) for index in indexes)
    names = [index.image_names() for index in indexes]
    stops = np.cumsum([len(index) for index in indexes])
    shares = np.diff(np.round(stops / max(total, 1) * min(num_images, total)).astype(int), prepend=0)
    firsts = [len(index) - share for index, share in zip(indexes, shares, strict=True)]
    gone = {name for each, first in zip(names, firsts, strict=True) for name in each[first:] if name is not None}
    kept = [
        index.take(np.array([row for row in range(first) if each[row] not in gone], dtype=np.int64))
        for index, each, first in zip(indexes, names, firsts, strict=True)
    ]
    parts = [index.take(np.arange(first, len(index))) for index, first in zip(indexes, firsts, strict=True)]
    return kept, Index.concatenate(parts)


def _readable(index: Index, read: ImageReader, arguments: TrainingArguments, name: str) -> Index:
    """The first --max_eval_images samples, without those whose image cannot be read."""
    index = index.take(np.arange(min(len(index), arguments.max_eval_images)))
    good = []
    report = Report()
    report.add(index.report)
    for number in range(len(index)):
        image = index.image(number)
        try:
            if image is not None:
                read(image)
            good.append(number)
        except RecordError as defect:
            origin = index.sample(number).origins[0]
            report.skip(Skip(defect.kind, origin, defect.detail, index.num_conversations(number)))
    report.refuse_bad(arguments.max_bad_fraction)
    if not good:
        raise ValueError(f"nothing to evaluate on: no sample of {name} can be used\n{report.table()}")
    checked = index.take(np.array(good))
    checked.report = report
    return checked


def _stream(source: DataSource, seed: int, rank: int, world_size: int, report: Report) -> Iterator[Sample]:
    from ..data.hf_dataset import stream_table

    samples = stream_table(
        source.path,
        source.media(),
        report,
        rank=rank,
        world_size=world_size,
        seed=seed,
        **source.table_options(),
    )
    return source.transcripts().fill(samples, report)
