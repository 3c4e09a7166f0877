"""Sample, an image and the conversations about it, which every source gives; and the Report of what is wrong.

Each record that is skipped or repaired is counted by kind, with the first examples."""

import json
import os
import re
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

MAX_BYTES = 2**30  # of a file; 100 million pixels of 8 bytes are less
# A member of a zip archive that is larger, and packed more tightly, is a decompression bomb.
BOMB_BYTES, BOMB_RATIO = 64 * 2**20, 100
NUM_EXAMPLES = 3  # of each kind of what is wrong, in the order of the files


def plain(text: str) -> str:
    """The text, with all but line ends, tabs and what is visible escaped: data must not control a terminal."""
    return re.sub(r"[^\n\t -~]", lambda found: found[0] if found[0].isprintable() else ascii(found[0])[1:-1], text)


def plain_json(value: Any, indent: int | None = None) -> str:
    """Json with readable letters of all scripts, in which characters that plain() escapes are escaped as well."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return re.sub(r"[^\n -~]", lambda found: found[0] if found[0].isprintable() else json.dumps(found[0])[1:-1], text)


class RecordError(ValueError):
    """What is wrong with one record. kind: a few words, under which it is counted; detail: what exactly."""

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind, self.detail = kind, detail


class Skip(NamedTuple):
    """Records that are left out. A sample without its image loses all its conversations. records 0: one is repaired."""

    kind: str
    origin: str
    detail: str
    records: int = 1


@dataclass
class Report:
    """A record is one caption or one conversation.

    records: all that were read. So records - num_skipped are trained on; nothing else is ever left out.
    skipped, repaired: how many, by kind. A repaired one is used, but cut to length, or with its image put first.
    filtered: turns that the source's own options leave out; they are no records. examples: the first of each kind."""

    records: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    filtered: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set, repr=False)

    @property
    def num_skipped(self) -> int:
        return sum(self.skipped.values())

    def skip(self, skip: Skip) -> None:
        """Count records that are left out, or one that is repaired."""
        self._count(self.skipped if skip.records else self.repaired, *skip)

    def filter(self, kind: str, origin: str, count: int) -> None:
        self._count(self.filtered, kind, origin, "", count)

    def _count(self, counts: Counter[str], kind: str, origin: str, detail: str, number: int) -> None:
        counts[kind] += number or 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < NUM_EXAMPLES:
            text = f"{origin}: {detail}" if detail else origin
            # An unpaired surrogate, in the id or a key of a record, can neither be printed nor written.
            examples.append(text.encode("utf-8", "backslashreplace").decode("utf-8"))

    def repair(self, kind: str, origin: str, detail: str = "") -> None:
        self.skip(Skip(kind, origin, detail, records=0))

    def reject(self, kind: str, origin: str, detail: str = "", records: int = 1) -> None:
        """Count records that a reader cannot use."""
        self.records += records
        self.skip(Skip(kind, origin, detail, records))

    def skip_once(self, skips: list[Skip]) -> None:
        """Count what turns out to be bad in training, in the first epoch only."""
        for skip in skips:
            if skip.origin not in self.seen:
                self.seen.add(skip.origin)
                self.skip(skip)

    def add(self, other: "Report") -> None:
        """Add the report of another source."""
        for name in ("records", "skipped", "repaired", "filtered"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for kind, examples in other.examples.items():
            self.examples[kind] = [*self.examples.get(kind, []), *examples][:NUM_EXAMPLES]

    def refuse_bad(self, max_bad_fraction: float) -> None:
        """Raises ValueError, with the whole table, if more than this share of the records is skipped."""
        if self.num_skipped > max_bad_fraction * self.records:
            share = self.num_skipped / max(self.records, 1)
            bad = f"{self.num_skipped:,} of {self.records:,} records are bad ({share:.2%})"
            allowed = f"more than --max_bad_fraction {max_bad_fraction:g} allows"
            way_out = "Repair them, or allow more with --max_bad_fraction."
            raise ValueError(f"{bad}, {allowed}:\n{self.table()}\n{way_out}")

    def table(self) -> str:
        """A line for each kind with its first example, the most frequent kind first."""
        lines = []
        for what, counts in (("skipped", self.skipped), ("repaired", self.repaired), ("left out", self.filtered)):
            for kind, count in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])):
                lines.append(f"  {what} {count:,}: {kind} (e.g. {self.examples[kind][0]})".replace("\n", "⏎"))
        return plain("\n".join(lines))

    def as_dict(self) -> dict[str, Any]:
        """For json. Equal data give an equal dict."""
        names = ("skipped", "repaired", *(["filtered"] if self.filtered else []), "examples")
        return {"records": self.records} | {name: dict(sorted(getattr(self, name).items())) for name in names}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Report":
        counts: dict[str, Any] = {name: Counter(values.get(name, {})) for name in ("skipped", "repaired", "filtered")}
        return cls(values["records"], examples=dict(values["examples"]), **counts)


