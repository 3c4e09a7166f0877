"""clip-phi download: public data sets from their official addresses, into the folders that the defaults read.

A file gets its name when its length and its checksum are right, and a folder when all of its archive is unpacked. Until
then it is NAME.part, beside NAME.part.jsonl, which says which pieces are there; a later run fetches the others."""

import fcntl
import hashlib
import os
import shutil
import stat
import threading
import zipfile
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tqdm import tqdm

from ..data.catalog import DATASETS, RemoteFile
from ..data.files import checked_line, read_checked_lines
from ..hub.retry import http, with_retries

PIECE = 16 * 2**20  # bytes that one request asks for; what a killed run may lose, for each connection
BLOCK = 2**20  # bytes read, hashed or unpacked at once


class Served(NamedTuple):
    """A file as its server describes it. size: in bytes. ranges: whether parts of it can be asked for."""

    url: str
    size: int
    ranges: bool


def download(name: str, folder: Path, mirror: str | None, keep_zip: bool, connections: int) -> list[dict[str, Any]]:
    """Download what is not there yet of a data set, a key of DATASETS. Returns path and state of each file.

    folder: of all data. mirror: http(s) address that replaces the beginning of each official one; paths stay.
    keep_zip: leave archives of images as they are: the readers read them. connections: at once.
    Raises ValueError or OSError, in one line, if the disk is too small, or the server does not give the right file."""
    if mirror is not None and (urlsplit(mirror).scheme not in ("http", "https") or not urlsplit(mirror).hostname):
        raise ValueError(f"--mirror {mirror}: an address begins with http:// or https://")
    files = DATASETS[name].files
    wanted = [file for file in files if not _is_there(file, folder, keep_zip)]
    with http.Client(follow_redirects=True, timeout=30, headers={"Accept-Encoding": "identity"}) as client:
        served = {file: _ask(client, file, mirror) for file in wanted if not (folder / file.path).exists()}
        _check_room(folder, wanted, served, keep_zip)
        for file in wanted:
            if file in served:
                _fetch(client, served[file], file, folder / file.path, connections)
            if not _stays_packed(file, keep_zip):
                _unpack(folder / file.path, file.members)
    states = {file: "downloaded" if file in served else "unpacked" for file in wanted}
    found = {file: [file.path] if (folder / file.path).exists() else file.targets() for file in files}
    pairs = ((path, states.get(file, "there already")) for file, paths in found.items() for path in paths)
    return [{"path": str(folder / path), "state": state} for path, state in pairs]


def _stays_packed(file: RemoteFile, keep_zip: bool) -> bool:
    """Images may stay in their archive."""
    return not file.members or (keep_zip and all(member.endswith("/") for member in file.members))


def _is_there(file: RemoteFile, folder: Path, keep_zip: bool) -> bool:
    """Whether a reader finds it. Raises ValueError for a file that another program has left in its place."""
    path = folder / file.path
    if path.exists() and file.size not in (None, path.stat().st_size):
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, and not the published {file.size:,}: remove it")
    is_unpacked = bool(file.members) and all((folder / target).exists() for target in file.targets())
    return is_unpacked or (path.exists() and _stays_packed(file, keep_zip))


def _ask(client: Any, file: RemoteFile, mirror: str | None) -> Served:
    """Size of a file, and whether its server sends parts. Raises ValueError if it is not the published one."""
    url = file.url if mirror is None else mirror.rstrip("/") + urlsplit(file.url).path

    def ask() -> Any:
        with client.stream("GET", url, headers={"Range": "bytes=0-0"}) as response:
            response.raise_for_status()
            return response.status_code, response.headers

    code, headers = with_retries(url, ask, server=urlsplit(url).netloc)
    text = headers.get("Content-Range" if code == 206 else "Content-Length", "").rpartition("/")[2]
    if not text.isdigit():
        raise ValueError(f"{url}: the server does not give its length; try another --mirror")
    if file.size not in (None, int(text)):
        hint = "it is another file, or a part; try later, or another --mirror"
        raise ValueError(f"{url} has {int(text):,} bytes, and not the published {file.size:,}: {hint}")
    return Served(url, int(text), code == 206)


def _check_room(folder: Path, wanted: list[RemoteFile], served: dict[RemoteFile, Served], keep_zip: bool) -> None:
    """Raises OSError if the disk is too small for the files, one after another, each with its unpacked content."""
    used = most = 0
    for file in wanted:
        size = served[file].size if file in served else (folder / file.path).stat().st_size
        part, unpacks = folder / f"{file.path}.part", not _stays_packed(file, keep_zip)
        there = part.stat().st_blocks * 512 if part.exists() else 0
        used += max(0, size - there) if file in served else 0
        most = max(most, used + unpacks * size)
        used -= size if unpacks and file not in served else 0  # unpacked, it takes the place of its archive
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if most > free:
        hint = "" if keep_zip else "; --keep_zip needs about half of it"
        raise OSError(f"{folder}: {most / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free{hint}")


