"""clip-phi inspect: the tokens that the model gets from a data set, and the errors in the data."""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import groupby, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm
from transformers import AutoConfig

from modeling_clip_phi import ClipPhiConfig, ClipPhiProcessor
from modeling_clip_phi.configuration_clip_phi import IGNORE_INDEX

from ..batching.attention import context_length
from ..batching.images import load_beside, pixel_hash
from ..batching.index import Index, count_text, independent_turns_hint, load_index
from ..data.report import NUM_EXAMPLES, RecordError, Report, Skip, plain
from ..data.sample import File, Images, images_of
from ..data.source import parse_files, parse_source
from ..hub.retry import load_with_retries
from ..templates import render
from ..templates.sheet import draw_images, save_png

DEMO_BACKBONES = Path(__file__).resolve().parents[2] / "examples" / "demo_backbones"
CHUNK, WINDOW = 16, 256  # images: sent to a process at once; in memory for each process, perhaps as bytes
ALIKE = 7  # most of 64 bits in which two copies of an image differ; two synthetic scenes differ in 12 or more
SUFFIXES = (".json", ".html", ".png")  # of --output
NUM_BINS, SHEET = 10, 24  # at most, in the histogram and in a png
THUMBNAIL = 256  # pixels


def inspect(options: argparse.Namespace) -> None:
    """Run clip-phi inspect.

    options: those of its command line; model: folder or Hub id of the tokenizer's model, or None for the backbones of
    the project. Raises ValueError or OSError if the data cannot be read at all; errors in a record are shown."""
    for path in options.output:
        if not path.endswith(SUFFIXES):
            raise ValueError(f"--output {path}: a file's name ends in {', '.join(SUFFIXES)}")
        if not Path(path).absolute().parent.is_dir():
            raise ValueError(f"no folder for {path}")
    sources, held_out = parse_files(options.data), parse_files(options.eval_data)
    processor, name, context = find_processor(options.model)
    max_length = min(options.max_length, context or options.max_length)
    if max_length < options.max_length:
        print(f"--max_length is cut to the decoder's context, {max_length}, as it is in training", file=sys.stderr)
    indexes = [load_index(source, processor, max_length) for source in sources]
    whole = Index.concatenate(indexes)
    if options.sample >= max(len(whole), 1):
        raise ValueError(f"--sample {options.sample}: there are {len(whole):,} samples, from 0 on")
    summary, rows = None, list[list[str]]()
    if options.summary or options.json or held_out or any(path.endswith(".json") for path in options.output):
        others = [load_index(source, processor, max_length) for source in held_out]
        about = {"data": options.data, "val": options.eval_data, "processor": name, "max_length": max_length}
        summary = about | summarise(options.data, indexes, others, options.num_workers)
        rows = table(summary)
        lines = [_line(f"{label:<20} {value}").rstrip() for label, value in rows]
        print(json.dumps(summary) if options.json else "\n".join(lines))
    for path in options.output:
        samples = show(whole, processor, options.sample, options.num)
        if path.endswith(".json"):
            Path(path).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        elif path.endswith(".html"):
            title = _line(" ".join(options.data))
            with open(path, "w", encoding="utf-8") as file:
                file.writelines(render("inspection.html", title=title, rows=rows, samples=samples, line=_line, zip=zip))
        else:
            draw(path, whole, list(islice(samples, SHEET)))
    if summary is None and not options.output:
        colored = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        for sample in show(whole, processor, options.sample, options.num):
            print(format_sample(sample, colored))
    if not (len(whole) if summary is None else summary["samples"]):
        report = whole.report if summary is None else Report.from_dict(summary)
        if summary is None:
            print(report.table())
        raise ValueError(f"no sample can be used, of {report.records:,} records:\n{report.table()}")


def find_processor(model: str | None) -> tuple[Any, str, int | None]:
    """The processor, its name, and the decoder's context length if it is known. Prints the name on stderr.

    model: a folder or Hub id, or None for the project's backbones. Raises ValueError or OSError if it cannot load."""
    if model is None and not DEMO_BACKBONES.is_dir():
        raise ValueError(f"there is no model here, and no {DEMO_BACKBONES}: name a tokenizer with --model")
    name = model or str(DEMO_BACKBONES / "text")
    if model is None:
        processor = ClipPhiProcessor.from_backbones(str(DEMO_BACKBONES / "vision"), name)
    else:
        try:
            processor = load_with_retries(ClipPhiProcessor.from_pretrained, name)
        except (ValueError, OSError) as error:
            raise OSError(f"--model {name} is no Clip-Phi processor: {error}") from error
    print(f"tokenizer: {name} (--model chooses another)", file=sys.stderr)
    if Path(name).is_dir() and not Path(name, "config.json").exists():  # a processor without a model
        return processor, name, None
    kind: Any = AutoConfig if model is None else ClipPhiConfig
    return processor, name, context_length(load_with_retries(kind.from_pretrained, name))


