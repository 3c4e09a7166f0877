"""Text to speech: a small offline voice, or any text-to-speech model of transformers."""

import re
import wave
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# The end of a sentence: its mark, closing quotes or brackets, then a space and no lower-case letter; or a new line.
_SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]]*(?=\s+[^\s\w]*[^\W_a-z])|\n")
_NOT_AN_END = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Mt|No|vs|etc|e\.g|i\.e|[A-Z]))\.$")


class Speech(NamedTuple):
    samples: np.ndarray  # float32 mono in [-1, 1], shape (samples,)
    sampling_rate: int  # in Hz

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.sampling_rate


class TextToSpeech:
    """A voice, which synthesizes long texts sentence by sentence."""

    voice: str  # its name
    sampling_rate: int  # of its speech, in Hz

    def synthesize(self, text: str) -> Speech:
        """Raises ValueError, with the text, where this voice produces no sound."""
        return join(self.stream(text))

    def stream(self, text: str | Iterable[str]) -> Iterator[Speech]:
        """The speech of each sentence, as soon as its text is complete. text: all of it, or pieces of a stream."""
        marks, has_words = "", False
        for sentence in split_sentences([text] if isinstance(text, str) else text):
            if not any(map(str.isalnum, sentence)):
                marks += sentence
                continue
            has_words, speech = True, self._synthesize(sentence)
            if not 1e-4 < np.abs(speech.samples).max(initial=0) < np.inf:  # the largest is NaN if one is
                raise self._silent(repr(shorten(sentence)))
            yield speech
        if not has_words:
            raise ValueError(f"there are no words in {shorten(marks)!r}")

    def _synthesize(self, sentence: str) -> Speech:
        raise NotImplementedError

    def _silent(self, what: str) -> ValueError:
        return ValueError(f"the voice {self.voice} produces no sound for {what}")


def make_tts(voice: str | None = None) -> TextToSpeech:
    """Load a voice.

    voice: None for the small English one of the extra; the name of another voice of hibari-tts (downloaded once); the
        Hub id or folder of a text-to-speech model of transformers (VITS, SpeechT5, Bark, ...).
    Raises ValueError or OSError if there is no such voice, ImportError without the extra."""
    is_hibari = voice is None or ("/" not in voice and not Path(voice).is_dir())
    return HibariTTS(voice) if is_hibari else PipelineTTS(str(voice))


class HibariTTS(TextToSpeech):
    """hibari-tts: a neural English voice of 8 MB, a hundred times faster than real time on one core."""

    def __init__(self, voice: str | None = None):
        try:
            from hibari import Hibari
            from hibari.voices import DEFAULT, VOICES
        except ImportError as error:
            raise ImportError("speech output needs a voice: pip install 'clip-phi[speech]'") from error
        self.voice = voice or DEFAULT
        if self.voice not in VOICES:
            raise ValueError(f"no voice {voice!r}: choose {', '.join(VOICES)}, or a Hub id as user/name")
        try:
            self._voice = Hibari(self.voice)
        except RuntimeError as error:  # the download failed
            raise OSError(" ".join(str(error).split())) from error
        self.sampling_rate = self._voice.sample_rate

    def _synthesize(self, sentence: str) -> Speech:
        # It skips what it cannot read: a word without sound must not be missing in the speech.
        for word in sentence.split():
            if any(map(str.isalnum, word)) and not self._voice.g2p(word):
                raise self._silent(f"{shorten(word)!r} in {shorten(sentence)!r}")
        # Its breath is noise: with a seed, the same text gives the same speech.
        return Speech(self._voice(sentence, seed=0).astype(np.float32, copy=False), self.sampling_rate)


class PipelineTTS(TextToSpeech):
    """Any model of transformers' text-to-speech pipeline, on the CPU."""

    def __init__(self, voice: str):
        from transformers import pipeline

        self.voice = voice
        self._pipeline: Any = pipeline("text-to-speech", model=voice)
        self.sampling_rate = int(self._pipeline.sampling_rate)

    def _synthesize(self, sentence: str) -> Speech:
        import torch

        try:
            with torch.random.fork_rng(devices=[]):  # many voices sample their intonation: same text, same speech
                torch.manual_seed(0)
                output = self._pipeline(sentence)
        except (RuntimeError, IndexError) as error:  # what models raise when they know no token of the text
            raise self._silent(f"{shorten(sentence)!r}: {' '.join(str(error).split())}") from error
        samples = np.asarray(output["audio"], dtype=np.float32)
        samples = samples.mean(axis=0) if samples.ndim == 2 else samples.reshape(-1)
        return Speech(samples, int(output["sampling_rate"]))


def split_sentences(pieces: Iterable[str]) -> Iterator[str]:
    """The sentences of a text in pieces, stripped, each as soon as it is complete."""
    text = ""
    for piece in pieces:
        text, start = text + piece, 0
        for end in _SENTENCE_END.finditer(text):
            sentence = text[start : end.end()]
            if end.group() == "\n" or not _NOT_AN_END.search(sentence):
                start = end.end()
                yield from filter(None, [sentence.strip()])
        text = text[start:]
    yield from filter(None, [text.strip()])


def join(sentences: Iterable[Speech]) -> Speech:
    """Concatenate at least one Speech of one voice."""
    samples, rates = zip(*sentences, strict=True)
    return Speech(np.concatenate(samples), rates[0])


def write_wav(path: str | Path, speech: Speech) -> None:
    """Write a 16-bit mono wav file. Raises OSError if it cannot be written."""
    samples = (speech.samples.clip(-1, 1) * 32767).round().astype("<i2")
    with open(path, "wb") as file, wave.open(file, "wb") as wav:
        wav.setparams((1, 2, speech.sampling_rate, 0, "NONE", ""))
        wav.writeframes(samples.tobytes())


def shorten(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
