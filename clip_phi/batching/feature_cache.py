"""The patch features of a frozen vision tower, kept on disk: a run that finds them opens no image and runs no tower.

One folder for each fingerprint of what makes the features. In it, pairs of files of one writer each:
shard-WRITER-NUMBER.bin holds bfloat16 features, row behind row, and shard-WRITER-NUMBER.index says which image's they
are. A row is on disk before the index names it, and each entry of the index carries a checksum, so whatever stops a
writer (SIGKILL, a power cut, a full disk) costs the rows that it was writing and nothing else."""

import errno
import hashlib
import json
import os
import secrets
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from ..data.sample import File, _open_zip
from .images import PixelMode, source_defects

FORMAT = 1  # of the files; also raised when the same settings come to give other features
ROWS_PER_SHARD = 16_384  # 1 GB of TinyCLIP's
KEY_BYTES = 16
RECORD = np.dtype([("head", "<u8"), ("tail", "<u8"), ("row", "<u4"), ("check", "<u4")])  # of an index: halves of a key
ENTRY = np.dtype([("head", "<u8"), ("tail", "<u8"), ("row", "<u4"), ("shard", "<u4")])  # the same in memory

Place = tuple[int, int]  # number of the shard, row there


def image_key(source: File | bytes) -> bytes:
    """16 bytes that change when an image does, found without opening it.

    They tell a file by path, size and modification time; a member of a zip archive by these of the archive, its name
    and the checksum in the archive's directory; a cell of an Arrow file by these of the file and its place; bytes by
    themselves. So an image that is touched or moved is computed anew, and one that is overwritten with another of its
    size, its time set back by hand, is not noticed. Raises RecordError if there is no such file."""
    if isinstance(source, bytes):
        return hashlib.blake2b(source, digest_size=KEY_BYTES, person=b"bytes").digest()
    with source_defects(str(source)):
        status = os.stat(source.path)
        parts = [os.path.abspath(source.path), status.st_size, status.st_mtime_ns, source.member]
        if source.member is not None and not source.path.endswith(".arrow"):
            parts.append(_open_zip(source.path, os.getpid()).getinfo(source.member).CRC)
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=KEY_BYTES, person=b"file").digest()