def show(index: Index, processor: Any, first: int, number: int) -> Iterator[dict[str, Any]]:
    """The samples from `first` on, `number` of them, as the model gets them, for the templates.

    image_line: the image's name and size, or the error in it. image: a thumbnail, or None. conversations: as texts of
    neighbouring tokens that are all supervised, or all not, and whether they are."""
    for row in range(first, min(first + number, len(index))):
        source, encoded = index.image(row), index.encoded(row)
        image, line, prefix = None, "no image", index.prefix(row)
        if source is not None:
            names = (str(each) if isinstance(each, File) else f"{len(each):,} bytes" for each in images_of(source))
            try:
                image = load_beside(source)
                line = f"{' + '.join(names)}, {image.width} x {image.height} pixels"
                image.thumbnail((THUMBNAIL, THUMBNAIL))
            except RecordError as error:
                line = f"{error} (training skips this sample)"
        ignored = [IGNORE_INDEX] * len(prefix)
        conversations = [_pieces(prefix + ids, ignored + labels, processor) for ids, labels in encoded]
        tokens = len(prefix) + sum(len(ids) for ids, _ in encoded)
        supervised = sum(label != IGNORE_INDEX for _, labels in encoded for label in labels)
        counts = f"{tokens:,} tokens, {supervised:,} of them supervised ({supervised / tokens:.1%})"
        about = {"title": f"sample {row:,} of {len(index):,}", "counts": counts, "image_line": line, "image": image}
        yield about | {"origins": index.sample(row).origins, "conversations": conversations}


