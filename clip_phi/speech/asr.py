"""Speech to text: one interface, and the engines behind it."""

from pathlib import Path
from typing import Any, Protocol

from ..data.transcripts import ENGINES, AsrSettings, Engine
from .audio import Clip
from .transcript import Segment, Transcript, Word, one_line

DEFAULT = AsrSettings()


class Transcriber(Protocol):
    """engine, model: what hears, as make_transcriber was told."""

    engine: Engine
    model: str

    def transcribe(self, clip: Clip) -> Transcript:
        """What is said in a clip; one in which nobody speaks gives the text ""."""

    def close(self) -> None:
        """Give memory and processes back. May be called twice."""


def make_transcriber(
    engine: Engine = DEFAULT.engine,
    model: str = DEFAULT.model,
    device: str = "cpu",
    language: str | None = None,
    compute_type: str | None = None,
    word_timestamps: bool = False,
) -> Transcriber:
    """Load a model for hearing; never another engine than the one asked for.

    model: a name of Whisper ("tiny.en", "base.en", "small", "large-v3"), an id on the Hub or a local folder, in
    CTranslate2's form. device: cpu or cuda, or cuda:1. language: for example "en"; None to find it out by listening.
    compute_type: of CTranslate2; None for int8 on the CPU and float16 on CUDA. word_timestamps: tell the place of each
    word. Raises ValueError or OSError for what cannot be had, and ImportError if the engine is not installed."""
    if engine not in ENGINES:
        raise ValueError(f"no speech engine {engine!r}: there are {' and '.join(ENGINES)}")
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"speech is heard on cpu or cuda, not on {device!r}")
    if not Path(model).is_dir() and (model.count("/") > 1 or model.startswith((".", "/", "~"))):
        raise ValueError(f"no Whisper model in {model}: there is no such folder")
    compute_type = compute_type or ("int8" if kind == "cpu" else "float16")
    if engine == "whisperx":
        from .whisperx import WhisperXTranscriber

        return WhisperXTranscriber(model, device, language, compute_type, word_timestamps)
    return FasterWhisperTranscriber(model, device, language, compute_type, word_timestamps)


class FasterWhisperTranscriber:
    """faster-whisper, WhisperX's own engine, in this process. Greedy at temperature 0 with 5 beams, so that the same
    clip gives the same text; its voice detection is always on, or silence would become words."""

    engine: Engine = "faster-whisper"

    def __init__(self, model: str, device: str, language: str | None, compute_type: str, word_timestamps: bool):
        try:
            from faster_whisper import WhisperModel
        except ImportError as error:
            raise ImportError("hearing speech needs faster-whisper: pip install 'clip-phi[speech]'") from error
        self.model = model
        self.language = language
        self.word_timestamps = word_timestamps
        name, _, number = device.partition(":")
        try:
            self._whisper: Any = WhisperModel(
                model, device=name, device_index=int(number or 0), compute_type=compute_type
            )
        except (RuntimeError, OSError, ValueError) as error:  # CTranslate2 has only RuntimeError
            raise ValueError(f"cannot load the Whisper model {model}: {' '.join(str(error).split())}") from error
        if language is not None and language not in self._whisper.supported_languages:
            raise ValueError(f"the Whisper model {model} does not hear {language!r}: {self._languages()}")

    def transcribe(self, clip: Clip) -> Transcript:
        if self._whisper is None:
            raise ValueError("this transcriber is closed")
        found, about = self._whisper.transcribe(
            clip.samples,
            language=self.language,
            vad_filter=True,
            temperature=0.0,
            condition_on_previous_text=False,
            word_timestamps=self.word_timestamps,
        )
        segments = tuple(
            Segment(
                segment.text.strip(),
                float(segment.start),
                float(segment.end),
                tuple(Word(word.word.strip(), float(word.start), float(word.end)) for word in segment.words or ()),
            )
            for segment in found
        )
        return Transcript(one_line(segments), segments, about.language, self.engine, clip.seconds, clip.truncated)

    def close(self) -> None:
        self._whisper = None

    def _languages(self) -> str:
        known = self._whisper.supported_languages
        return f"it knows {', '.join(known)}" if len(known) < 10 else f"it knows {len(known)} languages, by their codes"
