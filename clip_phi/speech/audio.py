"""Any recording to 16 kHz mono: the one place where sound is decoded."""

import io
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..data.sample import File
from ..data.transcripts import AsrSettings

SAMPLING_RATE = 16_000  # Hz, what Whisper hears
MAX_SECONDS = AsrSettings().max_seconds
RATES = (1_000, 1_000_000)  # Hz, of sound; other rates stand in damaged headers, and would take minutes to resample
MAX_CHANNELS = 32
PATIENCE_SECONDS = 30.0  # decoding takes a fraction of one; FFmpeg would look for sound to the end of any file


class Clip(NamedTuple):
    """samples: float32 mono in [-1, 1], shape (n,), n > 0, at 16 000 Hz. truncated: there was more, which was cut off
    or could not be decoded."""

    samples: np.ndarray
    truncated: bool

    @property
    def seconds(self) -> float:
        return len(self.samples) / SAMPLING_RATE


def load_clip(source: str | Path | bytes | File, max_seconds: float = MAX_SECONDS) -> Clip:
    """The first max_seconds of the first audio track of any file that FFmpeg reads; no more than that is decoded.

    source: a file on disk, what one holds, or a File; never a URL, nor a playlist that names other files. Where a
    recording is damaged behind its beginning, the clip ends there and is truncated. Raises ValueError with the name of
    the source if there is no sound in it, and ImportError without PyAV."""
    limit = _num_samples(max_seconds)
    name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    with ExitStack() as stack:
        file = _open(source, name, stack)
        pieces, whole = [], True
        missing = limit + 1  # one more tells whether there is more
        try:
            for piece in _decode(file, name):
                pieces.append(piece[:missing])
                missing -= len(pieces[-1])
                if not missing:
                    break
        except _Damaged as error:
            if not pieces:
                raise ValueError(f"damaged sound: {name}: {error}") from error
            whole = False
    samples = np.concatenate(pieces) if pieces else np.zeros(0, np.int16)
    if not len(samples):
        raise ValueError(f"no sound in {name}: it has an audio track of no length")
    return Clip(_as_float(samples[:limit]), truncated=len(samples) > limit or not whole)


def clip_from_array(samples: Any, sampling_rate: int, max_seconds: float = MAX_SECONDS) -> Clip:
    """The first max_seconds of an array, shape (n,) or (n, channels): floats in [-1, 1], or integers of full scale.

    Raises ValueError if it is empty, not finite, or of no such shape or scale, and ImportError without PyAV."""
    limit = _num_samples(max_seconds)
    array = np.asarray(samples)
    if array.ndim not in (1, 2) or (array.ndim == 2 and not 1 <= array.shape[1] <= MAX_CHANNELS):
        raise ValueError(f"sound of shape {array.shape} is neither (samples,) nor (samples, channels)")
    if not array.size:
        raise ValueError("no sound: the array is empty")
    if not RATES[0] <= sampling_rate <= RATES[1]:
        raise ValueError(f"a sampling rate of {sampling_rate} Hz is none of sound")
    array = array[: math.ceil((limit + 1) * sampling_rate / SAMPLING_RATE)]
    if array.dtype.kind == "u" and array.dtype.itemsize == 1:
        array = (array.astype(np.float32) - 128) / 128  # unsigned bytes have their zero in the middle, as in wav files
    elif array.dtype.kind == "i":
        array = array.astype(np.float64) / -float(np.iinfo(array.dtype).min)
    elif array.dtype.kind != "f":
        raise ValueError(f"sound of dtype {array.dtype}: it must be float or signed integers")
    if not np.isfinite(array).all():
        raise ValueError("sound holds values that are not finite")
    if (peak := float(np.abs(array).max())) > 2:  # a little over 1 is clipped, as a sound card would
        raise ValueError(f"float sound must lie in [-1, 1], and this goes up to {peak:g}: divide it by its full scale")
    mono = array if array.ndim == 1 else array.mean(axis=1)
    whole = (mono.clip(-1, 1) * 32767).round().astype(np.int16)
    resampled = np.concatenate([*_resample([_frame(whole, int(sampling_rate))])])
    if not len(resampled):
        raise ValueError(f"no sound: {len(array)} samples at {sampling_rate} Hz are too few")
    return Clip(_as_float(resampled[:limit]), truncated=len(resampled) > limit)


