"""Captions of many pictures, into a file that a stopped run goes on with."""

import json
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

from PIL import Image
from tqdm import tqdm

from ..batching.images import FORMATS, load_image
from ..data.report import RecordError
from .engine import Answer, Engine, as_prompt

SHOWN = 5  # bad pictures named on the screen; all are in the output


def find_pictures(paths: Iterable[str]) -> list[str]:
    """Files as they are given, folders as the files in them that are named like pictures, sorted.

    Raises ValueError for a folder without any, and for a path that is not there."""
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
    found = []
    for path in paths:
        if not Path(path).is_dir():
            if not Path(path).exists():
                raise ValueError(f"missing image: {path}: there is no such file or folder")
            found.append(path)
            continue
        inside = [str(each) for each in sorted(Path(path).rglob("*")) if each.suffix.lower() in suffixes]
        if not inside:
            raise ValueError(f"no picture in {path} or the folders in it")
        found += inside
    return list(dict.fromkeys(found))


def caption_files(engine: Engine, names: Sequence[str], output: Path | None, max_new_tokens: int) -> Counter[str]:
    """Write {"image": ..., "caption": ...} for each picture, in order, as one line of `output` (None: stdout).

    A picture that cannot be read, or answered, gives {"image": ..., "error": ...}. A file that is there is gone on
    with: what has a caption in it is done, errors are tried again. Returns how many were "captioned", "done before",
    and of each kind of error."""
    counts: Counter[str] = Counter()
    done = _keep_whole_lines(output) if output is not None and output.exists() else set()
    left = [name for name in names if name not in done]
    counts["done before"] = len(names) - len(left)
    start, tokens, shown = time.perf_counter(), engine.counts["tokens"], 0
    with open(output, "a", encoding="utf-8") if output is not None else _Standard() as file:
        captions = _captions(engine, left, max_new_tokens)
        for name, result in tqdm(
            captions, total=len(names), initial=counts["done before"], unit="picture", disable=None
        ):
            if isinstance(result, str):
                counts["captioned"] += 1
                record = {"image": name, "caption": result}
            else:
                counts[result.kind if isinstance(result, RecordError) else "failed"] += 1
                record = {"image": name, "error": " ".join(str(result).split())}
                if (shown := shown + 1) <= SHOWN:
                    tqdm.write(f"clip-phi: {record['error']}", file=sys.stderr)
            print(json.dumps(record), file=file, flush=True)
    seconds = time.perf_counter() - start
    tokens = engine.counts["tokens"] - tokens
    print(_summary(counts, seconds, tokens), file=sys.stderr)
    return counts


def _captions(engine: Engine, names: Sequence[str], max_new_tokens: int) -> Iterator[tuple[str, str | Exception]]:
    """The caption of each picture, or what was wrong with it; threads open pictures ahead of the engine."""
    messages, _ = as_prompt(engine.model.config.caption_instruction, Image.new("RGB", (1, 1)))
    ahead = min(2 * engine.limits.max_batch, engine.limits.max_waiting)

    def ask(name: str) -> Answer:
        return engine.submit(messages, [load_image(name)], max_new_tokens=max_new_tokens)

    def result(asked: Future[Answer]) -> str | Exception:
        try:
            return asked.result().result()
        except Exception as error:  # of this picture: the others have nothing to do with it
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as readers:
        asked: deque[tuple[str, Future[Answer]]] = deque()
        for name in names:
            asked.append((name, readers.submit(ask, name)))
            if len(asked) >= ahead:
                first, answer = asked.popleft()
                yield first, result(answer)
        for name, answer in asked:
            yield name, result(answer)


def _keep_whole_lines(output: Path) -> set[str]:
    """The pictures that have a caption in the file, which keeps their lines alone: a kill may have torn the last."""
    kept: dict[str, str] = {}
    for line in output.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            if isinstance(record["caption"], str):
                kept[record["image"]] = line
        except (ValueError, KeyError, TypeError):
            continue
    whole = output.with_name(f".{output.name}.whole")
    whole.write_text("".join(f"{line}\n" for line in kept.values()), encoding="utf-8")
    whole.replace(output)
    return set(kept)


def _summary(counts: Counter[str], seconds: float, tokens: int) -> str:
    text = f"captioned {counts['captioned']:,} pictures in {seconds:.1f} s"
    text += f" ({counts['captioned'] / seconds:.1f} pictures and {tokens / seconds:.0f} tokens a second)"
    if counts["done before"]:
        text += f"; {counts['done before']:,} were done before"
    bad = {kind: count for kind, count in counts.items() if kind not in ("captioned", "done before")}
    if bad:
        text += f"; {sum(bad.values()):,} bad: " + ", ".join(f"{count:,} {kind}" for kind, count in bad.items())
    return text


class _Standard:
    """stdout, which a `with` leaves open."""

    def __enter__(self) -> TextIO:
        return sys.stdout

    def __exit__(self, *error: Any) -> None: ...