def _pieces(ids: list[int], labels: list[int], processor: Any) -> list[tuple[str, bool]]:
    """Decoded from the beginning each time, since some tokenizers drop the space before a first word."""
    pieces, stop, before = [], 0, ""
    kinds = zip(np.equal(ids, processor.image_token_id), np.not_equal(labels, IGNORE_INDEX), strict=True)
    for (is_image, supervised), run in groupby(kinds):
        length = len(list(run))
        stop += length
        text = processor.tokenizer.decode(ids[:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        piece = f"{processor.image_token}×{length}" if is_image else plain(text.removeprefix(before))
        pieces.append((piece.replace("\n", "⏎\n"), bool(supervised)))
        before = text
    return pieces


def format_sample(sample: dict[str, Any], colored: bool) -> str:
    """A sample for the terminal, with supervised tokens in bold green, or between brackets."""
    marks = ("\033[1;32m", "\033[0m") if colored else ("⟦", "⟧")
    return "".join(render("sample.txt", sample=sample, marks=marks, line=_line, zip=zip))


def _line(text: str) -> str:
    return plain(text).replace("\n", "⏎")


class ImageCheck(NamedTuple):
    """An opened image: hash of its pixels, and perceptual hash; or else kind and detail of the error."""

    pixels: str = ""
    look: int = 0
    kind: str = ""
    detail: str = ""


def summarise(
    texts: Sequence[str], indexes: Sequence[Index], held_out: Sequence[Index], num_workers: int
) -> dict[str, Any]:
    """For json: what training would use of all indexes together. Opens and decodes every image.

    texts: names of the indexes. held_out: validation data, whose images are searched for in the indexes.
    records is always conversations + the sum of skipped. An image counts once, in however many samples it is."""
    names, images, numbers = _find_images([*indexes, *held_out])
    checks = list(tqdm(check_images(images, num_workers), total=len(names), unit="image", dynamic_ncols=True))
    report, sources, hints = Report(), [], list[str]()
    measures, used_images = [np.zeros((0, 4), np.int64)], [np.zeros(0, np.int64)]
    for text, index, its_images in zip(texts, indexes, numbers, strict=False):
        found, measured = Report(), measure(index)
        found.add(index.report)
        used = np.ones(len(index), bool)
        for row, number in enumerate(its_images):
            if number >= 0 and not checks[number].pixels:
                used[row], (_, _, kind, detail) = False, checks[number]
                found.skip(Skip(kind, index.origins(row)[0], detail, int(measured[row, 0])))
        measures.append(measured[used])
        used_images.append(its_images[used & (its_images >= 0)])
        counts = {"samples": int(used.sum()), "images": len(np.unique(used_images[-1]))}
        counts |= {"conversations": int(measures[-1][:, 0].sum()), "records": found.records}
        counts |= {"captions": captions} if (captions := int(index.num_captions()[used].sum())) else {}
        hints += [hint] if (hint := independent_turns_hint(index)) else []
        sources.append({"data": text, "kind": parse_source(text).kind, "skipped": found.num_skipped, **counts})
        report.add(found)
    measured, shown = np.concatenate(measures), np.concatenate(used_images)
    conversations, turns, tokens, supervised = map(int, measured.sum(axis=0))
    distinct, first_names = np.unique(shown), dict[str, str]()
    firsts = [(names[number], first_names.setdefault(checks[number].pixels, names[number])) for number in distinct]
    equal = [f"{name} = {first}" for name, first in firsts if name != first]
    duplicates = {"images": len(equal), "samples": len(shown) - len(first_names), "examples": equal[:NUM_EXAMPLES]}
    summary: dict[str, Any] = {"sources": sources, "samples": len(measured), "images": len(distinct)}
    summary |= {"conversations": conversations, "turns": turns, "tokens": tokens, "supervised_tokens": supervised}
    summary["share_supervised"] = round(supervised / max(tokens, 1), 4)
    summary |= {"lengths": describe_lengths(measured[:, 2]), **report.as_dict(), "duplicates": duplicates}
    summary["leakage"] = _leakage(numbers[len(indexes) :], names, checks, first_names) if held_out else None
    return summary | ({"hints": hints} if hints else {})


def _find_images(indexes: Sequence[Index]) -> tuple[list[str], Iterator[Images | None], list[np.ndarray]]:
    """Names of the distinct images, the images, and the number among them of each index' samples' images, int64
    (samples,), -1 for no image. Several images of a sample count as one."""
    found: dict[str, tuple[int, Index, int]] = {}  # number of the image, and a sample that has it
    numbers = []
    for index in indexes:
        its_images = np.full(len(index), -1, np.int64)
        for row, name in enumerate(index.image_names()):
            if name is not None or index.has_image(row):
                name = name or f"image in {index.origins(row)[0]}"
                its_images[row] = found.setdefault(name, (len(found), index, row))[0]
        numbers.append(its_images)
    return list(found), (index.image(row) for _, index, row in found.values()), numbers


def check_images(images: Iterable[Images | None], num_workers: int) -> Iterator[ImageCheck]:
    """Open and decode all images, in their order, in num_workers processes (0: in this one)."""
    if num_workers == 0:
        yield from map(_check, images)
        return
    images = iter(images)
    # Not forked from this process, which has threads of torch and of the tokenizer, but from one without.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(num_workers, context) as pool:
        try:
            while window := list(islice(images, WINDOW * num_workers)):
                yield from pool.map(_check, window, chunksize=CHUNK)
        except BrokenProcessPool as error:
            raise OSError("a process that decodes images died: too little memory? Try fewer --num_workers") from error


def _check(image: Images | None) -> ImageCheck:
    try:
        opened = load_beside(image)  # type: ignore[arg-type]  # asked for with those that have one
        return ImageCheck(pixel_hash(opened), difference_hash(opened))
    except RecordError as error:
        return ImageCheck(kind=error.kind, detail=error.detail)


def measure(index: Index) -> np.ndarray:
    """int64 (samples, 4): conversations, turns, tokens (those of the image once), supervised tokens of each sample."""
    rows = [np.zeros((0, 3), np.int64)]
    for batch in index.table.to_batches():
        labels = batch.column("labels")
        stops = np.concatenate([[0], np.cumsum(labels.flatten().to_numpy() != IGNORE_INDEX)])
        ends = np.cumsum(labels.value_lengths().to_numpy())
        conversations = batch.column("lengths").value_lengths().to_numpy()
        turns = [sum(map(len, json.loads(text))) for text in batch.column("conversations").to_pylist()]
        rows.append(np.stack([conversations, np.array(turns, np.int64), np.diff(stops[ends], prepend=0)], axis=1))
    return np.insert(np.concatenate(rows), 2, index.num_tokens(), axis=1)


def describe_lengths(lengths: np.ndarray) -> dict[str, Any] | None:
    """Statistics of tokens per sample. 95 % of the samples are at most p95 long. histogram: samples by range."""
    if not len(lengths):
        return None
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // NUM_BINS)
    counts = np.bincount((lengths - low) // width).tolist()
    bins = {f"{low + width * n}-{low + width * (n + 1) - 1}": count for n, count in enumerate(counts)}
    found = {"min": low, "median": float(np.median(lengths)), "mean": round(float(lengths.mean()), 2)}
    found["p95"] = int(np.percentile(lengths, 95, method="inverted_cdf"))
    return found | {"max": high, "histogram": bins}


def _leakage(
    held_out: Sequence[np.ndarray], names: list[str], checks: list[ImageCheck], trained: dict[str, str]
) -> dict[str, Any]:
    """Held-out images that are trained on: with equal pixels, else the look of a copy, else the same COCO number."""
    numbers = [number for number in np.unique(np.concatenate(held_out)) if number >= 0]
    readable = [number for number in numbers if checks[number].pixels]
    looks, known = {check.pixels: check.look for check in checks}, list(trained.values())
    trained_looks = np.array([looks[pixels] for pixels in trained], np.uint64)
    by_id = {coco_id(name): name for name in known}
    equal, look_alikes, same_ids = list[str](), list[str](), list[str]()
    for name, check in ((names[number], checks[number]) for number in readable):
        distances = np.bitwise_count(trained_looks ^ np.uint64(check.look))
        if check.pixels in trained:
            equal.append(f"{name} = {trained[check.pixels]}")
        elif distances.min(initial=64) <= ALIKE:
            look_alikes.append(f"{name} = {known[distances.argmin()]}")
        # COCO names an image otherwise in 2014 and in 2017: equal names are of another data set.
        elif (number := coco_id(name)) in by_id and number and Path(by_id[number]).name != Path(name).name:
            same_ids.append(f"{name} = {by_id[number]}")
    found: dict[str, Any] = {"images": len(equal), "val_images": len(readable)}
    found |= {"unreadable": len(numbers) - len(readable), "examples": equal[:NUM_EXAMPLES]}
    for kind, pairs in (("look_alike", look_alikes), ("same_id", same_ids)):
        found |= {f"{kind}s": len(pairs), f"{kind}_examples": pairs[:NUM_EXAMPLES]}
    return found


def difference_hash(image: Image.Image) -> int:
    """64 bits: whether each of 8 x 8 gray values is brighter than its left neighbour, in an image scaled to 9 x 8.

    A copy that is compressed or scaled again differs in a few bits, another image in about half of them. Source: dHash,
    Neal Krawetz, "Kind of Like That", hackerfactor.com, 2013."""
    gray = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.LANCZOS), dtype=np.int16)
    return int.from_bytes(np.packbits(gray[:, 1:] > gray[:, :-1]).tobytes(), "big")


def coco_id(name: str) -> str | None:
    """The twelve digits by which COCO names an image in 2014 and in 2017; None for other names."""
    found = re.search(r"(?<!\d)(\d{12})\.\w+$", name)
    return found[1] if found else None


def table(summary: dict[str, Any]) -> list[list[str]]:
    """The summary as lines of a label and a text."""
    captions = sum(source.get("captions", 0) for source in summary["sources"])
    values: dict[str, Any] = {"hints": [], "filtered": None, "captions": captions, "n": "{:,}".format, **summary}
    text = "".join(render("inspection.txt", line=_line, count_text=count_text, **values))
    return [row.split("\t", 1) for row in text.splitlines()]


def draw(path: str, index: Index, samples: Sequence[dict[str, Any]]) -> None:
    """Histograms of tokens and of supervised tokens per sample, and below them images with their first answers."""
    from matplotlib.figure import Figure

    height = max(1, -(-len(samples) // 4))
    figure = Figure(figsize=(10, 3 + 3 * height), layout="constrained")
    panels: Any = figure.subfigures(2, 1, height_ratios=[1, height])
    counts = measure(index)
    for axes, column, label in zip(panels[0].subplots(1, 2), (2, 3), ("tokens", "supervised tokens"), strict=True):
        axes.hist(counts[:, column], bins=40, color="tab:blue")
        axes.set(xlabel=f"{label} per sample", ylabel="samples")
    answers = [next((text for text, supervised in each["conversations"][0] if supervised), "") for each in samples]
    texts = [f"{each['title']}\n{' '.join(answer.split())}" for each, answer in zip(samples, answers, strict=True)]
    draw_images(panels[1], [each["image"] for each in samples], texts)
    save_png(figure, path, dpi=110)
