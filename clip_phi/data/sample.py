"""Sample: one image and the conversations about it. Every source gives it, and both stages train on it."""

import os
import zipfile
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from .report import RecordError

MAX_BYTES = 2**30  # of a file; 100 million pixels of 8 bytes are less
# A member of a zip archive that is larger, and packed more tightly, is a decompression bomb.
BOMB_BYTES, BOMB_RATIO = 64 * 2**20, 100


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
            row, _, column = self.member.partition("/")
            record, place = _open_arrow(self.path, os.getpid())[int(row)], ""
            if column not in record.column_names:  # which may have slashes, too
                column, _, place = column.rpartition("/")
            value = record[column].to_pylist()[0]
            value = value[int(place)] if place else value
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
