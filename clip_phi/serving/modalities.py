"""The optional senses of page and API: hearing, speaking, drawing. Each is loaded when it is first used."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from PIL import Image

Sound = tuple[int, Any]  # sampling rate in Hz, float32 (samples,)


@dataclass
class Parts:
    """hear: the words in a sound file, or in what one holds. speak: a text sentence by sentence. draw: a picture of a
    text, by a seed. Each raises ValueError for what it cannot do. None where a part is not there: missing says why."""

    hear: Callable[[str | bytes], str] | None = None
    speak: Callable[[str], Iterator[Sound]] | None = None
    draw: Callable[[str, int], Image.Image] | None = None
    missing: list[str] = field(default_factory=list)


def find_parts(
    speech_model: str | None, voice: str | None, drawing_model: str | None, device: str | None, max_seconds: float = 30
) -> Parts:
    """What is installed and asked for. speech_model: a Whisper model; None: no hearing. voice: "" is the small English
    one, a name with a slash a model of transformers, None: no voice. drawing_model: of diffusers, on `device`; None: no
    drawing."""
    parts = Parts()
    needs: dict[str, tuple[Any, str, tuple[str, ...], str, Callable[[], Any]]] = {
        "hear": (
            speech_model,
            "--speech_model",
            ("av", "faster_whisper"),
            "speech",
            lambda: _ear(speech_model, max_seconds),
        ),
        "speak": (voice, "--voice", () if "/" in (voice or "") else ("hibari",), "speech", lambda: _voice(voice)),
        "draw": (drawing_model, "--drawing_model", ("diffusers",), "draw", lambda: _hand(drawing_model, device)),
    }
    for name, (wanted, option, packages, extra, make) in needs.items():
        if wanted is None:
            parts.missing.append(f"no way to {name}: start with {option}")
        elif lacking := [package for package in packages if find_spec(package) is None]:
            parts.missing.append(f"no way to {name}, for {lacking[0]} is missing: pip install 'clip-phi[{extra}]'")
        else:
            setattr(parts, name, make())
    return parts


class _Lazy:
    """Something that is made when it is first asked for, and used by one thread at a time."""

    def __init__(self, make: Callable[[], Any]):
        self.make, self.made, self.lock = make, None, threading.Lock()

    def __enter__(self) -> Any:
        self.lock.acquire()
        try:
            self.made = self.make() if self.made is None else self.made
        except BaseException:
            self.lock.release()
            raise
        return self.made

    def __exit__(self, *error: Any) -> None:
        self.lock.release()


def _ear(model: Any, max_seconds: float) -> Callable[[str | bytes], str]:
    def make() -> Any:
        from ..speech.asr import make_transcriber

        return make_transcriber(model=model)

    transcriber = _Lazy(make)

    def hear(source: str | bytes) -> str:
        from ..speech.audio import load_clip

        clip = load_clip(source, max_seconds)
        if clip.truncated:
            raise ValueError(f"a recording of more than {max_seconds:g} s, or a damaged one: at most that is heard")
        with transcriber as ear:
            text = ear.transcribe(clip).text
        if not text:
            raise ValueError("nobody speaks in the recording")
        return text

    return hear


def _voice(name: str | None) -> Callable[[str], Iterator[Sound]]:
    def make() -> Any:
        from ..speech.tts import make_speaker

        return make_speaker(name or None)

    speaker = _Lazy(make)

    def speak(text: str) -> Iterator[Sound]:
        with speaker as voice:
            for speech in voice.stream(text):
                yield speech.sampling_rate, speech.samples

    return speak


def _hand(model: Any, device: str | None) -> Callable[[str, int], Image.Image]:
    def make() -> Any:
        from .text_to_image import Drawer

        return Drawer(model, device)

    drawer = _Lazy(make)

    def draw(text: str, seed: int) -> Image.Image:
        with drawer as hand:
            return hand.draw(text, seed)

    return draw
