"""The worker process: a script in WhisperX's own Python environment. It cannot import this project.

    python whisperx_worker.py MODEL DEVICE COMPUTE_TYPE LANGUAGE WORD_TIMESTAMPS VAD

It prints JSON lines. The first is {"whisperx": version} or {"error"}. Then for each line of stdin, base64 of float32 at
16 kHz, one line: {"segments": [{"text", "start", "end", "words": [[word, start, end], ...]}], "language"} or {"error"}.
It exits at the end of stdin.

    python whisperx_worker.py --check VAD

imports everything for speech recognition and prints WhisperX's version.
"""

import base64
import importlib
import importlib.metadata
import json
import os
import sys
import traceback
import types
from typing import Any

SAMPLING_RATE = 16_000
CHUNK_SECONDS = 30
PYANNOTE = ("", ".core", ".audio", ".audio.core", ".audio.core.io", ".audio.pipelines", ".audio.pipelines.utils")


def main(model: str, device: str, compute_type: str, language: str, word_timestamps: str, vad: str) -> None:
    # WhisperX and its dependencies print: keep their output off the stdout of the protocol.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def send(**message: Any) -> None:
        out.write(json.dumps(message) + "\n")

    def send_error(error: BaseException) -> None:
        traceback.print_exc()
        send(error=f"{type(error).__name__}: {error}")

    try:
        transcribe = make_asr(model, device, compute_type, language or None, word_timestamps == "1", vad)
        send(whisperx=importlib.metadata.version("whisperx"))
    except BaseException as error:
        send_error(error)
        return
    for line in sys.stdin:
        try:
            send(**transcribe(base64.b64decode(line)))
        except Exception as error:
            send_error(error)


def make_asr(model: str, device: str, compute_type: str, language: str | None, word_timestamps: bool, vad: str) -> Any:
    """A function from the bytes of float32 samples to {"segments", "language"}."""
    import numpy as np

    if vad == "silero":
        stub_pyannote()
    import whisperx

    name, _, number = device.partition(":")
    options: dict[str, Any] = {"device_index": int(number or 0), "compute_type": compute_type, "language": language}
    options |= {"vad_model": make_silero()} if vad == "silero" else {"vad_method": vad}
    options["threads"] = int(os.environ.get("OMP_NUM_THREADS") or 4)
    pipeline = whisperx.load_model(model, name, **options)
    if not pipeline.model.model.is_multilingual:
        if language not in (None, "en"):
            raise ValueError(f"the Whisper model {model} supports English only, not {language!r}")
        language = "en"  # such a model cannot detect a language
    aligners: dict[Any, Any] = {}

    def transcribe(data: bytes) -> dict[str, Any]:
        audio = np.frombuffer(data, dtype=np.float32).copy()
        if vad != "silero" and not np.any(audio):
            return {"segments": [], "language": language}
        found = pipeline.transcribe(audio, batch_size=8, language=language)
        segments, detected = found["segments"], found.get("language") or language
        if word_timestamps and segments:
            if detected not in aligners:
                aligners[detected] = whisperx.load_align_model(detected, device)
            aligner, about = aligners[detected]
            segments = whisperx.align(segments, aligner, about, audio, device)["segments"]
        return {"segments": [as_plain(segment) for segment in segments], "language": detected}

    return transcribe


def as_plain(segment: dict[str, Any]) -> dict[str, Any]:
    def seconds(value: Any) -> float | None:  # none, or NaN, where a word could not be aligned
        return None if value is None or value != value else float(value)

    found = segment.get("words") or ()
    words = [(each["word"], seconds(each.get("start")), seconds(each.get("end"))) for each in found]
    return {"text": segment["text"], "start": float(segment["start"]), "end": float(segment["end"]), "words": words}


def stub_pyannote() -> None:
    """Let WhisperX import pyannote in the light form, which neither has nor uses it."""

    class Missing(types.ModuleType):
        __path__: list[str] = []

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    for name in PYANNOTE:
        sys.modules[f"pyannote{name}"] = Missing(f"pyannote{name}")


def make_silero() -> Any:
    """Voice activity detection with the Silero model of faster-whisper."""
    from faster_whisper.vad import VadOptions, get_speech_timestamps
    from whisperx.diarize import Segment
    from whisperx.vads import Vad

    class Silero(Vad):
        @staticmethod
        def preprocess_audio(audio: Any) -> Any:
            return audio

        def __call__(self, audio: dict[str, Any], **options: Any) -> list[Any]:
            spans = get_speech_timestamps(audio["waveform"], VadOptions(max_speech_duration_s=CHUNK_SECONDS))
            return [Segment(span["start"] / SAMPLING_RATE, span["end"] / SAMPLING_RATE, "UNKNOWN") for span in spans]

        @staticmethod
        def merge_chunks(segments: list[Any], chunk_size: int, onset: float = 0.5, offset: float | None = None) -> Any:
            return Vad.merge_chunks(segments, chunk_size, onset, offset) if segments else []

    return Silero(0.5)


def check(vad: str) -> None:
    if vad == "silero":
        stub_pyannote()
        make_silero()
    importlib.import_module("whisperx.asr")
    print(importlib.metadata.version("whisperx"))


if __name__ == "__main__":
    check(sys.argv[2]) if sys.argv[1] == "--check" else main(*sys.argv[1:])
