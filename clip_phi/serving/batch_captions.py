"""Captions of many images, in a file that a stopped run continues."""

import json
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ..batching.images import image_suffixes, load_image
from ..data.files import replace_file
from ..data.report import RecordError, plain
from ..environment import cpu_cores
from .engine import Completion, Engine, as_prompt

SHOWN = 5  # errors printed on the terminal; all are in the output


def find_images(paths: Iterable[str]) -> list[str]:
    """Files as given, and the image files of folders and their subfolders, sorted. A line on stderr says how many
    files of a folder are left out, and why.

    Raises ValueError for a folder without images, and for a path that does not exist."""
    suffixes, found = image_suffixes(), list[str]()
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"missing image: {path}: there is no such file or folder")
        inside = sorted(each for each in path.rglob("*") if not each.is_dir()) if path.is_dir() else []
        images = [str(each) for each in inside if suffixes.get(each.suffix.lower(), "") is None]
        left = Counter(each.suffix.lower() for each in inside if suffixes.get(each.suffix.lower(), "") is not None)
        kinds = [f"{count:,} x {suffix or 'no ending'}" for suffix, count in left.most_common(10)]
        needs = dict.fromkeys(filter(None, map(suffixes.get, left)))
        text = f"{path}: {left.total():,} files are left out, which are no images by their names: {', '.join(kinds)}"
        text = plain("; ".join([text, *needs]))
        if path.is_dir() and not images:
            raise ValueError(f"no image in {path} or its subfolders{f' ({text})' if left else ''}")
        if left:
            print(f"clip-phi: {text}", file=sys.stderr)
        found += images or [str(path)]
    return list(dict.fromkeys(found))


def caption_files(engine: Engine, names: Sequence[str], output: Path | None, max_new_tokens: int) -> Counter[str]:
    """Write {"image": ..., "caption": ...} or {"image": ..., "error": ...} for each image, in order.

    output: None for stdout. An existing file is continued: images with a caption are skipped, errors are tried again.
    Returns the number of images "captioned", "done before", and of each kind of error."""
    counts: Counter[str] = Counter()
    done = _keep_captions(output) if output is not None and output.exists() else set()
    left = [name for name in names if name not in done]
    counts["done before"] = len(names) - len(left)
    start, tokens, shown = time.perf_counter(), engine.counts["tokens"], 0
    with open(output, "a", encoding="utf-8") if output is not None else nullcontext(sys.stdout) as file:
        for name, result in tqdm(_captions(engine, left, max_new_tokens), total=len(left), unit="image", disable=None):
            if isinstance(result, str):
                counts["captioned"] += 1
                record = {"image": name, "caption": result}
            else:
                counts[result.kind if isinstance(result, RecordError) else "failed"] += 1
                record = {"image": name, "error": " ".join(str(result).split())}
                if (shown := shown + 1) <= SHOWN:
                    tqdm.write(plain(f"clip-phi: {record['error']}"), file=sys.stderr)
            print(json.dumps(record), file=file, flush=True)
    print(_summary(counts, time.perf_counter() - start, engine.counts["tokens"] - tokens), file=sys.stderr)
    return counts


def _captions(engine: Engine, names: Sequence[str], max_new_tokens: int) -> Iterator[tuple[str, str | Exception]]:
    """The caption of each image, or its error; threads decode images ahead of the engine."""
    messages, _ = as_prompt(engine.model.config.caption_instruction, Image.new("RGB", (1, 1)))
    ahead = min(2 * engine.limits.max_batch, engine.limits.max_waiting)

    def submit(name: str) -> Completion:
        return engine.submit(messages, [load_image(name)], max_new_tokens=max_new_tokens)

    with ThreadPoolExecutor(min(8, cpu_cores())) as pool:
        left = (pool.submit(submit, name) for name in names)
        submitted = deque(islice(left, ahead))
        for name in names:
            try:
                yield name, submitted.popleft().result().result()
            except Exception as error:  # of this image alone
                yield name, error
            submitted.extend(islice(left, 1))


def _keep_captions(output: Path) -> set[str]:
    """The images with a caption in the file. Removes all other lines: errors, and the part of a line after a kill."""
    captions: dict[str, str] = {}
    for line in output.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            if isinstance(record["caption"], str):
                captions[record["image"]] = line
        except (ValueError, KeyError, TypeError):
            continue
    replace_file(output, "".join(f"{line}\n" for line in captions.values()))
    return set(captions)


def _summary(counts: Counter[str], seconds: float, tokens: int) -> str:
    captioned, before = counts["captioned"], counts["done before"]
    bad = counts - Counter({"captioned": captioned, "done before": before})
    parts = [f"captioned {captioned:,} images in {seconds:.1f} s"]
    parts[0] += f" ({captioned / seconds:.1f} images and {tokens / seconds:.0f} tokens per second)"
    parts += [f"{before:,} were done before"] if before else []
    parts += [f"{bad.total():,} bad: " + ", ".join(f"{bad[kind]:,} {kind}" for kind in bad)] if bad else []
    return "; ".join(parts)