class File(NamedTuple):
    """Where the bytes of an image or a recording are. A plain value that holds nothing open.

    path: a file, a zip archive, or an Arrow file of `datasets`.
    member: the name in the archive; "row/column", or "row/column/place" for a list, in the Arrow file."""

    path: str
    member: str | None = None

    def __str__(self) -> str:
        return self.path if self.member is None else f"{self.path}!{self.member}"

    def read(self) -> bytes:
        """Raises OSError, BadZipFile or KeyError, or RecordError "file too large", before a bomb is unpacked."""
        if self.member is None:
            with open(self.path, "rb") as file:
                if (size := os.fstat(file.fileno()).st_size) > MAX_BYTES:
                    raise RecordError("file too large", f"{size:,} bytes")
                return file.read()
        if self.path.endswith(".arrow"):
            row, column, *place = self.member.split("/")
            value = _open_arrow(self.path, os.getpid())[int(row)][column].to_pylist()[0]
            value = value[int(place[0])] if place else value
            return value["bytes"] if isinstance(value, dict) else value
        archive = _open_zip(self.path, os.getpid())
        about = archive.getinfo(self.member)
        size, packed = about.file_size, about.compress_size
        if size > MAX_BYTES or (size > BOMB_BYTES and size > BOMB_RATIO * packed):
            raise RecordError("file too large", f"{size:,} bytes, packed into {packed:,}")
        return archive.read(about)


# Kept open, by process: forked workers must not share the position in one open file.
@lru_cache(maxsize=16)
def _open_zip(path: str, process: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


@lru_cache(maxsize=256)
def _open_arrow(path: str, process: int) -> Any:
    from datasets import Dataset

    return Dataset.from_file(path).with_format("arrow")


# The text of a turn whose question is in the transcript alone, in training as in use.
SPOKEN_INSTRUCTION = "Answer the spoken question."


class Turn(NamedTuple):
    """One turn of a conversation.

    text: the question, or the answer to train on. transcript: of speech, a recording that precedes the text of a user's
    turn. references: all accepted answers to a question, where a data set has several."""

    role: Literal["system", "user", "assistant"]
    text: str
    transcript: str | None = None
    speech: File | bytes | None = None
    references: tuple[str, ...] = ()


Conversation = tuple[Turn, ...]
Images = File | bytes | tuple[File | bytes, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """An image (None for a text-only record; several as a tuple) and independent conversations about it.

    Stage 1: five captions, each a conversation of one assistant's turn. Stage 2: one or more conversations.
    origins: "file:record" of each conversation, for messages about it.
    ids: of each conversation its record's number, and the question_id, or a caption's image id, or None; or empty."""

    image: Images | None
    conversations: tuple[Conversation, ...]
    origins: tuple[str, ...]
    ids: tuple[tuple[int, Any], ...] = field(default=(), compare=False)


def images_of(image: Images | None) -> tuple[File | bytes, ...]:
    """The images of a Sample, in their order; a File is a tuple too."""
    images = (image,) if isinstance(image, File | bytes) else image
    return images or ()


def user_message(text: str | None, images: int = 0, *transcripts: str | None) -> dict[str, Any]:
    """A user's turn in the chat format of transformers: images as placeholders, transcripts of speech, text.

    text: the question, None or empty for none. images: how many. transcripts: of its recordings; None is left out."""
    content = [{"type": "image"}] * images
    content += [{"type": "transcript", "text": each} for each in transcripts if each is not None]
    return {"role": "user", "content": content + ([{"type": "text", "text": text}] if text else [])}


def as_messages(conversation: Conversation, num_images: int) -> list[dict[str, Any]]:
    """A conversation in the chat format of transformers, its images (as placeholders) first."""
    images_apart = num_images and (not conversation or conversation[0].role != "user")
    messages = [user_message(None, num_images)] if images_apart else []
    for turn in conversation:
        if turn.role == "user":
            messages.append(user_message(turn.text, 0 if messages else num_images, turn.transcript))
        else:
            messages.append({"role": turn.role, "content": [{"type": "text", "text": turn.text}]})
    return messages
