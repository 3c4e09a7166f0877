"""What the readers share: json files, texts, and folders or archives of media, with errors that name them."""

import base64
import gc
import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from os.path import isfile
from pathlib import Path
from typing import Any
from unicodedata import normalize
from urllib.parse import unquote

from .report import NUM_EXAMPLES, RecordError
from .sample import File

MAX_PATH = 4096  # PATH_MAX of Linux; elsewhere it is less
# A data URI, or the first bytes of JPEG, PNG, GIF, WebP or BMP
BASE64 = re.compile(r"data:[^,]*;base64,|(/9j/|iVBORw0KG|R0lGOD|UklGR|Qk[0-3])[A-Za-z0-9+/]{32,}")


def read_json(path: Path, what: str = "", lists: Sequence[str] = ()) -> Any:
    """The content of a json file. what: the kind of file; lists: keys that it must have, with lists.

    Raises FileNotFoundError or ValueError (not json, or of another kind) with the file's name."""
    try:
        with no_collector():
            content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {path}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not json: {error}") from error
    if absent := [key for key in lists if not isinstance(content, dict) or not isinstance(content.get(key), list)]:
        raise ValueError(f"{path} is not a {what}: it needs a list {absent[0]!r}")
    return content


def read_object(path: Path) -> dict[str, Any]:
    """The object in a json file. Raises as read_json does."""
    if not isinstance(content := read_json(path), dict):
        raise ValueError(f"{path} is not a json object")
    return content


def is_missing_folder(model: str, id_needs_user: bool = True) -> bool:
    """Whether a model's name means a folder that does not exist, and must not be looked for on the Hub: all but
    user/name, where no folder here is called user. id_needs_user: False if it may be at the Hub's root, as gpt2."""
    if Path(model).is_dir():
        return False
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        return "/" in model or id_needs_user
    user = model.partition("/")[0]
    return user == "outputs" or Path(user).is_dir()  # where training writes by default


@contextmanager
def no_collector() -> Iterator[None]:
    """Switch the garbage collector off: with millions of new objects it would double the time."""
    restore = gc.enable if gc.isenabled() else gc.disable
    gc.disable()
    try:
        yield
    finally:
        restore()