class _Reader:
    """A file that is read for PATIENCE_SECONDS at most."""

    def __init__(self, file: Any):
        self.seek, self.tell = file.seek, file.tell
        self._file = file
        self._end = time.monotonic() + PATIENCE_SECONDS

    def read(self, size: int) -> bytes:
        if time.monotonic() > self._end:
            raise OSError(f"no sound was found within {PATIENCE_SECONDS:g} seconds")
        return self._file.read(size)


class _Damaged(Exception):
    """What FFmpeg says about a recording that it cannot go on with."""


def _num_samples(max_seconds: float) -> int:
    if not 0 < max_seconds < math.inf:
        raise ValueError(f"max_seconds must be a number above 0, not {max_seconds}")
    return max(1, round(max_seconds * SAMPLING_RATE))


def _as_float(samples: np.ndarray) -> np.ndarray:
    return samples.astype(np.float32) / 32768


def _open(source: str | Path | bytes | File, name: str, stack: ExitStack) -> Any:
    """An open file. FFmpeg is never given a name: it would take URLs and other protocols."""
    if isinstance(source, File):
        if source.member is None:
            source = source.path
        else:
            try:
                source = source.read()
            except Exception as error:  # zipfile, zlib and pyarrow each have errors of their own
                raise ValueError(f"missing sound: {name}: {' '.join(str(error).split())}") from error
    if isinstance(source, bytes):
        if not source:
            raise ValueError(f"empty sound file: {name}")
        return io.BytesIO(source)
    try:
        file = stack.enter_context(open(source, "rb"))  # noqa: SIM115
    except (OSError, ValueError) as error:
        raise ValueError(f"missing sound: {name}: {getattr(error, 'strerror', None) or error}") from error
    if not file.peek(1):
        raise ValueError(f"empty sound file: {name}")
    return file


def _decode(file: Any, name: str) -> Iterator[np.ndarray]:
    """int16 pieces at 16 kHz. Raises ValueError if it cannot begin, and _Damaged if it cannot go on."""
    av = import_av()
    try:
        # Playlists would open what they name: no protocol is allowed but the open file itself.
        container = av.open(_Reader(file), metadata_errors="ignore", options={"protocol_whitelist": "none"})
    except (av.FFmpegError, ValueError, OverflowError, OSError) as error:
        raise ValueError(f"not a sound: {name}: {_reason(error)}") from error
    with container:
        if not container.streams.audio:
            kinds = sorted({stream.type for stream in container.streams})
            raise ValueError(f"no sound in {name}: it has {' and '.join(kinds) or 'nothing'} only")
        yield from _resample(_frames(container, av))


def _frames(container: Any, av: Any) -> Iterator[Any]:
    try:
        for frame in container.decode(container.streams.audio[0]):
            if not RATES[0] <= frame.sample_rate <= RATES[1]:
                raise _Damaged(f"a sampling rate of {frame.sample_rate} Hz is none of sound")
            frame.pts = None  # times may be missing or leap, and the resampler would refuse or fill them
            yield frame
    except (av.FFmpegError, ValueError, MemoryError, OSError) as error:
        raise _Damaged(_reason(error)) from error


def _resample(frames: Any) -> Iterator[np.ndarray]:
    """int16 pieces at 16 kHz, all channels mixed into one."""
    av = import_av()
    resampler: Any = None
    kind = None
    try:
        for frame in frames:
            if (frame.format.name, frame.layout.name, frame.sample_rate) != kind:  # some streams change midway
                yield from _drain(resampler)
                kind = (frame.format.name, frame.layout.name, frame.sample_rate)
                resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLING_RATE)
            for piece in resampler.resample(frame):
                yield piece.to_ndarray()[0]
        yield from _drain(resampler)
    except (av.FFmpegError, ValueError, MemoryError, OSError) as error:
        raise _Damaged(_reason(error)) from error


def _drain(resampler: Any) -> Iterator[np.ndarray]:
    if resampler is not None:
        for piece in resampler.resample(None):
            yield piece.to_ndarray()[0]


def _frame(samples: np.ndarray, sampling_rate: int) -> Any:
    av = import_av()
    frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
    frame.sample_rate = sampling_rate
    return frame


def import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError("reading sound needs PyAV: pip install 'clip-phi[speech]'") from error
    return av


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:100]
