"""Speech to text: one interface for all speech recognition engines."""

from typing import Any

from ..data.files import is_missing_folder
from ..data.transcripts import ENGINES, AsrSettings, Engine
from .audio import AudioClip
from .transcript import Segment, Transcript, Word, make_transcript
from .whisperx import WhisperXTranscriber

DEFAULT = AsrSettings()


def make_transcriber(
    engine: Engine = DEFAULT.engine, model: str = DEFAULT.model, device: str = "cpu", language: str | None = None,
    compute_type: str | None = None, word_timestamps: bool = False,
) -> "FasterWhisperTranscriber | WhisperXTranscriber":  # fmt: skip
    """Load a speech recognition model, whose `transcribe` gives the Transcript of an AudioClip, and whose `close` frees
    memory and processes. There is no fallback to another engine.

    Raises ValueError or OSError if the model cannot be loaded, ImportError if the engine is not installed.

    Args:
        model: a Whisper model in CTranslate2's format: a name ("tiny.en", "small", "large-v3"), Hub id or folder.
        device: cpu, cuda or cuda:1.
        language: for example "en"; None to detect it.
        compute_type: of CTranslate2; None for int8 on the CPU and float16 on CUDA.
        word_timestamps: whether segments have words."""
    if engine not in ENGINES:
        raise ValueError(f"no speech recognition engine {engine!r}: choose {' or '.join(ENGINES)}")
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"speech recognition runs on cpu or cuda, not on {device!r}")
    if is_missing_folder(model, id_needs_user=False):
        raise ValueError(f"no Whisper model in {model}: there is no such folder")
    compute_type = compute_type or ("int8" if kind == "cpu" else "float16")
    chosen: Any = WhisperXTranscriber if engine == "whisperx" else FasterWhisperTranscriber
    return chosen(model, device, language, compute_type, word_timestamps)


class FasterWhisperTranscriber:
    """faster-whisper, which WhisperX uses too, in this process.

    Temperature 0 and 5 beams: the same clip gives the same text. Voice activity detection is always on, since Whisper
    invents words in silence."""

    engine: Engine = "faster-whisper"

    def __init__(self, model: str, device: str, language: str | None, compute_type: str, word_timestamps: bool):
        try:
            from faster_whisper import WhisperModel
        except ImportError as error:
            raise ImportError("speech input needs faster-whisper: pip install 'clip-phi[speech]'") from error
        self.options = {"language": language, "word_timestamps": word_timestamps}
        name, _, number = device.partition(":")
        try:
            whisper = WhisperModel(model, device=name, device_index=int(number or 0), compute_type=compute_type)
        except (RuntimeError, OSError, ValueError) as error:  # CTranslate2 has only RuntimeError
            raise ValueError(f"cannot load the Whisper model {model}: {' '.join(str(error).split())}") from error
        if language is not None and language not in (known := whisper.supported_languages):
            names = ", ".join(known) if len(known) < 10 else f"{len(known)} languages, by their codes"
            raise ValueError(f"the Whisper model {model} does not support {language!r}: it supports {names}")
        self._whisper: Any = whisper

    def transcribe(self, clip: AudioClip) -> Transcript:
        if self._whisper is None:
            raise ValueError("this transcriber is closed")
        options = {"vad_filter": True, "temperature": 0.0, "condition_on_previous_text": False}
        found, about = self._whisper.transcribe(clip.samples, **self.options, **options)
        segments = []
        for each in found:
            words = tuple(Word(word.word.strip(), float(word.start), float(word.end)) for word in each.words or ())
            segments.append(Segment(each.text.strip(), float(each.start), float(each.end), words))
        return make_transcript(segments, about.language, self.engine, clip)

    def close(self) -> None:
        self._whisper = None
