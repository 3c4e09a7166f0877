"""Tables: everything that Hugging Face `datasets` can load, from the Hub or from disk, whole or as a stream."""

import csv
import glob
import hashlib
import os
import sys
import tarfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Container, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import types

from .files import MediaFolder
from .report import RecordError, Report, plain
from .sample import File, Sample
from .schema import ANY_LAYOUT, IMAGE_FILE, IMAGE_KEYS, Layout, read_records

BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".tsv": "csv", ".tar": "webdataset"}
BUILDERS |= dict.fromkeys((".jsonl", ".json"), "json")
LISTS = ("conversations", "conversation", "messages", "texts", "prompt", "completion", "answers")
BATCH_SIZE = 1000  # records read at once
BUFFER_SIZE = 1000  # records that a stream is shuffled over, in memory with their images
# What may be done to a table after it is opened without moving rows or columns inside its file.
HARMLESS = {"slice", "cast", "select", "drop", "replace_schema_metadata"}


def open_table(
    path: str, *, split: str = "train", config: str | None = None, revision: str | None = None, streaming: bool = False
) -> Any:
    """A datasets.Dataset, or an IterableDataset if streaming. Its images and recordings are not decoded.

    path: a data set of the Hub (user/name), a file or glob (see BUILDERS; also as hf://datasets/user/name/file), or a
        folder: of save_to_disk, or of any layout that load_dataset reads. split: for example "train[:10%]+validation".
    Raises OSError (no such file or data set, no network) or ValueError, in one line."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    on_disk = os.path.exists(path) or Path(path).suffix in BUILDERS
    try:
        dataset = _open(path, split, config, revision, streaming)
    except (datasets.exceptions.DatasetsError, ValueError, OSError, RuntimeError, tarfile.TarError) as error:
        cause: BaseException = error
        while isinstance(cause, datasets.exceptions.DatasetGenerationError) and cause.__cause__ is not None:
            cause = cause.__cause__
        message = f"cannot read {path!r}, split {split!r}: {' '.join(str(cause).split()) or type(cause).__name__}"
        message += "" if on_disk else "; there is no such folder here either"
        raise (OSError if isinstance(cause, OSError) else ValueError)(message) from error
    dataset.info.dataset_name = Path(path).name if on_disk else path
    if streaming:
        return dataset.decode(False) if dataset.features else dataset

    def leave_encoded(feature: Any) -> None:
        if isinstance(feature, datasets.Image | datasets.Audio | datasets.Video):
            feature.decode = False

    # New Features note that there is nothing to decode. Dataset.cast would copy all images to a new file.
    dataset.info.features = datasets.Features(datasets.features.features._visit(dataset.features, leave_encoded))
    return dataset


def _open(path: str, split: str, config: str | None, revision: str | None, streaming: bool) -> Any:
    import datasets

    folder = Path(path)
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        saved = datasets.load_from_disk(path)
        splits = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
        pieces = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(splits[name]) for name in splits})
        parts = [splits[piece.splitname].select(range(piece.from_ or 0, piece.to)) for piece in pieces]
        dataset = datasets.concatenate_datasets(parts)
        return dataset.to_iterable_dataset(num_shards=max(1, min(64, len(dataset)))) if streaming else dataset
    files = sorted(glob.glob(path, recursive=True)) or [path] * folder.exists()
    for archive in folder.rglob("*.tar") if folder.is_dir() else map(Path, files):
        if archive.suffix == ".tar":
            with open(archive, "rb") as file:
                file.seek(max(0, archive.stat().st_size - 512))
                if file.read().strip(b"\0"):  # zeros end a tar; without them tarfile may take a cut one for the whole
                    raise ValueError(f"{archive} is incomplete: download it again")
    options: dict[str, Any] = {"split": split, "streaming": streaming}
    if folder.is_dir():  # an absolute path, since a folder may be called "parquet" or "json"
        if _is_image_folder(folder):
            return datasets.load_dataset("imagefolder", data_dir=os.path.abspath(path), **options)
        return datasets.load_dataset(os.path.abspath(path), config, **options)
    if folder.suffix in BUILDERS:
        if "://" not in path and not files:
            raise FileNotFoundError("no such file")
        if BUILDERS[folder.suffix] == "csv":  # texts as they are: "None" is an answer, and 007 no number
            options |= {"sep": "\t" if folder.suffix == ".tsv" else ",", "keep_default_na": False}
            for first in files[:1]:
                with open(first, encoding="utf-8-sig", newline="") as lines:
                    names = next(csv.reader(lines, delimiter=options["sep"]), [])
                options["features"] = datasets.Features({name: datasets.Value("string") for name in names})
        return datasets.load_dataset(BUILDERS[folder.suffix], data_files=path, **options)
    if folder.exists():
        raise ValueError(f"a table is a folder or one of *{', *'.join(BUILDERS)}")
    return datasets.load_dataset(path, config, revision=revision, **options)


def _is_image_folder(folder: Path) -> bool:
    """Whether it has images and metadata: with a text beside them `datasets` would read texts. Counts what is left."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    described = [path for path in files if path.name in ("metadata.jsonl", "metadata.csv")]
    left = Counter(path.suffix.lower() for path in files if not IMAGE_FILE.match(path.name) and path not in described)
    is_image_folder = bool(described) and left.total() + len(described) < len(files) and not left.keys() & {*BUILDERS}
    if is_image_folder and left:
        kinds = ", ".join(f"{count:,} x {suffix or 'no ending'}" for suffix, count in left.most_common())
        print(plain(f"{folder}: {left.total():,} files are left out: {kinds}"), file=sys.stderr)
    return is_image_folder


