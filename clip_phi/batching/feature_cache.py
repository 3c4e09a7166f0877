"""The patch features of a frozen vision tower on disk: a run that finds them opens no image and runs no tower.

One folder for each fingerprint of what decides the features. In it each writer has a pair of files: shard-NAME.bin has
bfloat16 features, a row for each image, and shard-NAME.index the keys of the images, with checksums of the entry and
of the row, which is on disk before. So whatever stops a writer (SIGKILL, a power cut, a full disk) costs the rows that
it is writing and nothing else, and bytes that have changed on disk cost their row: it is computed and stored again."""

import errno
import hashlib
import json
import os
import secrets
import struct
import sys
import threading
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..data.files import checked_line, read_checked_lines
from ..data.sample import File, _open_zip
from .images import PixelMode, image_errors

FORMAT = 3  # of the files; raised too when the same settings come to give other features
KEY_BYTES = 16
RECORD = struct.Struct(f"<{KEY_BYTES}sIII")  # of an index: key, row, checksum of the row, checksum of these three


def image_key(source: File | bytes) -> bytes:
    """16 bytes that change when an image does, found without opening it. Raises RecordError if there is no such file.

    Of bytes a hash; of a file its path, size and modification time; of a member of a zip archive these of the archive,
    its name and its checksum there; of a cell of an Arrow file these of the file and its place. So a touched or moved
    image is computed anew; one of equal size put in its place, with the time set back by hand, is not noticed."""
    if isinstance(source, bytes):
        return hashlib.blake2b(source, digest_size=KEY_BYTES, person=b"bytes").digest()
    with image_errors(str(source)):
        status = os.stat(source.path)
        parts = [os.path.abspath(source.path), status.st_size, status.st_mtime_ns, source.member]
        if source.member is not None and not source.path.endswith(".arrow"):
            parts.append(_open_zip(source.path, os.getpid()).getinfo(source.member).CRC)
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=KEY_BYTES, person=b"file").digest()