def _fetch(client: Any, served: Served, file: RemoteFile, path: Path, connections: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part, notes = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.jsonl")
    with open(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"{part}: another download is writing it") from None
        step = PIECE if served.ranges else served.size
        whole = [file.sha256, served.size, step]
        lines = read_checked_lines(notes) if notes.exists() else []
        done = {line[-1] for line in lines if line[:-1] == whole}
        opened.truncate(served.size)
        starts = [start for start in range(0, served.size, step) if start not in done]
        have = served.size - sum(min(step, served.size - start) for start in starts)
        lock, stop = threading.Lock(), threading.Event()

        def fetch_piece(start: int) -> None:
            _fetch_range(client, served, opened.fileno(), start, min(start + step, served.size), bar, stop)
            os.fsync(opened.fileno())
            with lock, open(notes, "a", encoding="utf-8") as written:
                written.write(checked_line([*whole, start]))

        with _bar(desc=path.name, total=served.size, initial=have) as bar, ThreadPoolExecutor(connections) as pool:
            try:
                ended, _ = wait([pool.submit(fetch_piece, start) for start in starts], return_when=FIRST_EXCEPTION)
            except KeyboardInterrupt:
                raise OSError(f"stopped: the same command goes on with {part}") from None
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)
        for piece in ended:
            piece.result()  # raises its error
        digest = hashlib.sha256()
        opened.seek(0)
        with _bar(desc=f"checking {path.name}", total=served.size) as bar:
            while block := opened.read(BLOCK):
                digest.update(block)
                bar.update(len(block))
        notes.unlink(missing_ok=True)
        if (found := digest.hexdigest()) != file.sha256:
            part.unlink()
            hint = "It is removed: run the command again, or try another --mirror"
            raise ValueError(f"{served.url}: its SHA-256 is {found}, and not the published {file.sha256}. {hint}")
        os.replace(part, path)


def _fetch_range(client: Any, served: Served, file: int, start: int, end: int, bar: Any, stop: threading.Event) -> None:
    """Write bytes start to end of a file; after a cut, from there on if the server sends parts."""
    place = start

    def fetch() -> None:
        nonlocal place
        began = place
        headers = {"Range": f"bytes={place}-{end - 1}"} if served.ranges else {}
        try:
            with client.stream("GET", served.url, headers=headers) as response:
                response.raise_for_status()
                given = response.headers.get("Content-Range")
                if served.ranges and given != f"bytes {place}-{end - 1}/{served.size}":
                    raise ConnectionError(f"bytes {place}-{end - 1} were asked for, {given or 'all'} were sent")
                for block in response.iter_raw():
                    if stop.is_set():
                        return
                    block = block[: end - place]
                    while block:
                        written = os.pwrite(file, block, place)
                        block, place = block[written:], place + written
                        bar.update(written)
            if place < end:
                raise ConnectionError(f"it ended {end - place:,} bytes early")
        except (http.HTTPError, ConnectionError):
            if not served.ranges:
                bar.update(start - place)
                place = start
            if place == began or stop.is_set():  # no progress: wait, and at last give up
                raise

    while place < end:
        if stop.is_set():  # another piece has failed
            raise OSError("stopped")
        with_retries(served.url, fetch, server=urlsplit(served.url).netloc)


def _unpack(archive: Path, members: tuple[str, ...]) -> None:
    """Replace an archive by these members of it. None of them gets its name before all are unpacked.

    Raises ValueError if it is damaged or not what it should be, and OSError if the disk is too small."""
    temporary = archive.with_name(f".{archive.name}.unpacking")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as opened:
            folders = tuple(name for name in members if name.endswith("/"))
            chosen = [info for info in opened.infolist() if not info.is_dir()]
            chosen = [info for info in chosen if info.filename in members or info.filename.startswith(folders)]
            if absent := [name for name in members if not any(info.filename.startswith(name) for info in chosen)]:
                raise ValueError(f"{archive} has no {', '.join(absent)}")
            total, free = sum(info.file_size for info in chosen), shutil.disk_usage(archive.parent).free
            if total > free:
                raise OSError(f"{archive}: {total / 1e9:.1f} GB are needed to unpack it, {free / 1e9:.1f} GB free")
            with _bar(desc=f"unpacking {archive.name}", total=total) as bar:
                for info in chosen:
                    if ".." in Path(info.filename).parts or stat.S_ISLNK(info.external_attr >> 16):
                        raise ValueError(f"{archive}: {info.filename!r} is no plain file in it")
                    target = temporary / info.filename
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with opened.open(info) as source, open(target, "wb") as file:
                        shutil.copyfileobj(source, file, BLOCK)  # at its end the checksum is compared
                    bar.update(info.file_size)
        os.sync()  # a power cut must not leave empty files under their names
        for name in members:
            target = archive.parent / name
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(temporary / name, target)
        archive.unlink()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(f"{archive} is damaged ({error}): remove it, and run the command again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


_bar = partial(tqdm, disable=None, dynamic_ncols=True, unit="B", unit_scale=True, unit_divisor=1000)
