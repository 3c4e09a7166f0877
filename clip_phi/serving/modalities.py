"""The optional modalities of chat page and API: speech in, speech and images out. Each is loaded at its first use."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from threading import Lock
from typing import Any

from PIL import Image

Sound = tuple[int, Any]  # sampling rate in Hz, float32 (samples,)


@dataclass
class Modalities:
    """Functions of the optional modalities; None where one is missing. Each raises ValueError for input it refuses."""

    transcribe: Callable[[str | bytes], str] | None = None  # the text of an audio file, by its path or bytes
    synthesize: Callable[[str], Iterator[Sound]] | None = None  # the speech of a text, sentence by sentence
    draw: Callable[[str, int], Image.Image] | None = None  # an image of a text, with a seed
    missing: list[str] = field(default_factory=list)  # why a modality is missing, one line each


def load_modalities(
    speech_model: str | None, voice: str | None, drawing_model: str | None, device: str | None, max_seconds: float = 30
) -> Modalities:
    """The modalities that are asked for and installed.

    speech_model: a Whisper model; None for no speech input.
    voice: "" for the small English one, the id of a transformers model, or None for no speech output.
    drawing_model: a diffusers model, on `device`; None for no drawn images.
    max_seconds: longest recording."""
    lazy = _Lazy(speech_model, voice, drawing_model, device, max_seconds)
    found = Modalities()
    hibari = () if "/" in (voice or "") else ("hibari",)
    for name, title, wanted, option, packages, extra in (
        ("transcribe", "speech input", speech_model, "--speech_model", ("av", "faster_whisper"), "speech"),
        ("synthesize", "speech output", voice, "--voice", hibari, "speech"),
        ("draw", "image output", drawing_model, "--drawing_model", ("diffusers",), "draw"),
    ):
        missing = [package for package in packages if find_spec(package) is None]
        if wanted is None:
            found.missing.append(f"no {title}: start with {option}")
        elif missing:
            found.missing.append(f"no {title}: {missing[0]} is not installed; pip install 'clip-phi[{extra}]'")
        else:
            setattr(found, name, getattr(lazy, name))
    return found


@dataclass
class _Lazy:
    """The models, each loaded at its first use and used by one thread at a time."""

    speech_model: Any
    voice: str | None
    drawing_model: Any
    device: str | None
    max_seconds: float

    def __post_init__(self) -> None:
        self.asr_lock, self.tts_lock, self.drawer_lock = Lock(), Lock(), Lock()

    @cached_property
    def asr(self) -> Any:
        from ..speech.asr import make_transcriber

        return make_transcriber(model=self.speech_model)

    @cached_property
    def tts(self) -> Any:
        from ..speech.tts import make_tts

        return make_tts(self.voice or None)

    @cached_property
    def drawer(self) -> Any:
        from .text_to_image import TextToImage

        return TextToImage(self.drawing_model, self.device)

    def transcribe(self, source: str | bytes) -> str:
        from ..speech.audio import load_audio

        clip = load_audio(source, self.max_seconds)
        if clip.truncated:
            raise ValueError(f"the recording is damaged, or longer than the limit of {self.max_seconds:g} s")
        with self.asr_lock:
            text = self.asr.transcribe(clip).text
        if not text:
            raise ValueError("no speech in the recording")
        return text

    def synthesize(self, text: str) -> Iterator[Sound]:
        with self.tts_lock:
            for speech in self.tts.stream(text):
                yield speech.sampling_rate, speech.samples

    def draw(self, text: str, seed: int) -> Image.Image:
        with self.drawer_lock:
            return self.drawer.generate(text, seed)
