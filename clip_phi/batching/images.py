"""Image bytes to upright RGB and to pixel values. Data come from the web, so the bytes may be anything.

All images are decoded here. Pixel values are those of Hugging Face's image processor, computed faster."""

import hashlib
import io
import logging
import os
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageCms, UnidentifiedImageError, features
from PIL.TiffImagePlugin import STRIPOFFSETS, TILELENGTH, TILEOFFSETS, TILEWIDTH, TiffImageFile
from torch.nn.functional import interpolate
from transformers import CLIPImageProcessorPil

from ..data.report import RecordError
from ..data.sample import File, Images, images_of

MAX_PIXELS = 100_000_000  # 300 MB decoded
MAX_ASPECT = 100  # an image processor makes the short side 224 first, so the long one becomes at most 22,400
MAX_SCANS = 50  # of a JPEG; each goes over all pixels again. Encoders write 10 or so
MAX_SEGMENTS = 2000  # before the first scan; EXIF, XMP and profiles have some hundred at most
# Not all of PIL's: EPS starts Ghostscript. JPEG includes MPO. AVIF is in Pillow's own builds.
FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
HEIF_SUFFIXES = (".heic", ".heics", ".heif", ".heifs", ".hif")
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
AVIF_BRANDS = {b"avif", b"avis"}
NEEDS_HEIF = "HEIC and HEIF need pillow-heif: pip install 'clip-phi[photos]'"
NEEDS_AVIF = "this Pillow is built without AVIF: pip install --upgrade pillow"
# What a file is that is no image, by how it begins.
NOT_IMAGES = {b"version https://git-lfs": "a pointer of Git LFS: run 'git lfs pull'", b"<": "HTML, SVG or other XML"}
NOT_IMAGES |= {b"%PDF": "a PDF", b"%!PS": "PostScript", b"PK": "a zip archive", b"\0\0\0\0": "zeros"}
ORIENTATION = 0x0112  # of EXIF
INVERSES = ["FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"]
UPRIGHT = {orientation: Image.Transpose[name] for orientation, name in enumerate(INVERSES, start=2)}

# The least reduction of mode "fast": below it, one value of noise in a million is two levels off; above it, none is.
FAST_REDUCTION = 1.5
Source = str | Path | bytes | File
PixelMode = Literal["exact", "fast"]

# Of JPEG: not a stuffed 0xFF of a scan's data, nor one of the markers that have no segment, but the last.
MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd8]")
_STDERR_LOCK = threading.Lock()
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)  # it logs the errors that it raises as well


def load_beside(image: Images) -> Image.Image:
    """An image for people: several of a sample are put beside each other. Raises RecordError as load_image."""
    return put_beside([load_image(each) for each in images_of(image)])


def put_beside(parts: Sequence[Image.Image]) -> Image.Image:
    if len(parts) == 1:
        return parts[0]
    joined = Image.new("RGB", (sum(part.width for part in parts), max(part.height for part in parts)), "white")
    for number, part in enumerate(parts):
        joined.paste(part, (sum(before.width for before in parts[:number]), 0))
    return joined


def load_image(source: Source, max_pixels: int | None = None) -> Image.Image:
    """Open an image as upright 8-bit sRGB: the first frame of an animation, over white where it is transparent.

    source: a file on disk, the content of one, or a File. max_pixels: None for MAX_PIXELS.
    Raises RecordError, with the name of source in its detail: "missing image", "empty image file", "not an image",
    "image of a format that is not installed", "damaged image"; or, before it is decoded, "file too large", "image too
    large" (by its header), "image too costly" (a JPEG of many scans) or "absurd image size" (see MAX_ASPECT)."""
    return _decode(*_read(source), max_pixels)


def read_header(source: Source) -> tuple[str, int]:
    """Format, as PIL names it, and number of pixels. Raises the RecordErrors of load_image, but those of decoding."""
    data, name = _read(source)
    with _opened(data, name) as image:
        return str(image.format), image.width * image.height


