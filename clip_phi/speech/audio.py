"""Any recording to 16 kHz mono: the only place where audio is decoded."""

import io
import itertools
import math
import time
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..data.sample import File
from ..data.transcripts import AsrSettings

SAMPLING_RATE = 16_000  # Hz, of Whisper's input
MAX_SECONDS = AsrSettings().max_seconds
RATES = (1_000, 1_000_000)  # Hz; other rates are in damaged headers only, and would take minutes to resample
MAX_CHANNELS = 32
CANCELLED = 0.05  # share of the loudest channel's power below which a mix is not used; one of two alone has 0.25
MAX_DECODE_SECONDS = 30.0  # decoding takes under 1 s; FFmpeg would search any file to its end for audio


class AudioClip(NamedTuple):
    samples: np.ndarray  # float32 mono in [-1, 1], shape (samples,), at least one, at 16 000 Hz
    truncated: bool  # a rest was cut off or could not be decoded

    @property
    def seconds(self) -> float:
        return len(self.samples) / SAMPLING_RATE


def load_audio(source: str | Path | bytes | File, max_seconds: float = MAX_SECONDS) -> AudioClip:
    """Decode the first max_seconds of the first audio track of any file that FFmpeg reads, and no more.

    A recording with damage after its beginning gives a truncated clip that ends there. URLs and playlists are refused.
    Raises ValueError with the name of the source if it has no audio, ImportError without PyAV."""
    limit = _num_samples(max_seconds)
    name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    pieces, whole = [], True
    with _open(source, name) as file:
        if not file.read(1):
            raise ValueError(f"empty audio file: {name}")
        file.seek(0)
        missing = limit + 1  # one more shows whether there is a rest
        try:
            for piece in _decode(file, name):
                pieces.append(piece[:missing])
                missing -= len(pieces[-1])
                if not missing:
                    break
        except _Damaged as error:
            if not pieces:
                raise ValueError(f"damaged audio: {name}: {error}") from error
            whole = False
    samples = np.concatenate(pieces) if pieces else np.zeros(0, np.int16)
    if not len(samples):
        raise ValueError(f"no audio in {name}: its audio track is empty")
    return AudioClip(samples[:limit].astype(np.float32) / 32768, truncated=len(samples) > limit or not whole)


