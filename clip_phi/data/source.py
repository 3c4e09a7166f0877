"""Where data come from, as --data says: which source, where it lies, and what share of the mixture it has."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .sample import Sample
from .files import MediaFolder, file_stamp
from .report import Report
from .transcripts import ENGINES, AsrSettings, Transcripts

SPEECH = {"recordings", "engine", "speech_model", "language", "max_speech_seconds"}
# Each kind of source and its own options; all take images, name and weight, and those with conversations SPEECH.
KINDS = {
    "coco": set(),
    "karpathy": {"split"},
    "llava": SPEECH,
    "vqa": {"annotations"},
    "dataset": {"split", "config", "revision", "streaming"} | SPEECH,
}
COMMON = {"images", "name", "weight"}
TABLE_SUFFIXES = (".parquet", ".arrow", ".tar", ".csv")
HOW_TO = (
    "a source is KIND:PATH[,option=value...], where KIND is coco, karpathy, llava, vqa or dataset, "
    "for example coco:data/coco/annotations/captions_train2017.json,images=data/coco/train2017"
)


@dataclass(frozen=True)
class DataSource:
    """One data source, read from its text; nothing is opened before read()."""

    kind: str
    path: str
    options: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.options.get("name") or Path(self.path).stem

    @property
    def weight(self) -> float | None:
        """Its share of the samples of an epoch, relative to the other sources' weights; None: as large as it is."""
        return float(self.options["weight"]) if "weight" in self.options else None

    @property
    def streaming(self) -> bool:
        return self.options.get("streaming") == "true"

    @property
    def images(self) -> Path:
        """The folder in which names of images are looked up."""
        return Path(self.options["images"]) if "images" in self.options else Path(self.path).parent

    def media(self) -> MediaFolder:
        """Where names of images and recordings are looked up."""
        return MediaFolder(self.images, self.options.get("recordings"))

    @property
    def hearing(self) -> AsrSettings:
        """How its recordings are heard."""
        default = AsrSettings()
        return AsrSettings(
            self.options.get("engine", default.engine),  # type: ignore[arg-type]
            self.options.get("speech_model", default.model),
            self.options.get("language"),
            float(self.options.get("max_speech_seconds", default.max_seconds)),
        )

    def transcripts(self) -> Transcripts:
        return Transcripts(self.hearing)

    def problems(self) -> list[str]:
        """What is missing on disk, in words."""
        paths = [self.options[key] for key in ("images", "recordings", "annotations") if key in self.options]
        if self.kind != "dataset":
            paths.insert(0, self.path)
        return [path for path in paths if not Path(path).exists() and not Path(f"{path}.zip").exists()]

    def identity(self) -> list[Any]:
        """For json: what is read, and how."""
        # Paths may be relative, and are written into what is read.
        options = {key: value for key, value in sorted(self.options.items()) if key not in ("name", "weight")}
        return [self.kind, self.path, options, os.getcwd()]

    def state(self) -> list[Any]:
        """For json: changes when a file that holds the records does."""
        if self.kind == "dataset":
            from .hf_dataset import open_table

            dataset = open_table(self.path, **self.table_options())
            return [dataset._fingerprint, dataset.cache_files]
        return [file_stamp(path) for path in (self.path, self.options.get("annotations")) if path is not None]

    def read(self, media: MediaFolder, report: Report) -> Iterator[Sample]:
        """All Samples, in the order of the file. Raises ValueError or OSError if a file cannot be read at all; what is
        wrong with a record goes to the report."""
        if self.kind == "coco":
            from .coco import read_coco_captions

            return read_coco_captions(Path(self.path), media, report)
        if self.kind == "karpathy":
            from .coco import read_karpathy_split

            return read_karpathy_split(Path(self.path), media, self.options.get("split", "train"), report)
        if self.kind == "vqa":
            from .json_files import read_vqa

            annotations = self.options.get("annotations")
            return read_vqa(Path(self.path), Path(annotations) if annotations else None, media, report)
        if self.kind == "llava":
            from .json_files import read_instruct

            return read_instruct(Path(self.path), media, report)
        from .hf_dataset import open_table, read_table

        return read_table(open_table(self.path, **self.table_options()), media, report)

    def table_options(self) -> dict[str, Any]:
        return {key: self.options[key] for key in ("split", "config", "revision") if key in self.options}


