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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..samples import File, _open_zip
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
    size, its time set back by hand, is not noticed. Raises Defect, as load_image does, if there is no such file."""
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
    private = {"transformers_version", "architectures", "dtype"}  # where it comes from, not what it computes
    vision = {
        name: value
        for name, value in tower.config.to_dict().items()
        if not name.startswith("_") and name not in private
    }
    taken = [config.vision_feature_layer, config.vision_feature_select_strategy]
    settings = [FORMAT, type(tower).__name__, vision, taken, processor.image_processor.to_dict(), pixels]
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
        self._names: list[str] = []  # of the shards
        self._read: list[int] = []  # records of each that were read
        self._files: dict[int, int] = {}  # open for reading, by the shard's number
        self._entries = np.empty(0, ENTRY)  # sorted by key, each key once
        self._heads = self._entries["head"]
        self._own: dict[bytes, Place] = {}  # written since _entries was read
        self._writer: _Writer | None = None
        self._make_folder()
        self.refresh()

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureCache, (self.root, self.fingerprint, self.shape, self.rows_per_shard)

    def __len__(self) -> int:
        return len(self._entries) + len(self._own)

    def __contains__(self, key: bytes) -> bool:
        return self._find([key])[0] is not None

    def get_into(self, keys: Sequence[bytes], out: torch.Tensor) -> list[bool]:
        """Read features to where they are wanted. out: contiguous bfloat16 (keys, patches, vision hidden) on the CPU.

        Returns which keys were found; the rows of the others hold anything."""
        if out.dtype != torch.bfloat16 or out.shape != (len(keys), *self.shape) or not out.is_contiguous():
            raise ValueError(f"out is {out.dtype} {tuple(out.shape)}, not contiguous bfloat16 {(len(keys), *self.shape)}")
        rows = out.view(torch.int16).numpy()
        return [
            place is not None and os.preadv(self._file(place[0]), [row], place[1] * self.row_bytes) == self.row_bytes
            for place, row in zip(self._find(keys), rows, strict=True)
        ]

    def put(self, keys: Sequence[bytes], features: torch.Tensor) -> None:
        """Add features, rounded to bfloat16: float (keys, patches, vision hidden). Keys that are there stay as they are.

        Raises OSError that names --cache_features if the disk is full; what was added before stays readable."""
        if features.shape != (len(keys), *self.shape):
            raise ValueError(f"features are {tuple(features.shape)}, not {(len(keys), *self.shape)}")
        with self._lock:
            places = self._find(keys)
            new = {key: row for row, (key, place) in enumerate(zip(keys, places, strict=True)) if place is None}
            rows = features.detach()[list(new.values())].to("cpu", torch.bfloat16).view(torch.int16).numpy()
            new_keys = list(new)
            try:
                while new_keys:
                    number, writer = self._open_writer()
                    count = min(len(new_keys), self.rows_per_shard - writer.rows)
                    first = writer.append(new_keys[:count], rows[:count])
                    self._own |= {key: (number, first + row) for row, key in enumerate(new_keys[:count])}
                    new_keys, rows = new_keys[count:], rows[count:]
            except OSError as error:
                reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
                raise OSError(
                    error.errno,
                    f"--cache_features {self.root}: {reason}; the {len(self):,} images that are cached stay readable. "
                    f"One more takes {self.row_bytes:,} bytes: make room, or leave the option out",
                ) from error

    def refresh(self) -> None:
        """See what other processes have added."""
        with self._lock:
            for path in sorted(self.folder.glob("shard-*.index")):
                if path.stem not in self._names:
                    self._add_shard(path.stem)
            entries = np.concatenate([self._entries, *(self._read_index(number) for number in range(len(self._names)))])
            entries = entries[np.lexsort((entries["tail"], entries["head"]))]
            same = (entries["head"][1:] == entries["head"][:-1]) & (entries["tail"][1:] == entries["tail"][:-1])
            self._entries = entries[np.concatenate([[True], ~same])] if len(entries) else entries
            self._heads = np.ascontiguousarray(self._entries["head"])
            self._own = {}

    def close(self) -> None:
        with self._lock:
            for file in self._files.values():
                os.close(file)
            self._files = {}
            if self._writer is not None and self._writer.process == os.getpid():
                self._writer.close()
            self._writer = None

    def _make_folder(self) -> None:
        about = {"format": FORMAT, "fingerprint": self.fingerprint, "shape": list(self.shape)}
        path = self.folder / "about.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            aside = self.folder / f"about-{secrets.token_hex(6)}.json"
            with open(aside, "w", encoding="utf-8") as file:
                json.dump(about, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        found = json.loads(path.read_text(encoding="utf-8"))
        if found != about:
            raise ValueError(f"--cache_features: {path} says {found}, not {about}: remove {self.folder}")

    def _add_shard(self, name: str) -> int:
        self._names.append(name)
        self._read.append(0)
        return len(self._names) - 1

    def _path(self, number: int, ending: str) -> str:
        return str(self.folder / f"{self._names[number]}.{ending}")

    def _file(self, number: int) -> int:
        """A shard, open for reading at any place; a forked process may use it too, since nobody moves its position."""
        if number not in self._files:
            with self._lock:
                if number not in self._files:
                    self._files[number] = os.open(self._path(number, "bin"), os.O_RDONLY)
        return self._files[number]

    def _read_index(self, number: int) -> np.ndarray:
        """The entries since the last time, up to the first that is not whole or whose row is not."""
        with open(self._path(number, "index"), "rb") as file:
            file.seek(self._read[number] * RECORD.itemsize)
            data = file.read()
        records = np.frombuffer(data[: len(data) // RECORD.itemsize * RECORD.itemsize], RECORD)
        if not len(records):
            return np.empty(0, ENTRY)
        whole = records["row"] < os.stat(self._path(number, "bin")).st_size // self.row_bytes
        whole &= records["check"] == _checks(records)
        records = records[: len(records) if whole.all() else int(whole.argmin())]
        self._read[number] += len(records)
        entries = np.empty(len(records), ENTRY)
        for name in ("head", "tail", "row"):
            entries[name] = records[name]
        entries["shard"] = number
        return entries

    def _find(self, keys: Sequence[bytes]) -> list[Place | None]:
        places: list[Place | None] = [self._own.get(key) for key in keys]
        entries, heads = self._entries, self._heads
        if len(entries) and keys:
            halves = _halves(keys)
            # A binary search for the first half; of two keys with one first half only one is found
            near = entries[np.minimum(np.searchsorted(heads, halves[:, 0]), len(heads) - 1)]
            found = (near["head"] == halves[:, 0]) & (near["tail"] == halves[:, 1])
            for index in np.flatnonzero(found).tolist():
                places[index] = int(near["shard"][index]), int(near["row"][index])
        return places

    def _open_writer(self) -> tuple[int, "_Writer"]:
        """A shard of this process with room for a row, and its number."""
        writer = self._writer
        if writer is None or writer.process != os.getpid() or writer.rows >= self.rows_per_shard:
            ...
        raise NotImplementedError
