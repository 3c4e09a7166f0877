"""Where data come from, as --data names it: the kind of source, its place, and its share of the mixture."""

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import coco, hf_dataset, json_files
from .catalog import how_to_download
from .files import MediaFolder, file_stamp
from .report import Report
from .sample import Sample
from .schema import COLUMNS, RATINGS, Layout
from .transcripts import ENGINES, AsrSettings, Transcripts

ASR = {"engine": "engine", "speech_model": "model", "language": "language", "max_speech_seconds": "max_seconds"}
MIN_RATINGS = {f"min_{name}": name for name in ("rating", *RATINGS)}
LAYOUT = {*COLUMNS, *MIN_RATINGS, "turns"}
# Each kind of source and its own options. All take COMMON.
KINDS = {
    "coco": set(),
    "karpathy": {"split"},
    "llava": {"recordings", *ASR, *LAYOUT},
    "vqa": {"annotations"},
    "dataset": {"split", "config", "revision", "streaming", "recordings", *ASR, *LAYOUT},
}
COMMON = {"images", "name", "weight"}
FOLDERS = ("images", "recordings", "annotations")  # or files
TABLE_SUFFIXES = (".parquet", ".arrow", ".tar", ".csv", ".tsv")
TABLE_FILES = ["dataset_info.json", "state.json", "metadata.csv", "**/*metadata.jsonl"]
TABLE_FILES += ["**/*.parquet", "**/*.arrow", "**/*.tar"]
NUMBERS = {"weight", "max_speech_seconds", *MIN_RATINGS}
HOW_TO = "a source is KIND:PATH[,option=value...], where KIND is coco, karpathy, llava, vqa or dataset, for example "
HOW_TO += "coco:data/coco/annotations/captions_train2017.json,images=data/coco/train2017"


@dataclass(frozen=True)
class DataSource:
    """One data source, parsed from its text. Nothing is opened before read()."""

    kind: str
    path: str
    options: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.options.get("name") or Path(self.path).stem

    @property
    def weight(self) -> float | None:
        """Its share of the samples of an epoch, relative to the other sources' weights. None: as large as it is."""
        return float(self.options["weight"]) if "weight" in self.options else None

    @property
    def streaming(self) -> bool:
        return self.options.get("streaming") == "true"

    @property
    def images(self) -> Path:
        """The folder in which images are found by name."""
        return Path(self.options["images"]) if "images" in self.options else Path(self.path).parent

    @property
    def asr_settings(self) -> AsrSettings:
        given: dict[str, Any] = {ASR[key]: value for key, value in self.options.items() if key in ASR}
        settings = AsrSettings(**given)
        return settings._replace(max_seconds=float(settings.max_seconds))

    def media(self) -> MediaFolder:
        return MediaFolder(self.images, self.options.get("recordings"))

    def transcripts(self) -> Transcripts:
        return Transcripts(self.asr_settings)

    def identity(self) -> list[Any]:
        """For json: what is read, and how. Paths may be relative, and are written into what is read."""
        options = {key: value for key, value in sorted(self.options.items()) if key not in ("name", "weight")}
        return [self.kind, self.path, options, os.getcwd()]

    def state(self) -> list[Any]:
        """For json: changes when a file that holds the records does."""
        if self.kind == "dataset":
            dataset = hf_dataset.open_table(self.path, **self.table_options())
            return [dataset._fingerprint, dataset.cache_files]
        return [file_stamp(path) for path in (self.path, self.options.get("annotations")) if path is not None]

    def read(self, media: MediaFolder, report: Report) -> Iterator[Sample]:
        """All Samples, in the order of the file. Raises ValueError or OSError if a file cannot be read at all."""
        path = Path(self.path)
        if self.kind == "coco":
            return coco.read_coco_captions(path, media, report)
        if self.kind == "karpathy":
            return coco.read_karpathy_split(path, media, self.options.get("split", "train"), report)
        if self.kind == "vqa":
            return coco.read_vqa(path, self.options.get("annotations"), media, report)
        if self.kind == "llava":
            return json_files.read_instruct(path, media, report, self.layout)
        table = hf_dataset.open_table(self.path, **self.table_options())
        return hf_dataset.read_table(table, media, report, self.layout)

    @property
    def layout(self) -> Layout:
        columns = {name: self.options[name] for name in COLUMNS if name in self.options}
        min_ratings = {name: float(self.options[key]) for key, name in MIN_RATINGS.items() if key in self.options}
        return Layout(columns, self.options.get("turns") == "independent", min_ratings)

    def table_options(self) -> dict[str, Any]:
        return {key: self.options[key] for key in ("split", "config", "revision") if key in self.options}


