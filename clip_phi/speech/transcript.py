"""The result of speech recognition."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from .audio import AudioClip


class Word(NamedTuple):
    """start, end: seconds from the beginning of the clip; None where the word could not be aligned."""

    word: str
    start: float | None
    end: float | None


class Segment(NamedTuple):
    """start, end: seconds from the beginning of the clip. words: with word timestamps only."""

    text: str
    start: float
    end: float
    words: tuple[Word, ...] = ()


@dataclass(frozen=True)
class Transcript:
    """The recognized speech of a clip.

    text: on one line; empty without speech.
    language: its code, for example "en".
    engine: name of the speech recognition engine.
    seconds, truncated: of the clip."""

    text: str
    segments: tuple[Segment, ...]
    language: str | None
    engine: str
    seconds: float
    truncated: bool


def make_transcript(segments: Iterable[Segment], language: str | None, engine: str, clip: AudioClip) -> Transcript:
    segments = tuple(segments)
    text = " ".join(" ".join(segment.text for segment in segments).split())
    return Transcript(text, segments, language, engine, clip.seconds, clip.truncated)
