"""Training and held-out data: sources, their mixture, the order of the samples, and the report of damaged records."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from ..batching.dataset import ImageReader, SampleDataset, SampleStream, make_loader
from ..batching.index import Index, count_text, independent_turns_hint, load_index
from ..batching.sampler import Batches, EndlessSampler, FixedBatches, Mixture, PackedBatches
from ..data.report import Report, Skip
from ..data.sample import Sample
from ..data.source import DataSource, parse_source
from .arguments import TrainingArguments

STREAM_WARM_UP = 1000  # records of a stream before its share of bad ones means anything


@dataclass
class TrainData:
    """What a run trains and evaluates on.

    train: the samples. sampler: the order of this rank's micro-batches; None for a stream. num_steps: of the run.
    steps_per_epoch: None for a stream. held_out: validation sets by name. report: of the training data, before and
    during training. fingerprint: of the samples and their weights."""

    train: SampleDataset | SampleStream
    sampler: EndlessSampler | None
    num_steps: int
    steps_per_epoch: float | None
    held_out: dict[str, Index]
    report: Report
    max_bad_fraction: float
    fingerprint: str

    @property
    def longest(self) -> int:
        """Tokens of the longest sample; 0 for a stream."""
        return 0 if isinstance(self.train, SampleStream) else int(self.train.lengths().max())

    def needs(self, step: int) -> str:
        """The samples that this process needs for a step, counted from 1."""
        if isinstance(self.train, SampleStream) or self.sampler is None:
            return f"step {step} needs the next records of the stream"
        places = [index for pack in self.sampler.of_step(step - 1) for _, index in pack]
        named = ", ".join(self.train.origin(index) for index in places[:4])
        return f"step {step} needs {named}{f' and {len(places) - 4} more' if len(places) > 4 else ''}"

    def loader(self, first_step: int, arguments: TrainingArguments, processor: Any, device: torch.device) -> DataLoader:
        """The micro-batches of this rank after a step, in order."""
        if self.sampler is not None:
            self.sampler.first_step = first_step
        order = arguments.per_device_train_batch_size if self.sampler is None else self.sampler
        return make_loader(self.train, order, processor, arguments.dataloader_num_workers, device.type == "cuda")

    def count(self, num_conversations: int, skips: list[Skip]) -> None:
        """Add a step's whole records, and those it skipped, to the report.

        Raises ValueError if more of all records are bad than --max_bad_fraction allows."""
        self.report.skip_once(skips)
        if self.sampler is None:
            self.report.records += num_conversations + sum(skip.records for skip in skips)
        if skips and (self.sampler is not None or self.report.records > STREAM_WARM_UP):
            self.report.refuse_bad(self.max_bad_fraction)

    def state_dict(self) -> dict[str, Any]:
        return {**self.report.as_dict(), "seen": sorted(self.report.seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.report = replace(Report.from_dict(state), seen=set(state["seen"]))


def read_data(arguments: TrainingArguments, processor: Any, read: ImageReader, accelerator: Accelerator) -> TrainData:
    """Read --data and --eval_data, or hold some images of --data out.

    Images are not opened, but for the few that are evaluated on. Raises ValueError if too many records are bad or
    nothing is left, and the errors of the readers."""
    rank, world_size, max_bad = accelerator.process_index, accelerator.num_processes, arguments.max_bad_fraction
    sources = [parse_source(text) for text in arguments.data]
    how = (processor, arguments.max_length, arguments.dataloader_num_workers)
    held_out = {source.name: load_index(source, *how) for source in map(parse_source, arguments.eval_data)}
    report, sampler, steps_per_epoch, num_steps = Report(), None, None, arguments.max_steps
    if any(source.streaming for source in sources):
        samples = partial(_stream, sources[0], arguments.seed, rank, world_size)
        train: SampleDataset | SampleStream = SampleStream(samples, read, processor, arguments.max_length)
        fingerprint = "stream"
        accelerator.print(f"{sources[0].path} is streamed: damaged records are counted during training")
    else:
        indexes = [load_index(source, *how) for source in sources]
        for source, index in zip(sources, indexes, strict=True):
            accelerator.print(describe(source.name, index))
            if hint := independent_turns_hint(index):
                accelerator.print(hint)
            report.add(index.report)
        report.refuse_bad(max_bad)
        if not held_out:
            total = sum(map(len, indexes))
            indexes, held_out["held_out"] = hold_out(indexes, holdout_size(arguments, total))
            number = len(held_out["held_out"])
            accelerator.print(f"{number:,} of {total:,} images are held out of training: see --holdout_images")
        if empty := [source.name for source, index in zip(sources, indexes, strict=True) if not len(index)]:
            raise ValueError(f"no sample to train on in {', '.join(empty)} (of {report.records:,} records)")
        train = SampleDataset(indexes, read, arguments.conversations_per_image)
        weights = [source.weight for source in sources if source.weight is not None]
        fingerprint = " ".join([*(index.fingerprint() for index in indexes), *map(str, weights)])
        mixture = Mixture([len(index) for index in indexes], weights or None, arguments.seed)
        batches: Batches = FixedBatches(mixture, arguments.per_device_train_batch_size)
        if budget := int(arguments.max_tokens_per_batch):  # a number by now: see fit_batches
            batches = packed = PackedBatches(mixture, train.lengths(), budget)
            accelerator.print(f"{packed.count(1):,} packs of {budget:,} tokens an epoch, {packed.fill:.1%} full")
        batches_per_step = arguments.gradient_accumulation_steps * world_size
        steps_per_epoch = batches.count(1) / batches_per_step
        num_steps = arguments.max_steps or max(1, -(-batches.count(arguments.num_train_epochs) // batches_per_step))
        sampler = EndlessSampler(batches, arguments.gradient_accumulation_steps, num_steps, rank, world_size)
    for name, index in held_out.items():
        held_out[name] = _readable(index, read, arguments, name)
        accelerator.print(describe(name, held_out[name]))
    return TrainData(train, sampler, num_steps, steps_per_epoch, held_out, report, max_bad, fingerprint)


def describe(name: str, index: Index) -> str:
    """A line with the numbers of images, captions and conversations, and one for each kind of damage."""
    report = index.report
    text = f"{name}: {count_text(*index.count())}, {report.num_skipped:,} records skipped"
    return "\n".join(filter(None, [text, report.table()]))


def holdout_size(arguments: TrainingArguments, total: int) -> int:
    """How many of so many images are held out: as many as the option says; its default is at most a tenth."""
    most = total if "holdout_images" in arguments.given else max(1, total // 10)
    return min(arguments.holdout_images, most)


def hold_out(indexes: list[Index], num_images: int) -> tuple[list[Index], Index]:
    """The last samples of each source, in proportion, num_images in all, and the sources without these images.

    indexes: whole ones, not views. An image in several sources is held out of all of them."""
    assert all(index.selected is None for index in indexes), "a view's table has other samples too"
    stops = np.cumsum([len(index) for index in indexes])
    shares = np.diff(np.round(stops / max(stops[-1], 1) * min(num_images, stops[-1])).astype(int), prepend=0)
    parts = [(index, len(index) - share) for index, share in zip(indexes, shares, strict=True)]
    held_out = Index.concatenate([replace(index, table=index.table.slice(first)) for index, first in parts])
    gone, kept = held_out.image_files()[1], []
    for index, first in parts:
        owners, files = index.image_files()
        shared = owners[pc.is_in(files, value_set=gone, skip_nulls=True).to_numpy()]
        kept.append(index.take(np.setdiff1d(np.arange(first), shared)))
    return kept, held_out


def _readable(index: Index, read: ImageReader, arguments: TrainingArguments, name: str) -> Index:
    """The first --max_eval_images samples, without those whose image cannot be read."""
    index = index.take(np.arange(min(len(index), arguments.max_eval_images)))
    good, report, samples = [], Report(), SampleDataset([index], read)
    report.add(index.report)
    for number in range(len(index)):
        if isinstance(item := samples[0, number], Skip):
            report.skip(item)
        else:
            good.append(number)
    report.refuse_bad(arguments.max_bad_fraction)
    if not good:
        raise ValueError(f"nothing to evaluate on: no sample of {name} can be used\n{report.table()}")
    return replace(index.take(np.array(good)), report=report)


def _stream(source: DataSource, seed: int, rank: int, world_size: int, report: Report) -> Iterator[Sample]:
    from ..data.hf_dataset import stream_table

    options = source.table_options()
    samples = stream_table(source.path, source.media(), report, source.layout, rank, world_size, seed, **options)
    return source.transcripts().fill(samples, report)