@cache
def has_heif() -> bool:
    """Whether HEIC and HEIF can be read; the package is imported at the first call."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def image_suffixes() -> dict[str, str | None]:
    """Endings of image files, in lower case: None, or what must be installed to read them."""
    known = [suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS]
    found = dict.fromkeys(known) | dict.fromkeys((".avif", ".avifs"), None if features.check("avif") else NEEDS_AVIF)
    return found | dict.fromkeys(HEIF_SUFFIXES, None if has_heif() else NEEDS_HEIF)


def pixel_hash(image: Image.Image) -> str:
    """Hex digest of the size and the pixels of an RGB image: equal for one image in any lossless file format."""
    assert image.mode == "RGB", image.mode
    digest = hashlib.blake2b(f"{image.width}x{image.height}:".encode(), digest_size=16)
    digest.update(image.tobytes())  # beside the size, since to join them would hold Python's lock for 0.1 s
    return digest.hexdigest()


class Preprocessor:
    """What image_processor(load_image(source), return_tensors="pt")["pixel_values"][0] gives, in less time.

    A call with a source of load_image returns float32 (3, height, width), or raises its RecordError.
    mode "exact": bit-equal, 1.4 times as fast. For a CLIPImageProcessorPil that resizes the shortest edge to `size` by
        any resampling of PIL, crops the centre and pads nothing, with any rescaling, mean and std. Any other image
        processor, or one that crops more than it resizes to, is called itself.
    mode "fast": 3.3 times as fast. No 8-bit value is more than one level off, and fewer than 1 % of a photo's are:
        torch resizes with weights of 16 bits, PIL with weights of 32. For RGB JPEGs without EXIF rotation that decode
        without a warning and are reduced FAST_REDUCTION times or more by bicubic resampling; for all others the mode
        is "exact". Raises ImportError without simplejpeg."""

    def __init__(self, image_processor: Any, mode: PixelMode = "exact"):
        if mode not in get_args(PixelMode):
            raise ValueError(f"image_processing {mode!r}: choose from {', '.join(get_args(PixelMode))}")
        if mode == "fast":
            try:
                import simplejpeg  # noqa: F401
            except ImportError as error:
                raise ImportError("--image_processing fast needs simplejpeg: pip install 'clip-phi[fast]'") from error
        self.image_processor = image_processor
        self.table: np.ndarray | None = None  # (3, 256): the image processor's value of each level
        if _is_known(image_processor):
            levels = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
            pixels = image_processor(levels, do_resize=False, do_center_crop=False, return_tensors="np")["pixel_values"]
            self.table = pixels.reshape(3, 256)
        self.fast = mode == "fast" and self.table is not None and image_processor.resample == Image.Resampling.BICUBIC

    def __call__(self, source: Source) -> torch.Tensor:
        data, name = _read(source)
        least = FAST_REDUCTION * self.image_processor.size.shortest_edge if self.fast else 0
        if not self.fast or (rgb := _decode_plain_jpeg(data, least)) is None:
            return self.of_image(_decode(data, name))
        width, height, left, top, right, bottom = self._places(rgb.shape[1], rgb.shape[0])
        batch = torch.from_numpy(rgb).permute(2, 0, 1).unsqueeze(0)
        resized = interpolate(batch, size=(height, width), mode="bicubic", antialias=True)[0]
        return self._look_up(resized[:, top:bottom, left:right].permute(1, 2, 0).numpy())

    def of_image(self, image: Image.Image) -> torch.Tensor:
        """The same for what load_image returns, in mode "exact"."""
        if self.table is None:
            return self.image_processor(image, return_tensors="pt")["pixel_values"][0]
        width, height, left, top, right, bottom = self._places(*image.size)
        # PIL resizes the rows, rounds, then resizes the columns: a crop in between changes no remaining pixel.
        rows = image.resize((width, image.height), self.image_processor.resample).crop((left, 0, right, image.height))
        columns = rows.resize((rows.width, height), self.image_processor.resample)
        return self._look_up(np.asarray(columns.crop((0, top, rows.width, bottom))))

    def _places(self, width: int, height: int) -> tuple[int, int, int, int, int, int]:
        """Resized width and height, and left, top, right and bottom of the crop in the resized image."""
        edge, crop = self.image_processor.size.shortest_edge, self.image_processor.crop_size
        new_width, new_height = (int(edge * side / min(width, height)) for side in (width, height))
        left, top = (new_width - crop.width) // 2, (new_height - crop.height) // 2
        return new_width, new_height, left, top, left + crop.width, top + crop.height

    def _look_up(self, levels: np.ndarray) -> torch.Tensor:
        """levels: uint8 (height, width, 3)."""
        assert self.table is not None
        pixels = np.empty((3, *levels.shape[:2]), dtype=self.table.dtype)
        for channel in range(3):  # "clip" only saves the check: no level is outside the table
            np.take(self.table[channel], levels[..., channel], out=pixels[channel], mode="clip")
        return torch.from_numpy(pixels)


def _is_known(image_processor: Any) -> bool:
    its = image_processor
    if type(its) is not CLIPImageProcessorPil or not (its.do_resize and its.do_center_crop) or its.do_pad:
        return False
    by_edge = {name for name, value in dict(its.size).items() if value} == {"shortest_edge"}
    edge, crop = its.size.shortest_edge, its.crop_size
    return isinstance(its.resample, int) and by_edge and max(crop.height, crop.width) <= edge


def _decode_plain_jpeg(data: bytes, least_edge: float) -> np.ndarray | None:
    """uint8 (height, width, 3), or None for all but an intact, upright RGB JPEG of this size or more."""
    import simplejpeg

    if not data.startswith(b"\xff\xd8\xff"):
        return None
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            _refuse_size(image.size, "")
            plain = (image.format, image.mode) == ("JPEG", "RGB")  # not MPO, gray, CMYK
            plain = plain and _srgb_transform(image.info.get("icc_profile"), "RGB") is None
            if not plain or min(image.size) < least_edge or image.getexif().get(ORIENTATION) in UPRIGHT:
                return None
        return simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, strict=True)
    except Exception:  # any error: load_image tries again, and may succeed
        return None


def _read(source: Source) -> tuple[bytes, str]:
    """The bytes of an image, and its name in errors."""
    if isinstance(source, bytes):
        data, name = source, f"{len(source)} bytes"
    else:
        with image_errors(name := str(source)):
            data = source.read() if isinstance(source, File) else File(str(source)).read()
    if not isinstance(data, bytes):  # an Arrow file may have null, or only the name of an image
        raise RecordError("missing image", f"{name}: no bytes there")
    if not data:
        raise RecordError("empty image file", name)
    if data.startswith(b"\xff\xd8"):
        _refuse_costly_jpeg(data, name)
    return data, name


def _refuse_costly_jpeg(data: bytes, name: str) -> None:
    """Count segments and scans without decoding. Raises RecordError if there are too many."""
    place, segments, scans, frame = 2, 0, 0, b""
    while (found := MARKER.search(data, place)) is not None:
        place, marker = found.end(), found[0][-1]
        segments, scans = segments + 1, scans + (marker == 0xDA)
        if scans > MAX_SCANS or segments - scans > MAX_SEGMENTS:
            raise RecordError("image too costly", f"{name}: more than {MAX_SCANS} scans or {MAX_SEGMENTS:,} segments")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame = data[place - 1 : place + 8]
        # Only one scan is read of an image that is sequential and has all its components in the first one.
        is_sequential, components = frame[:1] in (b"\xc0", b"\xc1", b"\xc9"), data[place + 2 : place + 3]
        if marker == 0xD9 or (marker == 0xDA and is_sequential and components == frame[-1:]):
            return
        place += int.from_bytes(data[place : place + 2], "big")


@contextmanager
def image_errors(name: str) -> Iterator[None]:
    """Raise any error in finding an image, called name, as RecordError: "missing image" or "damaged image"."""
    try:
        yield
    except RecordError as error:
        raise RecordError(error.kind, f"{name}: {error.detail}") from error
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, LookupError) as error:
        raise RecordError("missing image", f"{name}: {_reason(error)}") from error
    except Exception as error:  # zipfile, zlib, lzma and pyarrow each have errors of their own for damaged archives
        raise RecordError("damaged image", f"{name}: {_reason(error)}") from error


def _decode(data: bytes, name: str, max_pixels: int | None = None) -> Image.Image:
    with _opened(data, name) as image:
        _refuse_size(image.size, name, max_pixels)
        if isinstance(image, TiffImageFile):  # decoded in whole tiles, which may be far larger than the image
            _refuse_size((image.tag_v2.get(TILEWIDTH, 1), image.tag_v2.get(TILELENGTH, 1)), name)
            pieces = image.tag_v2.get(STRIPOFFSETS) or image.tag_v2.get(TILEOFFSETS) or (0,)
            if image.info.get("compression") == "jpeg" and data.count(b"\xff\xda") > MAX_SCANS * len(pieces):
                raise RecordError("image too costly", f"{name}: JPEGs of more than {MAX_SCANS} scans inside a TIFF")
            with _silent_stderr():
                image.load()
        return _to_upright_rgb(image)


@contextmanager
def _opened(data: bytes, name: str) -> Iterator[Image.Image]:
    """The image, not decoded. Raises RecordError for all errors, those of the block too."""
    formats = FORMATS
    if data[4:8] == b"ftyp":  # its brands follow, the most specific first
        brands = [data[place : place + 4] for place in range(8, min(len(data), 64), 4)]
        specific = (each for each in brands if each in HEIF_BRANDS - {b"mif1", b"msf1"} | AVIF_BRANDS)
        brand = next(specific, (brands or [b""])[0])
        lacks_heif = brand in HEIF_BRANDS and not has_heif()
        if lacks_heif or (brand in AVIF_BRANDS and not features.check("avif")):
            needed = NEEDS_HEIF if lacks_heif else NEEDS_AVIF
            raise RecordError("image of a format that is not installed", f"{name}: {needed}")
        formats = ("HEIF",) if brand in HEIF_BRANDS else FORMATS
    # Of odd EXIF blocks and the like: either the image is used, or a RecordError says why not.
    with warnings.catch_warnings(action="ignore"):
        try:
            with Image.open(io.BytesIO(data), formats=formats) as image:
                yield image
        except RecordError:
            raise
        except UnidentifiedImageError:  # also raised for a known format with a bad header
            accepts = (Image.OPEN[format][1] for format in formats if format in Image.OPEN)
            known = any(accept is not None and accept(data[:16]) for accept in accepts)
            # Not its first bytes: a record may name any file of this machine.
            other = next((what for start, what in NOT_IMAGES.items() if data.startswith(start)), "an unknown format")
            kind, reason = ("damaged image", "bad header") if known else ("not an image", other)
            raise RecordError(kind, f"{name}: {reason}") from None
        except Exception as error:  # PIL's decoders raise anything on bad bytes: SyntaxError, struct.error, KeyError...
            huge = isinstance(error, Image.DecompressionBombError)  # above PIL's own limit, 179 million pixels
            raise RecordError("image too large" if huge else "damaged image", f"{name}: {_reason(error)}") from error


def _refuse_size(size: tuple[int, int], name: str, max_pixels: int | None = None) -> None:
    (width, height), most = size, max_pixels or MAX_PIXELS
    if width * height > most:
        raise RecordError("image too large", f"{name}: {width} x {height} is more than {most:,} pixels")
    if max(size) > MAX_ASPECT * min(size):
        raise RecordError("absurd image size", f"{name}: {width} x {height} is more than {MAX_ASPECT} to 1")


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """libtiff prints errors, from C: they would only break a progress bar."""
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
    profile = image.info.get("icc_profile")
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
    else:  # a profile of CMYK or gray holds before the conversion, one of RGB after it
        rgb = image if image.mode in ("CMYK", "L") else image.convert("RGB")
    has_profile = rgb is image or image.mode not in ("CMYK", "L")
    if has_profile and (transform := _srgb_transform(profile, rgb.mode)) is not None:
        rgb = ImageCms.applyTransform(rgb, transform) or rgb
    rgb = rgb if rgb.mode == "RGB" else rgb.convert("RGB")
    rgb.info = {}  # neither its EXIF nor its colour profile holds for these pixels
    # Not ImageOps.exif_transpose: it rewrites the EXIF block, and fails on odd ones whose orientation can be read.
    method = None
    with suppress(Exception):  # as above: an EXIF block that PIL cannot parse raises anything
        method = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    return rgb if method is None else rgb.transpose(method)


@lru_cache(maxsize=32)
def _srgb_transform(profile: bytes | None, mode: str) -> Any:
    """From an ICC profile's colours to sRGB, for images of a mode: RGB, CMYK or L. None without a profile, for one of
    sRGB itself, and for one that is damaged or of another mode: the colours stay as they are."""
    space = {"RGB": "RGB", "CMYK": "CMYK", "L": "GRAY"}.get(mode)
    with suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile or b""))
        about = opened.profile
        if about.xcolor_space.strip() == space and "srgb" not in (about.profile_description or "").lower():
            once = ImageCms.Flags.NOCACHE  # without a state that threads would share
            return ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB", flags=once)
    return None


def _reason(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join((reason or type(error).__name__).split())[:100]