def fingerprint_of(model: Any, processor: Any, pixels: PixelMode = "exact") -> str:
    """Hex digest of all that decides a feature but the image: the tower's weights, their type and its configuration,
    which of its features are taken, the image processor's settings and the mode of Preprocessor.

    model: a ClipPhiModel or ClipPhiForCausalLM. It takes a second for 300 MB of weights."""
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
    """Features by image key. Any number of processes and threads may read and write one cache at once. It may be forked
    and pickled: files are opened where they are used, and a process writes only to a shard of its own."""

    def __init__(self, folder: str | Path, fingerprint: str, shape: tuple[int, int]):
        """shape: (patches, vision hidden). Raises ValueError for a folder of other features, OSError if read-only."""
        self.root, self.fingerprint, self.shape = folder, fingerprint, shape
        self.folder = Path(folder) / fingerprint[:16]
        self.row_bytes = 2 * shape[0] * shape[1]
        self._lock = threading.RLock()
        # By key: path of the shard without suffix, row and checksum; of an image that several writers added, all.
        self._places: dict[bytes, tuple[tuple[str, int, int], ...]] = {}
        self._records_read: dict[str, int] = {}  # of the index of each shard
        # A shard, open for reading. Forked processes and threads may share it: nothing moves a position in it.
        self._file = cache(lambda shard: os.open(f"{shard}.bin", os.O_RDONLY))
        self._writer: _Writer | None = None
        self._found_damage = False
        self._make_folder()
        self.refresh()

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureCache, (self.root, self.fingerprint, self.shape)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def get(self, key: bytes) -> torch.Tensor | None:
        """The features of an image: bfloat16 (patches, vision hidden) on the CPU. None if there are none."""
        for place in reversed(self._places.get(key, ())):
            shard, row, checksum = place
            features = torch.empty(self.shape, dtype=torch.bfloat16)
            data = features.view(torch.int16).numpy()
            read = os.preadv(self._file(shard), [data], row * self.row_bytes)
            if read == self.row_bytes and zlib.crc32(data) == checksum:
                return features
            if not self._found_damage:
                self._found_damage = True
                what = f"{shard}.bin is damaged; what is wrong in it is computed again"
                print(f"--cache_features {self.root}: {what}", file=sys.stderr)
            with self._lock:
                left = tuple(each for each in self._places.pop(key, ()) if each != place)
                self._places |= {key: left} if left else {}
        return None

    def put(self, keys: Sequence[bytes], features: torch.Tensor) -> None:
        """Add features: float (keys, patches, vision hidden), rounded to bfloat16. A cached key stays as it is.

        Raises OSError that names --cache_features if the disk is full; what was added before stays readable."""
        if features.shape != (len(keys), *self.shape):
            raise ValueError(f"features are {tuple(features.shape)}, not {(len(keys), *self.shape)}")
        with self._lock:
            # Read, since a process that found the row damaged has computed these features.
            new = {key: row for row, key in enumerate(keys) if self.get(key) is None}
            if not new:
                return
            try:
                if self._writer is None or self._writer.process != os.getpid():
                    self._close_writer()
                    self._writer = _Writer(str(self.folder / f"shard-{secrets.token_hex(8)}"))
                rows = features.detach()[list(new.values())].to("cpu", torch.bfloat16)
                for key, row, checksum in self._writer.append(list(new), rows):
                    self._places[key] = ((self._writer.shard, row, checksum),)
            except OSError as error:
                self._close_writer()  # its index may name some of these rows, so they must not be overwritten
                reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
                kept = f"The features of {len(self):,} images, {self.row_bytes:,} bytes each, stay there"
                message = f"--cache_features {self.root}: {reason}. {kept} and stay readable"
                raise OSError(error.errno, message) from error

    def refresh(self) -> None:
        """Read what other processes have added."""
        with self._lock:
            for path in sorted(self.folder.glob("shard-*.bin")):
                self._read_index(str(path.with_suffix("")))

    def _make_folder(self) -> None:
        about = {"format": FORMAT, "fingerprint": self.fingerprint, "shape": list(self.shape)}
        path = self.folder / "about.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        found = read_checked_lines(path) if path.exists() else []
        if not found:  # absent or damaged; the folder has the fingerprint's name
            whole = self.folder / f"about-{secrets.token_hex(6)}"
            whole.write_text(checked_line(about), encoding="utf-8")
            whole.replace(path)
        elif found != [about]:
            raise ValueError(f"--cache_features: {path} has {found}, not {about}: remove {self.folder}")

    def _read_index(self, shard: str) -> None:
        """Read the new records, without changed ones, up to the first that is incomplete or whose row is."""
        with open(f"{shard}.index", "rb") as file:
            file.seek(self._records_read.setdefault(shard, 0) * RECORD.size)
            data = file.read()
        num_rows = os.stat(f"{shard}.bin").st_size // self.row_bytes
        for key, row, checksum, check in RECORD.iter_unpack(data[: len(data) // RECORD.size * RECORD.size]):
            if check == _checksum(key, row, checksum):
                if row >= num_rows:
                    break
                place, known = (shard, row, checksum), self._places.get(key, ())
                self._places[key] = known if place in known else (*known, place)
            self._records_read[shard] += 1

    def _close_writer(self) -> None:
        if self._writer is not None:  # a forked process closes its copies of its parent's files
            os.close(self._writer.data)
            os.close(self._writer.index)
        self._writer = None


class _Writer:
    """Of one shard, which it creates. shard: its path without suffix; rows: how many it has."""

    def __init__(self, shard: str):
        self.shard, self.rows, self.process = shard, 0, os.getpid()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        self.index = os.open(f"{shard}.index", flags, 0o666)  # first: who finds the other finds this, too
        self.data = os.open(f"{shard}.bin", flags, 0o666)

    def append(self, keys: Sequence[bytes], rows: torch.Tensor) -> list[tuple[bytes, int, int]]:
        """rows: bfloat16 (keys, patches, vision hidden) on the CPU. Returns key, row and its checksum of each."""
        data = rows.contiguous().view(torch.uint8).numpy().reshape(len(keys), -1)
        _write(self.data, data.reshape(-1).data)
        os.fsync(self.data)
        numbered = enumerate(zip(keys, data, strict=True), self.rows)
        records = [(key, row, zlib.crc32(part)) for row, (key, part) in numbered]
        _write(self.index, memoryview(b"".join(RECORD.pack(*record, _checksum(*record)) for record in records)))
        self.rows += len(keys)
        return records


def _write(file: int, data: memoryview) -> None:
    while data:
        data = data[os.write(file, data) :]


def _checksum(key: bytes, row: int, checksum: int) -> int:
    """32 bits; not 0 for zeros only, which a power cut may leave."""
    return zlib.crc32(struct.pack("<II", row, checksum), zlib.crc32(key))