def fingerprint_of(model: Any, processor: Any, pixels: PixelMode = "exact") -> str:
    """Hex digest of all that decides a feature but the image: the tower's weights, their type and its configuration,
    which of its features are taken, the image processor's settings and the mode of Preprocessor.

    model: a ClipPhiModel or ClipPhiForCausalLM. A second of time for 300 MB of weights."""
    tower, config = model.get_encoder("image"), model.config
    common = PreTrainedConfig().to_dict()  # its name, its version, what it returns: nothing that changes a feature
    vision = {name: value for name, value in tower.config.to_dict().items() if name not in common}
    image = processor.image_processor.to_dict()
    image.pop("auto_map", None)  # comes with saving
    taken = [config.vision_feature_layer, config.vision_feature_select_strategy]
    settings = [FORMAT, type(tower).__name__, vision, taken, image, pixels]
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=20)
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class FeatureCache:
    """Features by image key. Any number of processes may read and write one cache at once.

    Open it before workers are forked or after, or pickle it: files are opened where they are used, and a process
    writes only to shards of its own. What others have added since is seen after refresh(). Threads may share it."""

    def __init__(
        self, folder: str | Path, fingerprint: str, shape: tuple[int, int], rows_per_shard: int = ROWS_PER_SHARD
    ):
        """shape: (patches, vision hidden). Raises ValueError if the folder holds other features under this name, and
        OSError if it cannot be written to."""
        self.root, self.fingerprint, self.shape, self.rows_per_shard = folder, fingerprint, shape, rows_per_shard
        self.folder = Path(folder) / fingerprint[:16]
        self.row_bytes = 2 * shape[0] * shape[1]
        self._lock = threading.RLock()
        self._shards: list[str] = []  # their paths, without the ending
        self._records_read: list[int] = []  # of the index of each
        self._files: dict[int, int] = {}  # of shards, open for reading
        self._sorted = _sort(np.empty(0, ENTRY))
        self._own: dict[bytes, Place] = {}  # written since _sorted was made
        self._writer: _Writer | None = None
        self._make_folder()
        self.refresh()

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureCache, (self.root, self.fingerprint, self.shape, self.rows_per_shard)

    def __len__(self) -> int:
        return len(self._sorted[1]) + len(self._own)

    def __contains__(self, key: bytes) -> bool:
        return self._find([key])[0] is not None

    def get_into(self, keys: Sequence[bytes], out: torch.Tensor) -> list[bool]:
        """Read features to where they are wanted. out: contiguous bfloat16 (keys, patches, vision hidden) on the CPU.

        Returns which keys were found; the rows of the others hold anything."""
        wanted = (len(keys), *self.shape)
        if out.dtype != torch.bfloat16 or out.shape != wanted or not out.is_contiguous():
            raise ValueError(f"features go into contiguous bfloat16 {wanted}, not {out.dtype} {tuple(out.shape)}")
        rows = out.view(torch.int16).numpy()
        return [
            place is not None and os.preadv(self._file(place[0]), [row], place[1] * self.row_bytes) == self.row_bytes
            for place, row in zip(self._find(keys), rows, strict=True)
        ]

    def put(self, keys: Sequence[bytes], features: torch.Tensor) -> None:
        """Add features: float (keys, patches, vision hidden), rounded to bfloat16. A key that is there stays as it is.

        Raises OSError that names --cache_features if the disk is full; what was added before stays readable."""
        if features.shape != (len(keys), *self.shape):
            raise ValueError(f"features are {tuple(features.shape)}, not {(len(keys), *self.shape)}")
        with self._lock:
            places = zip(keys, self._find(keys), strict=True)
            new = {key: row for row, (key, place) in enumerate(places) if place is None}
            names, rows = list(new), features.detach()[list(new.values())].to("cpu", torch.bfloat16)
            try:
                while names:
                    writer = self._open_writer()
                    count = min(len(names), self.rows_per_shard - writer.rows)
                    first = writer.append(names[:count], rows[:count])
                    self._own |= {key: (writer.shard, first + row) for row, key in enumerate(names[:count])}
                    names, rows = names[count:], rows[count:]
            except OSError as error:
                self._close_writer()  # its index may name some of these rows, so they must not be written over
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                raise OSError(
                    error.errno,
                    f"--cache_features {self.root}: {'the disk is full' if full else error.strerror}. The features of "
                    f"{len(self):,} images, {self.row_bytes:,} bytes each, stay there and stay readable",
                ) from error

    def refresh(self) -> None:
        """See what other processes have added."""
        with self._lock:
            for path in sorted(self.folder.glob("shard-*.bin")):
                if str(path.with_suffix("")) not in self._shards:
                    self._add_shard(path.stem)
            news = [self._read_index(shard) for shard in range(len(self._shards))]
            self._sorted = _sort(np.concatenate([self._sorted[1], *news]))
            self._own = {}

    def close(self) -> None:
        with self._lock:
            self._close_writer()
            for file in self._files.values():
                os.close(file)
            self._files = {}

    def _make_folder(self) -> None:
        about = {"format": FORMAT, "fingerprint": self.fingerprint, "shape": list(self.shape)}
        path = self.folder / "about.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            aside = self.folder / f"about-{secrets.token_hex(6)}"
            with open(aside, "w", encoding="utf-8") as file:
                json.dump(about, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        found = json.loads(path.read_text(encoding="utf-8"))
        if found != about:
            raise ValueError(f"--cache_features: {path} says {found}, not {about}: remove {self.folder}")

    def _add_shard(self, name: str) -> int:
        self._shards.append(str(self.folder / name))
        self._records_read.append(0)
        return len(self._shards) - 1

    def _file(self, shard: int) -> int:
        """A shard, open for reading. Forked processes and threads may share it: nothing moves a position in it."""
        if shard not in self._files:
            with self._lock:
                if shard not in self._files:
                    self._files[shard] = os.open(f"{self._shards[shard]}.bin", os.O_RDONLY)
        return self._files[shard]

    def _read_index(self, shard: int) -> np.ndarray:
        """The entries since the last time, up to the first that is not whole or whose row is not."""
        with open(f"{self._shards[shard]}.index", "rb") as file:
            file.seek(self._records_read[shard] * RECORD.itemsize)
            data = file.read()
        records = np.frombuffer(data, RECORD, count=len(data) // RECORD.itemsize)
        num_rows = os.stat(f"{self._shards[shard]}.bin").st_size // self.row_bytes
        good = (records["check"] == _checks(records)) & (records["row"] < num_rows)
        records = records[: int(np.append(good, False).argmin())]
        self._records_read[shard] += len(records)
        entries = np.empty(len(records), ENTRY)
        entries[["head", "tail", "row"]] = records[["head", "tail", "row"]]
        entries["shard"] = shard
        return entries

    def _find(self, keys: Sequence[bytes]) -> list[Place | None]:
        places: list[Place | None] = [self._own.get(key) for key in keys]
        heads, entries = self._sorted
        if len(entries):
            # By the first half of a key. Two that share it are missed in turns, if there ever are two
            halves = _halves(keys)
            near = entries[heads.searchsorted(halves[:, 0]).clip(max=len(heads) - 1)]
            for index in np.flatnonzero((near["head"] == halves[:, 0]) & (near["tail"] == halves[:, 1])).tolist():
                places[index] = int(near["shard"][index]), int(near["row"][index])
        return places

    def _open_writer(self) -> "_Writer":
        """Of a shard of this process that has room for a row."""
        writer = self._writer
        if writer is None or writer.process != os.getpid() or writer.rows >= self.rows_per_shard:
            self._close_writer()
            name = f"shard-{secrets.token_hex(8)}"
            writer = self._writer = _Writer(self.folder, name, self._add_shard(name))
        return writer

    def _close_writer(self) -> None:
        if self._writer is not None:  # a forked process closes its copies of its parent's files
            os.close(self._writer.data)
            os.close(self._writer.index)
        self._writer = None


class _Writer:
    """Of one shard, which is made here. shard: its number; rows: how many it has."""

    def __init__(self, folder: Path, name: str, shard: int):
        self.shard, self.rows, self.process = shard, 0, os.getpid()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        self.index = os.open(folder / f"{name}.index", flags, 0o666)  # first: whoever finds the other finds this, too
        self.data = os.open(folder / f"{name}.bin", flags, 0o666)

    def append(self, keys: Sequence[bytes], rows: torch.Tensor) -> int:
        """rows: bfloat16 (keys, patches, vision hidden) on the CPU. Returns the number of the first."""
        _write(self.data, rows.contiguous().view(torch.int16).numpy())
        os.fsync(self.data)
        records = np.empty(len(keys), RECORD)
        halves = _halves(keys)
        records["head"], records["tail"] = halves[:, 0], halves[:, 1]
        records["row"] = np.arange(self.rows, self.rows + len(keys))
        records["check"] = _checks(records)
        _write(self.index, records)
        self.rows += len(keys)
        return self.rows - len(keys)


def _write(file: int, array: np.ndarray) -> None:
    rest = array.reshape(-1).view(np.uint8).data
    while rest:
        rest = rest[os.write(file, rest) :]


def _halves(keys: Sequence[bytes]) -> np.ndarray:
    """uint64 (keys, 2)."""
    return np.frombuffer(b"".join(keys), "<u8").reshape(len(keys), 2)


def _checks(records: np.ndarray) -> np.ndarray:
    """uint32 (records,), of the other fields; not 0 for one of zeros only, which a power cut may leave."""
    mixed = (records["head"] + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(29)) ^ records["tail"]) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(32)) ^ records["row"]) * np.uint64(0x94D049BB133111EB)
    return (mixed >> np.uint64(32)).astype("<u4")


def _sort(entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first halves of the keys, and the entries, by key, each key once."""
    entries = entries[np.lexsort((entries["tail"], entries["head"]))]
    again = (entries["head"][1:] == entries["head"][:-1]) & (entries["tail"][1:] == entries["tail"][:-1])
    entries = entries[np.append(np.full(len(entries[:1]), True), ~again)]
    return np.ascontiguousarray(entries["head"]), entries