def audio_from_array(samples: Any, sampling_rate: int, max_seconds: float = MAX_SECONDS) -> AudioClip:
    """The first max_seconds of (samples,) or (samples, channels), floats in [-1, 1] or full-scale integers.

    Raises ValueError if they are empty, not finite, or of another shape or scale; ImportError without PyAV."""
    array = np.asarray(samples)
    if array.ndim not in (1, 2) or (array.ndim == 2 and not 1 <= array.shape[1] <= MAX_CHANNELS):
        raise ValueError(f"audio of shape {array.shape} is neither (samples,) nor (samples, channels)")
    if not array.size:
        raise ValueError("no audio: the array is empty")
    if not RATES[0] <= sampling_rate <= RATES[1]:
        raise ValueError(f"{sampling_rate} Hz is no sampling rate of audio")
    array = array[: (_num_samples(max_seconds) // SAMPLING_RATE + 2) * int(sampling_rate)]  # a second more than needed
    if array.dtype == np.uint8:
        array = (array.astype(np.float32) - 128) / 128  # the zero of unsigned bytes is 128, as in wav files
    elif array.dtype.kind == "i":
        array = array.astype(np.float64) / -float(np.iinfo(array.dtype).min)
    elif array.dtype.kind != "f":
        raise ValueError(f"audio of dtype {array.dtype}: it must be float or signed integers")
    if not np.isfinite(array).all():
        raise ValueError("audio contains values that are not finite")
    if (peak := float(np.abs(array).max())) > 2:  # values a little over 1 are clipped, as by a sound card
        raise ValueError(f"float audio must be within [-1, 1], but goes up to {peak:g}: divide it by its full scale")
    file = io.BytesIO()
    with wave.open(file, "wb") as wav:
        wav.setparams((1 if array.ndim == 1 else array.shape[1], 2, int(sampling_rate), 0, "NONE", ""))
        wav.writeframes((array.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
    return load_audio(file.getvalue(), max_seconds)


class _Reader:
    """A file that can be read for MAX_DECODE_SECONDS."""

    def __init__(self, file: Any):
        self.seek, self.tell = file.seek, file.tell
        self._file = file
        self._end = time.monotonic() + MAX_DECODE_SECONDS

    def read(self, size: int) -> bytes:
        if time.monotonic() > self._end:
            raise OSError(f"no audio was found within {MAX_DECODE_SECONDS:g} seconds")
        return self._file.read(size)


class _Damaged(Exception):
    """FFmpeg's error on a recording that it cannot decode to the end."""


def _num_samples(max_seconds: float) -> int:
    if not 0 < max_seconds < math.inf:
        raise ValueError(f"max_seconds must be a number above 0, not {max_seconds}")
    return max(1, round(max_seconds * SAMPLING_RATE))


def _open(source: str | Path | bytes | File, name: str) -> Any:
    """An open file. FFmpeg never gets a name: it would accept URLs and other protocols."""
    try:
        if isinstance(source, File):
            source = source.path if source.member is None else source.read()
        return io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")
    except Exception as error:  # zipfile, zlib and pyarrow each have errors of their own
        raise ValueError(f"missing recording: {name}: {_reason(error)}") from error


def _decode(file: Any, name: str) -> Iterator[np.ndarray]:
    """int16 pieces at 16 kHz. Raises ValueError if there is no audio, _Damaged if it is damaged."""
    try:
        import av
    except ImportError as error:
        raise ImportError("reading audio needs PyAV: pip install 'clip-phi[speech]'") from error
    try:
        # Playlists would open other files: no protocol is allowed but the open file itself.
        container = av.open(_Reader(file), metadata_errors="ignore", options={"protocol_whitelist": "none"})
    except (av.FFmpegError, ValueError, OverflowError, OSError) as error:
        raise ValueError(f"not an audio file: {name}: {_reason(error)}") from error
    with container:
        if not container.streams.audio:
            kinds = sorted({stream.type for stream in container.streams})
            raise ValueError(f"no audio in {name}: it has {' and '.join(kinds) or 'nothing'} only")
        yield from _resample(av, _frames(container))


def _frames(container: Any) -> Iterator[Any]:
    for frame in container.decode(container.streams.audio[0]):
        if not RATES[0] <= frame.sample_rate <= RATES[1]:
            raise _Damaged(f"{frame.sample_rate} Hz is no sampling rate of audio")
        frame.pts = None  # timestamps may be missing or jump, which the resampler would refuse or fill
        yield frame


def _resample(av: Any, frames: Any) -> Iterator[np.ndarray]:
    """int16 pieces at 16 kHz, all channels mixed into one."""
    kinds = itertools.groupby(frames, lambda frame: (frame.format.name, frame.layout.name, frame.sample_rate))
    try:
        for (_, layout, _), alike in kinds:  # some streams change the format midway
            layouts = ["mono"] if layout == "mono" else ["mono", layout]
            # Packed: reading the planes of more than eight channels crashes PyAV.
            resamplers = [av.AudioResampler("s16", name, SAMPLING_RATE) for name in layouts]
            given: list[list[np.ndarray]] = [[] for _ in layouts]
            for frame in itertools.chain(alike, [None]):  # None drains them
                for pieces, resampler in zip(given, resamplers, strict=True):
                    done = resampler.resample(frame)
                    pieces += [piece.to_ndarray().reshape(-1, piece.layout.nb_channels).T for piece in done]
                if all(given):
                    whole = [np.concatenate(pieces, axis=1) for pieces in given]
                    size = min(each.shape[1] for each in whole)
                    given = [[each[:, size:]] for each in whole]
                    if size:
                        yield _mix(whole[0][0, :size], whole[-1][:, :size])
    except (av.FFmpegError, ValueError, MemoryError, OSError) as error:
        raise _Damaged(_reason(error)) from error


def _mix(mix: np.ndarray, channels: np.ndarray) -> np.ndarray:
    """The mix (samples,) of channels (channels, samples), or one of them where they cancel each other in the mix."""
    power = np.square(channels, dtype=np.float64).mean(axis=1)
    if np.square(mix, dtype=np.float64).mean() >= CANCELLED * power.max():
        return mix
    return channels[np.argmax(power >= power.max() / 4)]  # the first loud one: the same in all pieces


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:100]
