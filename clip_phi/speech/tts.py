"""Text to speech: a small offline voice, or any text-to-speech model of transformers."""

import re
import wave
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

# The end of a sentence: its mark, with what closes behind it, and then a space and not a small letter; or a new line.
_SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]]*(?=\s+[^\s\w]*[^\W_a-z])|\n")
_NOT_AN_END = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Mt|No|vs|etc|e\.g|i\.e|[A-Z]))\.$")


class Speech(NamedTuple):
    """samples: float32 mono in [-1, 1], shape (n,). sampling_rate: in Hz."""

    samples: np.ndarray
    sampling_rate: int

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.sampling_rate


class Speaker(Protocol):
    """voice: which one speaks. sampling_rate: of what it says, in Hz."""

    voice: str
    sampling_rate: int

    def speak(self, text: str) -> Speech:
        """Raises ValueError, naming the text, for what this voice cannot say."""

    def stream(self, text: str | Iterable[str]) -> Iterator[Speech]:
        """Sentence by sentence, each as soon as its text is complete. text: all of it, or pieces as they come."""


def make_speaker(voice: str | None = None) -> Speaker:
    """voice: None for the small English one that comes with the extra; the name of one of its sisters (which are
    downloaded once); or the Hub id or folder of a text-to-speech model of transformers (VITS, SpeechT5, Bark, ...).

    Raises ValueError or OSError if there is no such voice, and ImportError without the extra."""
    if voice is None or ("/" not in voice and not Path(voice).is_dir()):
        return HibariSpeaker(voice)
    return PipelineSpeaker(voice)


class SentenceSpeaker:
    """What all speakers share: long texts are spoken sentence by sentence."""

    voice: str
    sampling_rate: int

    def speak(self, text: str) -> Speech:
        return join(self.stream(text))

    def stream(self, text: str | Iterable[str]) -> Iterator[Speech]:
        marks: str | None = ""  # what was met without a letter, until something is said
        for sentence in split_sentences([text] if isinstance(text, str) else text):
            if any(character.isalnum() for character in sentence):
                marks = None
                yield self._say(sentence)
            elif marks is not None:
                marks += sentence
        if marks is not None:
            raise ValueError(f"there is nothing to say in {shorten(marks)!r}")

    def _say(self, sentence: str) -> Speech:
        speech = self._synthesize(sentence)
        if not len(speech.samples) or not np.isfinite(speech.samples).all() or not np.abs(speech.samples).max() > 1e-4:
            raise ValueError(f"the voice {self.voice} cannot say {shorten(sentence)!r}")
        return speech

    def _synthesize(self, sentence: str) -> Speech:
        raise NotImplementedError


class HibariSpeaker(SentenceSpeaker):
    """hibari-tts: a neural voice of 8 MB, a hundred times faster than speech on one core. English only."""

    def __init__(self, voice: str | None = None):
        try:
            from hibari import Hibari
            from hibari.voices import DEFAULT, VOICES
        except ImportError as error:
            raise ImportError("speaking needs a voice: pip install 'clip-phi[speech]'") from error
        self.voice = voice or DEFAULT
        if self.voice not in VOICES:
            raise ValueError(f"no voice {voice!r}: there are {', '.join(VOICES)}, and models of the Hub as user/name")
        try:
            self._voice = Hibari(self.voice)
        except RuntimeError as error:  # the download failed
            raise OSError(" ".join(str(error).split())) from error
        self.sampling_rate = self._voice.sample_rate

    def _synthesize(self, sentence: str) -> Speech:
        # It passes over what it cannot read: a word that gives no sound must not be missing in what is said.
        for word in sentence.split():
            if any(character.isalnum() for character in word) and not self._voice.g2p(word):
                raise ValueError(f"the voice {self.voice} cannot say {shorten(word)!r} in {shorten(sentence)!r}")
        # Its breath is noise: with a seed the same text is the same sound.
        return Speech(self._voice(sentence, seed=0).astype(np.float32, copy=False), self.sampling_rate)


class PipelineSpeaker(SentenceSpeaker):
    """Any model of transformers' text-to-speech pipeline, on the CPU."""

    def __init__(self, voice: str):
        from transformers import pipeline

        self.voice = voice
        self._pipeline: Any = pipeline("text-to-speech", model=voice)
        self.sampling_rate = int(self._pipeline.sampling_rate)

    def _synthesize(self, sentence: str) -> Speech:
        import torch

        try:
            with torch.random.fork_rng(devices=[]):  # many voices draw their intonation: the same text, the same sound
                torch.manual_seed(0)
                spoken = self._pipeline(sentence)
        except (RuntimeError, IndexError) as error:  # what models raise when no token of the text is known to them
            reason = " ".join(str(error).split())
            raise ValueError(f"the voice {self.voice} cannot say {shorten(sentence)!r}: {reason}") from error
        samples = np.asarray(spoken["audio"], dtype=np.float32)
        samples = samples.mean(axis=0) if samples.ndim == 2 else samples.reshape(-1)
        return Speech(samples, int(spoken["sampling_rate"]))


def split_sentences(pieces: Iterable[str]) -> Iterator[str]:
    """The sentences of a text that comes in pieces, each as soon as it is complete, stripped."""
    text = ""
    for piece in pieces:
        text += piece
        start = 0
        for end in _SENTENCE_END.finditer(text):
            sentence = text[start : end.end()]
            if end.group() != "\n" and _NOT_AN_END.search(sentence):
                continue
            start = end.end()
            if sentence.strip():
                yield sentence.strip()
        text = text[start:]
    if text.strip():
        yield text.strip()


def join(sentences: Iterable[Speech]) -> Speech:
    """One behind the other; all of one voice, and at least one."""
    samples, rates = zip(*sentences, strict=True)
    return Speech(np.concatenate(samples), rates[0])


def write_wav(path: str | Path, speech: Speech) -> None:
    """16-bit mono. Raises OSError if it cannot be written."""
    samples = (speech.samples.clip(-1, 1) * 32767).round().astype("<i2")
    with open(path, "wb") as file, wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(speech.sampling_rate)
        sound.writeframes(samples.tobytes())


def shorten(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