def split_source(text: str) -> tuple[str, str, dict[str, str]]:
    """The kind ("" without one), the path and the options of a source's text, as they are."""
    kind, separator, rest = text.partition(":")
    if not (separator and kind in KINDS):
        kind, rest = "", text
    path, *pieces = re.split(r"[,:](?=[a-z_]+=)", rest)
    return kind, path, dict(piece.split("=", 1) for piece in pieces)


def parse_source(text: str) -> DataSource:
    """KIND:PATH[,option=value...]. Without KIND the file decides. Raises ValueError with what is wrong."""
    name = f"data source {text!r}"
    kind, path, options = split_source(text)
    if not path:
        raise ValueError(f"{name} has no path: {HOW_TO}")
    kind, path = (kind, path) if kind else _guess(path, options)
    if not kind:
        raise ValueError(f"{name} is of no known kind; {HOW_TO}")
    known = KINDS[kind] | COMMON
    if unknown := sorted(options.keys() - known):
        raise ValueError(f"{name} has no option {', '.join(unknown)}: {kind} has {', '.join(sorted(known))}")
    for key in options.keys() & NUMBERS:
        if not re.fullmatch(r"\d*\.?\d+(e[+-]?\d+)?", options[key]) or not 0 < float(options[key]) < math.inf:
            raise ValueError(f"{name}: {key} must be a number above 0")
    choices = {"engine": ENGINES, "streaming": ("true", "false"), "turns": ("conversation", "independent")}
    for key, allowed in choices.items():
        if options.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{name}: {key} is {' or '.join(allowed)}")
    texts = options.keys() & {"question", "caption", "conversations"}
    if len(texts) > 1 or ("answer" in options and "question" not in options):
        raise ValueError(f"{name}: name the columns question and answer, or caption, or conversations")
    options |= {key: os.path.expanduser(options[key]) for key in FOLDERS if key in options}
    return DataSource(kind, os.path.expanduser(path), options)


def parse_files(texts: Sequence[str]) -> list[DataSource]:
    """Parse sources that are read as a whole.

    Raises ValueError if one cannot be parsed, is a stream, or names files that do not exist."""
    sources = [parse_source(text) for text in texts]
    if streams := [text for text, source in zip(texts, sources, strict=True) if source.streaming]:
        raise ValueError(f"a stream cannot be read as a whole: remove streaming=true from {', '.join(streams)}")
    if problem := missing_files(sources):
        raise ValueError(problem)
    return sources


def missing_files(sources: Sequence[DataSource]) -> str | None:
    """The error that names all files that do not exist, and a command that downloads them; None if they all do."""
    paths = [source.path for source in sources if source.kind != "dataset"]
    paths += [source.options[key] for source in sources for key in FOLDERS if key in source.options]
    missing = [path for path in paths if not Path(path).exists() and not Path(f"{path}.zip").exists()]
    hint = f". {command} downloads it" if (command := how_to_download(missing)) else ""
    return f"not found (looked in {Path.cwd()}): {', '.join(missing)}{hint}" if missing else None


def _guess(path: str, options: dict[str, str]) -> tuple[str, str]:
    """The kind of a bare path ("" if it is unknown) and its file, from its name and the first bytes of its content."""
    path = os.path.expanduser(path)
    file = Path(path)
    if file.is_dir() and not any(next(file.glob(pattern), None) for pattern in TABLE_FILES):
        found = sorted(file.glob("annotations/captions_*.json"))
        train = file / "annotations/captions_train2017.json"
        options.setdefault("images", path)
        return ("coco", str(train if train in found else found[0])) if train in found or len(found) == 1 else ("", path)
    if not file.exists() and (command := how_to_download([path])):
        raise ValueError(f"no such file: {path}. {command} downloads it")
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
    if start.startswith(b"[") or json_files.has_lines(file):
        return "llava", path
    if not (file.suffix == ".json" and start.startswith(b"{")):
        return "", path
    marks = {"imageId": "llava", "sentences": "karpathy", "questions": "vqa", "annotations": "coco", "images": "coco"}
    return next((kind for key, kind in marks.items() if f'"{key}"'.encode() in both), "llava"), path
