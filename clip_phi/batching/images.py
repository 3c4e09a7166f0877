"""Image bytes to upright RGB, the one place where they are decoded: data come from the web, so any bytes may come."""

import hashlib
import io
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError, features
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH, TiffImageFile

from ..samples import File
from ..sources.report import Defect

MAX_PIXELS = 100_000_000  # 300 MB decoded
MAX_ASPECT = 100  # an image processor makes the short side 224 first, so the long one grows to at most 22 400
# Not all that PIL knows: EPS starts Ghostscript. JPEG takes MPO along. AVIF is in Pillow since 11.3, if built with it.
FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
FORMATS += ("AVIF",) if "avif" in features.modules and features.check("avif") else ()
UPRIGHT = {  # what undoes an EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_STDERR_LOCK = threading.Lock()
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)  # it logs the errors that it also raises


def load_image(source: str | Path | bytes | File) -> Image.Image:
    """Open an image as upright 8-bit RGB: the first frame of an animation, over white where it is transparent.

    source: a file on disk, what one holds, or a File. Raises Defect, its detail beginning with the name of source:
    "missing image", "empty image file", "not an image", "damaged image", "image too large" (more than MAX_PIXELS; the
    header says so, nothing is decoded) or "absurd image size" (one side more than MAX_ASPECT times the other)."""
    name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    data = _read(source, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd EXIF and the like: either the image is used, or a Defect says why not
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _refuse_size(image.size, name)
                if isinstance(image, TiffImageFile):  # decoded by whole tiles, which may be far larger than the image
                    _refuse_size((image.tag_v2.get(TILEWIDTH, 1), image.tag_v2.get(TILELENGTH, 1)), name)
                    with _silent_stderr():
                        image.load()
                return _to_upright_rgb(image)
        except Defect:
            raise
        except Image.DecompressionBombError as error:  # PIL's own limit, 179 million pixels
            raise Defect("image too large", f"{name}: {_reason(error)}") from None
        except UnidentifiedImageError:  # also raised for a known format with a bad header
            accepts = (Image.OPEN[format][1] for format in FORMATS)
            known = any(accept is not None and accept(data[:16]) for accept in accepts)
            kind, reason = ("damaged image", "bad header") if known else ("not an image", f"begins with {data[:8]!r}")
            raise Defect(kind, f"{name}: {reason}") from None
        except Exception as error:  # PIL's decoders raise anything on bad bytes: SyntaxError, struct.error, KeyError...
            raise Defect("damaged image", f"{name}: {_reason(error)}") from error


def pixel_hash(image: Image.Image) -> str:
    """Hex digest of the size and the pixels of an RGB image: equal for one picture in any lossless container."""
    assert image.mode == "RGB", image.mode
    digest = hashlib.blake2b(f"{image.width}x{image.height}:".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.hexdigest()


def _read(source: str | Path | bytes | File, name: str) -> bytes:
    if isinstance(source, bytes):
        data = source
    else:
        try:
            data = source.read() if isinstance(source, File) else Path(source).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, LookupError) as error:
            raise Defect("missing image", f"{name}: {_reason(error)}") from error
        except Exception as error:  # zipfile, zlib, lzma and pyarrow each have errors of their own for damaged archives
            raise Defect("damaged image", f"{name}: {_reason(error)}") from error
    if not isinstance(data, bytes):  # an Arrow file may hold null, or only the name of an image
        raise Defect("missing image", f"{name}: no bytes there")
    if not data:
        raise Defect("empty image file", name)
    return data


def _refuse_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise Defect("image too large", f"{name}: {width} x {height} is more than {MAX_PIXELS:,} pixels")
    if max(size) > MAX_ASPECT * min(size):
        raise Defect("absurd image size", f"{name}: {width} x {height} is more than {MAX_ASPECT} to 1")


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """libtiff prints what is wrong with a file, from C: here it would only tear up a progress bar."""
    with _STDERR_LOCK, open(os.devnull, "wb") as nowhere:
        stderr = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _to_upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode == "F":  # 0 to 1, 0 to 255 or metres
        raise ValueError("32-bit float pixels, of no known range")
    if image.mode.startswith("I"):  # 16-bit grayscale, which PIL's convert clips to 255
        levels = np.array(image.convert("I")).clip(0, 65535)
        levels[levels == image.info.get("transparency", -1)] = 65535
        rgb = Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        rgb = Image.new("RGB", image.size, "white")
        rgb.paste(rgba, mask=rgba)
    else:
        rgb = image.convert("RGB")
    rgb.info = {}  # neither its EXIF nor its colour profile holds for these pixels
    # Not ImageOps.exif_transpose: that writes the EXIF block anew, and fails on odd ones that tell the orientation well
    try:
        method = UPRIGHT.get(image.getexif().get(0x0112, 1))
    except Exception:  # as above: an EXIF block that PIL cannot parse raises anything
        method = None
    return rgb if method is None else rgb.transpose(method)


def _reason(error: Exception) -> str:
    """In one short line."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join((reason or type(error).__name__).split())[:100]