def read_table(dataset: Any, media: MediaFolder, report: Report, layout: Layout = ANY_LAYOUT) -> Iterator[Sample]:
    """Samples of a datasets.Dataset, in its order. Their origins are "name:row".

    Images are not read: a Sample points into the Arrow file of `datasets`, or holds the bytes where there is no such
    file. If images are given by file name, all records about one image are one Sample; otherwise each record is one."""
    name, table = dataset.info.dataset_name or dataset.info.builder_name or "dataset", dataset.data
    names = dataset.column_names
    with_bytes = [column for column in names if _holds_bytes(table.schema.field(column).type)]
    files = {column: _files(table, column) for column in with_bytes}
    others = dataset.remove_columns(with_bytes).with_format(None)

    def cell(value: Any, row: int, column: str, place: str = "") -> Any:
        """A pyarrow.Scalar as a value of Python, in which a File stands for bytes that are on disk."""
        if not value.is_valid:
            return None
        if isinstance(value, pa.ListScalar):
            return [cell(each, row, column, f"/{number}") for number, each in enumerate(value.values)]
        is_struct = isinstance(value, pa.StructScalar)
        data, path = (value["bytes"], value.get("path", pa.NULL)) if is_struct else (value, pa.NULL)
        first, file, skipped = files[column][bisect_right(files[column], row, key=lambda part: part[0]) - 1]
        is_empty = not data.is_valid or data.as_buffer().size == 0
        content = data.as_py() if file is None or is_empty else File(file, f"{row - first + skipped}/{column}{place}")
        return _none_if_null({"bytes": content, "path": path.as_py()})

    def records() -> Iterator[tuple[str, dict[str, Any]]]:
        for row in range(len(dataset)):
            if (at := row % BATCH_SIZE) == 0:
                columns = others[row : row + BATCH_SIZE]
            # A slice of one row, wherever it is in the table: anything else would copy the images.
            place = row if dataset._indices is None else dataset._indices.fast_slice(row, 1)[0][0].as_py()
            cells = table.fast_slice(place, 1) if with_bytes else {}
            values = {key: columns[key][at] if key in columns else cell(cells[key][0], place, key) for key in names}
            yield f"{name}:{row}", _as_record(values, media, layout.columns.values())

    has_images = any(column.lower() in IMAGE_KEYS or column == layout.columns.get("image") for column in with_bytes)
    yield from read_records(records(), partial(media.find_value, in_table=True), report, not has_images, layout)