def clean_text(value: Any, what: str) -> str:
    """A text, stripped. Raises RecordError if it is no text, empty, or has an unpaired surrogate (json's "\\ud800")."""
    if not isinstance(value, str):
        raise RecordError(f"{what} is not text", f"{type(value).__name__} {str(value)[:40]!r}")
    text = value.strip()
    if not text:
        raise RecordError(f"{what} is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError(f"{what} is not valid Unicode", f"character {error.start}") from None
    return text


def checked_line(value: Any) -> str:
    """A line of json, a list of the checksum of the value and the value."""
    text = json.dumps(value)
    return f'["{zlib.crc32(text.encode()):08x}", {text}]\n'


def read_checked_lines(path: Path) -> list[Any]:
    """The values of a file of checked_line(), but for lines that were cut or have changed on disk."""
    texts = ((line, line[13:-1]) for line in path.read_bytes().split(b"\n"))
    return [json.loads(text) for line, text in texts if line == b'["%08x", %b]' % (zlib.crc32(text), text)]


def replace_file(path: Path, text: str) -> None:
    """Write a text file under another name and rename it, so that a kill leaves the whole old or new one."""
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def file_stamp(path: str) -> list[int] | None:
    """Modification time and size, which change with a file, and with a folder's entries. None if there is none."""
    with suppress(OSError):
        status = os.stat(path or ".")
        return [status.st_mtime_ns, status.st_size]
    return None


def coco_names(image_id: Any) -> list[str]:
    """Where COCO 2017 has an image, by its id. Those of 2014 are the same images, divided otherwise."""
    is_number = str(image_id).isdecimal()
    return [f"{folder}{int(image_id):012d}.jpg" for folder in ("", "train2017/", "val2017/") if is_number]


def _spellings(name: str) -> list[str]:
    """Other spellings of a file's name: of a file URL, with slashes, without %20, of both Unicode forms, with ~."""
    found = [name.removeprefix("file://localhost").removeprefix("file://").removeprefix("file:")]
    found += [each.replace("\\", "/") for each in found]
    found += [unquote(each) for each in found]
    found += [normalize(form, each) for each in found for form in ("NFC", "NFD")]
    found += [os.path.expanduser(each) for each in found if each.startswith("~")]
    return [each for each in dict.fromkeys(found) if each != name and "\0" not in each]


class MediaFolder:
    """A folder in which images and recordings are found by name. Names may be absolute.

    A subfolder, or the folder itself, may also be the zip archive that it was downloaded as. recordings: the folder of
    the recordings, if it is another one. folders: those that were searched, each with the names of its files."""

    def __init__(self, root: str | Path, recordings: str | Path | None = None):
        self.root = str(root)
        self.recordings = self.root if recordings is None else str(recordings)
        self.folders: dict[str, set[str]] = {}
        self._num_hints = 0
        self._archives: dict[str, tuple[str, set[str]] | None] = {}

    def find_value(self, value: Any, column: str, what: str, in_table: bool = False) -> File | bytes:
        """For schema.Find: bytes, base64 or a data URI of them, a name, a file URL or an id; in a table also a dict, of
        bytes (or the File that has them) or path."""
        if in_table and isinstance(value, Mapping):
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if value == b"":
            raise RecordError(f"{what} is empty")
        if isinstance(value, bytes | File):
            return value
        if column.lower() in ("image_id", "imageid"):  # of VQA and GQA
            return self.find(f"{value}.jpg", f"{value}.png", str(value), *coco_names(value), what=what)
        if isinstance(value, str) and BASE64.match(value[:64]):
            try:
                text = value.partition(",")[2] if value.startswith("data:") else value
                return base64.b64decode("".join(text.split()), validate=True)
            except ValueError as error:
                raise RecordError(f"{what} is not valid base64", str(error)) from None
        if isinstance(value, str) and re.match("[a-z][a-z0-9+]+://", value) and not value.startswith("file:"):
            raise RecordError(f"{what} is a URL", f"{value[:80]}: download it, and name the file")
        return self.find(value, what=what)

    def find(self, *names: Any, what: str = "image") -> File:
        """The first of these names that exists. Raises the RecordError of the first name if none does."""
        root, valid, errors = self.recordings if what == "speech" else self.root, list[str](), list[RecordError]()
        for name in names:
            try:
                path = os.path.join(root, text := clean_text(name, f"{what} name"))
                if "\0" in text or len(path) > MAX_PATH:
                    raise RecordError(f"{what} name is not valid", repr(text[:100]))
                if (found := self._look_up(root, path)) is not None:
                    return found
                valid.append(text)
                raise RecordError(f"missing {what}", path)
            except RecordError as error:
                errors.append(error)
        for spelling in chain.from_iterable(map(_spellings, valid)):
            if (found := self._look_up(root, os.path.join(root, spelling))) is not None:
                return found
        hint = self._hint(errors[0].detail) if errors[0].kind.startswith("missing") else ""
        raise RecordError(errors[0].kind, f"{errors[0].detail}{hint}")

    def _hint(self, path: str) -> str:
        """Why a file may be missing; for the first few of them, since it takes time."""
        if self._num_hints == NUM_EXAMPLES:
            return ""
        self._num_hints += 1
        folder, base = os.path.split(path.replace("\\", "/"))
        if base in self._names(self.root):
            return f" (it is in {self.root}, without a folder)"
        if not os.path.isdir(folder or "."):
            return f" (there is no folder {folder})"
        stem = os.path.splitext(base.casefold())[0]
        near = sorted(name for name in self._names(folder) if os.path.splitext(name.casefold())[0] == stem)
        return f" (there is {near[0]!r})" if near else ""

    def _look_up(self, root: str, path: str) -> File | None:
        folder, inside = os.path.split(path)
        if inside and inside in self._names(folder):
            return File(path)
        while len(folder) >= len(root) and folder:
            if (archive := self._archive(folder)) is not None:
                for member in (inside, f"{Path(folder).stem}/{inside}"):
                    if member in archive[1]:
                        return File(archive[0], member)
            folder, step = os.path.split(folder)
            if not step:
                break
            inside = f"{step}/{inside}"
        return None

    def file_stamps(self) -> dict[str, list[int] | None]:
        """file_stamp() of each folder and archive that was searched."""
        archives = [archive[0] for archive in self._archives.values() if archive is not None]
        return {path: file_stamp(path) for path in [*self.folders, *archives]}

    def _names(self, folder: str) -> set[str]:
        """Files of a folder. One listing is much cheaper than a system call for each name."""
        if folder not in self.folders:
            self.folders[folder] = set()
            with suppress(OSError, ValueError), os.scandir(folder or ".") as entries:
                # isfile() for links: is_file() raises OSError for one to itself.
                files = (each.name for each in entries if (isfile(each) if each.is_symlink() else each.is_file()))
                self.folders[folder] = set(files)
        return self.folders[folder]

    def _archive(self, folder: str) -> tuple[str, set[str]] | None:
        if folder not in self._archives:
            path = folder if folder.endswith(".zip") else f"{folder}.zip"
            self._archives[folder] = None
            if isfile(path):
                try:
                    with zipfile.ZipFile(path) as archive:
                        self._archives[folder] = (path, set(archive.namelist()))
                except (OSError, zipfile.BadZipFile) as error:
                    raise ValueError(f"{path} is not a whole zip archive ({error}): download it again") from error
        return self._archives[folder]
