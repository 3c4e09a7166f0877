"""What a speech recognizer returns."""

from dataclasses import dataclass
from typing import NamedTuple


class Word(NamedTuple):
    """start, end: seconds from the beginning of the clip; None where a word could not be placed."""

    word: str
    start: float | None
    end: float | None


class Segment(NamedTuple):
    """start, end: seconds from the beginning of the clip. words: if word timestamps were asked for."""

    text: str
    start: float
    end: float
    words: tuple[Word, ...] = ()


@dataclass(frozen=True)
class Transcript:
    """text: what is said, on one line; empty if nobody speaks. language: its code ("en"). engine: which one heard it.
    seconds, truncated: of the clip."""

    text: str
    segments: tuple[Segment, ...]
    language: str | None
    engine: str
    seconds: float
    truncated: bool


def one_line(segments: tuple[Segment, ...]) -> str:
    return " ".join(" ".join(segment.text for segment in segments).split())
