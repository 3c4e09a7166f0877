"""The optional modalities of chat page and API: speech in, speech and images out. Each is loaded at its first use."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from threading import Lock
from typing import Any

from PIL import Image

from ..speech.asr import make_transcriber
from ..speech.audio import load_audio
from ..speech.tts import Speech, make_tts
from .text_to_image import TextToImage


@dataclass
class Modalities:
    """Functions of the optional modalities; None where one is missing. Each raises ValueError for input it refuses."""

    transcribe: Callable[[str | bytes], str] | None = None  # the text of an audio file, by its path or bytes
    synthesize: Callable[[str], Iterator[Speech]] | None = None  # the speech of a text, sentence by sentence
    draw: Callable[[str, int], Image.Image] | None = None  # an image of a text, with a seed
    missing: list[str] = field(default_factory=list)  # why a modality is missing, one line each


def load_modalities(
    speech_model: str | None, voice: str | None, drawing_model: str | None, device: str | None, max_seconds: float = 30
) -> Modalities:
    """The modalities that are asked for and installed; None: not asked for.

    Args:
        speech_model: a Whisper model, for speech input.
        voice: for speech output, "" for the small English one, or the id of a transformers model.
        drawing_model: a diffusers model, on `device`, for image output.
        max_seconds: longest recording."""
    asr = _lazy(lambda: make_transcriber(model=speech_model or ""))
    tts = _lazy(lambda: make_tts(voice or None))
    drawer = _lazy(lambda: TextToImage(drawing_model or "", device))

    def transcribe(source: str | bytes) -> str:
        clip = load_audio(source, max_seconds)
        if clip.truncated:
            raise ValueError(f"the recording is damaged, or longer than the limit of {max_seconds:g} s")
        with asr() as model:
            text = model.transcribe(clip).text
        if not text:
            raise ValueError("no speech in the recording")
        return text

    def synthesize(text: str) -> Iterator[Speech]:
        with tts() as model:
            yield from model.stream(text)

    def draw(text: str, seed: int) -> Image.Image:
        with drawer() as model:
            return model.generate(text, seed)

    found = Modalities()
    hibari = () if "/" in (voice or "") else ("hibari",)
    for function, title, wanted, option, packages, extra in (
        (transcribe, "speech input", speech_model, "--speech_model", ("av", "faster_whisper"), "speech"),
        (synthesize, "speech output", voice, "--voice", hibari, "speech"),
        (draw, "image output", drawing_model, "--drawing_model", ("diffusers",), "draw"),
    ):
        missing = [package for package in packages if find_spec(package) is None]
        if wanted is None:
            found.missing.append(f"no {title}: start with {option}")
        elif missing:
            found.missing.append(f"no {title}: {missing[0]} is not installed; pip install 'clip-phi[{extra}]'")
        else:
            setattr(found, function.__name__, function)
    return found


def _lazy(load: Callable[[], Any]) -> Callable[[], AbstractContextManager[Any]]:
    """A context manager over a model that is loaded at its first use, and used by one thread at a time."""
    load, lock = functools.cache(load), Lock()

    @contextmanager
    def use() -> Iterator[Any]:
        with lock:
            yield load()

    return use