def parse_source(text: str) -> DataSource:
    """KIND:PATH[,option=value...]; without KIND it is told from the file. Raises ValueError with what is wrong."""
    kind, separator, rest = text.partition(":")
    if not (separator and kind in KINDS):
        kind, rest = "", text
    path, *pieces = re.split(r"[,:](?=[a-z_]+=)", rest)
    options = dict(piece.split("=", 1) for piece in pieces)
    if not path:
        raise ValueError(f"data source {text!r} names no file: {HOW_TO}")
    kind, path = (kind, path) if kind else _guess(text, path, options)
    known = KINDS[kind] | COMMON
    if unknown := sorted(options.keys() - known):
        raise ValueError(
            f"data source {text!r} has no option {', '.join(unknown)}: {kind} has {', '.join(sorted(known))}"
        )
    for key in options.keys() & {"weight", "max_speech_seconds"}:
        try:
            positive = 0 < float(options[key]) < float("inf")
        except ValueError:
            positive = False
        if not positive:
            raise ValueError(f"data source {text!r}: {key} must be a number above 0")
    if options.get("engine", ENGINES[0]) not in ENGINES:
        raise ValueError(f"data source {text!r}: engine is {' or '.join(ENGINES)}")
    if options.get("streaming", "true") not in ("true", "false"):
        raise ValueError(f"data source {text!r}: streaming is true or false")
    return DataSource(kind, path, options)


def parse_files(texts: Sequence[str]) -> list[DataSource]:
    """Parse sources that are read as a whole.

    Raises ValueError if one cannot be parsed, is a stream, or names files that do not exist."""
    sources = [parse_source(text) for text in texts]
    for text, source in zip(texts, sources, strict=True):
        if source.streaming:
            raise ValueError(f"a stream cannot be read as a whole: remove streaming=true from {text}")
    if problem := missing_files(sources):
        raise ValueError(problem)
    return sources


def missing_files(sources: Iterable[DataSource]) -> str | None:
    """The error that names all files of the sources that do not exist; None if they all do."""
    missing = [path for source in sources for path in source.problems()]
    return f"not found (looked in {Path.cwd()}): {', '.join(missing)}" if missing else None


def _guess(text: str, path: str, options: dict[str, str]) -> tuple[str, str]:
    """The kind of a bare path, from its name and the first bytes of its content."""
    file = Path(path)
    if file.is_dir() and not _is_table(file):
        found = sorted(file.glob("annotations/captions_*.json"))
        if len(found) == 1 or (found and (file / "annotations/captions_train2017.json") in found):
            train = file / "annotations/captions_train2017.json"
            options.setdefault("images", path)
            return "coco", str(train if train in found else found[0])
        raise ValueError(f"data source {text!r}: nothing known in this folder; {HOW_TO}")
    if file.suffix in TABLE_SUFFIXES or file.is_dir() or (not file.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", path)):
        return "dataset", path
    if not file.exists():
        raise ValueError(f"no such file: {path}; {HOW_TO}")
    if file.suffix == ".jsonl":
        return "llava", path
    with open(file, "rb") as opened:
        start = opened.read(1 << 16).lstrip()
        opened.seek(max(0, file.stat().st_size - (1 << 16)))
        both = start + opened.read()
    if start.startswith(b"["):
        return "llava", path
    for key, kind in ((b'"sentences"', "karpathy"), (b'"questions"', "vqa"), (b'"annotations"', "coco")):
        if key in both:
            return kind, path
    if file.suffix == ".json" and start.startswith(b"{"):
        return "coco", path
    raise ValueError(f"data source {text!r} is of no known kind; {HOW_TO}")


def _is_table(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("dataset_info.json", "state.json", "metadata.csv")) or any(
        next(folder.glob(f"**/*{suffix}"), None) for suffix in (".parquet", ".arrow", ".tar", "metadata.jsonl")
    )