def stream_table(
    path: str, media: MediaFolder, report: Report, layout: Layout = ANY_LAYOUT, rank: int = 0, world_size: int = 1,
    seed: int = 0, **options: Any,
) -> Iterator[Sample]:  # fmt: skip
    """One shuffled pass after another, without end. The records of the first pass are counted in the report.

    A rank gets its share of the files if they divide evenly, otherwise every world_size-th record. A worker of torch's
    DataLoader gets its share of the files; with more workers than files, the surplus ones end at once. The origin of a
    record is "name:key", or "name:digest" of its content, as its number is not known. options: those of open_table.
    Raises ValueError if a pass gives no Sample, or a file is incomplete."""
    import torch.utils.data
    from datasets.distributed import split_dataset_by_node

    dataset = open_table(path, streaming=True, **options).shuffle(seed=seed, buffer_size=BUFFER_SIZE)
    dataset = split_dataset_by_node(dataset, rank, world_size)
    worker = torch.utils.data.get_worker_info()

    def records() -> Iterator[tuple[str, dict[str, Any]]]:
        try:
            for values in dataset:
                record = _as_record(values, media, layout.columns.values())
                keys = [record[key] for key in ("__key__", "id", "question_id") if key in record]  # none is null
                yield f"{dataset.info.dataset_name}:{keys[0] if keys else _digest(record)}", record
        except (ValueError, OSError, RuntimeError, tarfile.TarError) as error:
            raise ValueError(f"cannot read on in {path!r}: {' '.join(str(error).split())}") from error

    for epoch in count():
        dataset.set_epoch(epoch)
        counted, given = report if epoch == 0 else Report(), False
        for sample in read_records(records(), partial(media.find_value, in_table=True), counted, False, layout):
            given = True
            yield sample
        if not given and not counted.records and worker is not None and worker.id > 0:
            return
        if not given:
            raise ValueError(f"{path!r} gives nothing to train on to rank {rank} of {world_size}\n{counted.table()}")


def _digest(record: dict[str, Any]) -> str:
    image = next((record[key] for key in IMAGE_KEYS if key in record), None)
    data = image.get("bytes") if isinstance(image, dict) else None
    return hashlib.blake2b(data or repr(record).encode(errors="replace"), digest_size=6).hexdigest()


def _as_record(values: dict[str, Any], media: MediaFolder, named: Container[str] = ()) -> dict[str, Any]:
    """A row of a table, in which every row has all columns, as schema.py wants it. named: columns kept though null."""
    images = {key for key in values if key.lower() in IMAGE_KEYS or key in named}
    record = {key: _none_if_null(value) if key in images else value for key, value in values.items()}
    record = {key: value for key, value in record.items() if value is not None or key in named}
    if isinstance(record.get("json"), dict):  # webdataset: x.jpg beside x.json, which may name the image once more
        has_image = any(key in record for key in IMAGE_KEYS)
        inner = {key: value for key, value in record.pop("json").items() if value is not None}
        record = {key: value for key, value in inner.items() if not (has_image and key in IMAGE_KEYS)} | record
    for key in LISTS:  # what was once Sequence({...}) is a dict of lists
        value = record[key] if isinstance(record.get(key), dict) else {}
        lengths = {len(each) if isinstance(each, list) else -1 for each in value.values()}
        if len(lengths) == 1 and -1 not in lengths:
            record[key] = [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    file_name, url = record.get("file_name"), record.get("coco_url")
    if isinstance(file_name, str) and isinstance(url, str):  # .../train2017/000000000009.jpg
        try:
            media.find(file_name)
        except RecordError:
            record["file_name"] = "/".join(url.split("/")[-2:])
    return record


def _none_if_null(image: Any) -> Any:
    if isinstance(image, list):
        return [_none_if_null(each) for each in image]
    is_null = image == "" or (isinstance(image, dict) and all(each is None for each in image.values()))
    return None if is_null else image


def _holds_bytes(kind: Any) -> bool:
    """Of an Arrow type: binary, {"bytes": binary, ...}, or a list of these."""
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _holds_bytes(kind.value_type)
    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return types.is_binary(kind) or types.is_large_binary(kind)


def _files(table: Any, column: str) -> list[tuple[int, str | None, int]]:
    """For each part of the table: its first row, the Arrow file that has the column (None: none), and its row there."""
    from datasets.table import ConcatenationTable, MemoryMappedTable

    files, first = list[tuple[int, str | None, int]](), 0
    for tables in table.blocks if isinstance(table, ConcatenationTable) else [[table]]:
        part = next(each for each in tables if column in each.column_names)
        on_disk = isinstance(part, MemoryMappedTable) and part.path.endswith(".arrow")
        on_disk = on_disk and all(name in HARMLESS for name, _, _ in part.replays)
        skipped = sum(arguments[0] for name, arguments, _ in part.replays if name == "slice") if on_disk else 0
        files.append((first, part.path if on_disk else None, skipped))
        first += len(part)
    return files
