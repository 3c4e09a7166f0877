"""The result of speech recognition."""

from dataclasses import dataclass
from typing import NamedTuple

from .audio import AudioClip


class Word(NamedTuple):
    word: str
    start: float | None  # seconds from the beginning of the clip; None where the word could not be aligned
    end: float | None


class Segment(NamedTuple):
    text: str
    start: float  # seconds from the beginning of the clip
    end: float
    words: tuple[Word, ...] = ()  # with word timestamps only


@dataclass(frozen=True)
class Transcript:
    """The recognized speech of a clip."""

    text: str  # on one line; empty without speech
    segments: tuple[Segment, ...]
    language: str | None  # its code, for example "en"
    engine: str
    seconds: float  # of the clip, as truncated
    truncated: bool


def make_transcript(segments: list[Segment], language: str | None, engine: str, clip: AudioClip) -> Transcript:
    text = " ".join(" ".join(segment.text for segment in segments).split())
    return Transcript(text, tuple(segments), language, engine, clip.seconds, clip.truncated)
