"""What the readers share: json files, texts, and folders or archives of media, each with errors that name them."""

import gc
import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .sample import File
from .report import RecordError

MAX_PATH = 4096  # PATH_MAX of Linux; elsewhere it is less


def read_json(path: Path) -> Any:
    """Raises FileNotFoundError or ValueError (not json) with the file's name."""
    try:
        with no_collector():
            return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {path}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not json: {error}") from error


@contextmanager
def no_collector() -> Iterator[None]:
    """For millions of new objects, none of them garbage: looking for it would double the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def clean_text(value: Any, what: str) -> str:
    """A text, stripped. Raises RecordError if it is none, is empty, or holds half a surrogate pair (json's "\\ud800")."""
    if not isinstance(value, str):
        raise RecordError(f"{what} is not text", f"{type(value).__name__} {str(value)[:40]!r}")
    text = value.strip()
    if not text:
        raise RecordError(f"{what} is empty")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RecordError(f"{what} is not valid Unicode", f"character {error.start}") from None
    return text


def file_stamp(path: str) -> list[int] | None:
    """Changes when a file is written, or when an entry of a folder comes or goes; None if there is nothing."""
    try:
        status = os.stat(path or ".")
    except OSError:
        return None
    return [status.st_mtime_ns, status.st_size]


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link to itself
        return False


class MediaFolder:
    """Where the names of images or recordings are looked up: a folder, in which a subfolder (or the folder itself) may
    also be the zip archive that it was downloaded as. Names may be absolute.

    recordings: the folder of these, if it is another one.
    folders: those that were looked into; when a file comes or goes, their modification time changes."""

    def __init__(self, root: str | Path, recordings: str | Path | None = None):
        self.root = str(root)
        self.recordings = self.root if recordings is None else str(recordings)
        self.folders: dict[str, set[str]] = {}
        self._archives: dict[str, tuple[str, set[str]] | None] = {}

    def find(self, name: Any, what: str = "image") -> File:
        """Raises RecordError if the name is none, or there is no such file."""
        name = clean_text(name, f"{what} name")
        if "\0" in name:
            raise RecordError(f"{what} name is not valid", repr(name))
        root = self.recordings if what == "speech" else self.root
        path = os.path.join(root, name)
        if len(path) > MAX_PATH:
            raise RecordError(f"missing {what}", f"{path[:100]}... is a name of {len(path):,} characters")
        folder, base = os.path.split(path)
        if base and base in self._names(folder):
            return File(path)
        inside = base
        while len(folder) >= len(root) and folder:
            archive = self._archive(folder)
            if archive is not None:
                for member in (inside, f"{os.path.splitext(os.path.basename(folder))[0]}/{inside}"):
                    if member in archive[1]:
                        return File(archive[0], member)
            folder, step = os.path.split(folder)
            if not step:
                break
            inside = f"{step}/{inside}"
        raise RecordError(f"missing {what}", path)

    def file_stamps(self) -> dict[str, list[int] | None]:
        """What was looked into, with what tells whether files have come or gone since."""
        archives = [archive[0] for archive in self._archives.values() if archive is not None]
        return {path: file_stamp(path) for path in [*self.folders, *archives]}

    def _names(self, folder: str) -> set[str]:
        """Files of a folder; one listing is much cheaper than a question for each."""
        if folder not in self.folders:
            try:
                with os.scandir(folder or ".") as entries:
                    self.folders[folder] = {entry.name for entry in entries if _is_file(entry)}
            except (OSError, ValueError):
                self.folders[folder] = set()
        return self.folders[folder]

    def _archive(self, folder: str) -> tuple[str, set[str]] | None:
        if folder not in self._archives:
            path = folder if folder.endswith(".zip") else f"{folder}.zip"
            self._archives[folder] = None
            if os.path.isfile(path):
                try:
                    with zipfile.ZipFile(path) as archive:
                        self._archives[folder] = (path, set(archive.namelist()))
                except (OSError, zipfile.BadZipFile) as error:
                    raise ValueError(f"{path} is not a whole zip archive ({error}): download it again") from error
        return self._archives[folder]
