"""Any bytes give an upright RGB image or a RecordError that says why not. All images are made here."""

import io
import os
import pickle
import random
import re
import struct
import sys
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageFile, TiffImagePlugin, features
from transformers import CLIPImageProcessorPil

from clip_phi.batching import images
from clip_phi.batching.images import Preprocessor, _decode_plain_jpeg, load_image, pixel_hash
from clip_phi.data.report import RecordError
from clip_phi.data.sample import File

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
HAS_AVIF = features.check("avif")
LOSSLESS = {  # file names' endings and what makes them lossless
    "png": {},
    "bmp": {},
    "ppm": {},
    "tif": {},
    "lzw.tif": {"compression": "tiff_lzw"},
    "deflate.tif": {"compression": "tiff_adobe_deflate"},
    "webp": {"lossless": True, "exact": True},
}
LOSSY = ["JPEG", "MPO", "WEBP", pytest.param("AVIF", marks=pytest.mark.skipif(not HAS_AVIF, reason="no AVIF here"))]


def picture() -> Image.Image:
    """RGB, 24 wide and 16 high, without any symmetry and smooth enough for lossy formats."""
    down, right = np.mgrid[0:16, 0:24]
    return Image.fromarray(np.stack([right * 10, down * 15, (right + down) * 3], axis=-1).astype(np.uint8))


def to_bytes(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pixels(image: Image.Image) -> list:
    """Rows of pixels of an RGB image."""
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


def assert_close(image: Image.Image, other: Image.Image, tolerance: int) -> None:
    assert (image.mode, image.size) == ("RGB", other.size)
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(other).astype(int))
    assert difference.max() <= tolerance, difference.max()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, bits: int, colour_type: int, rows: list[bytes], *chunks: bytes) -> bytes:
    """A PNG written by hand, for what PIL cannot write. chunks stand before the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + body + chunk(b"IEND", b"")


def tiff(*tags: tuple[int, int]) -> bytes:
    """The header and tags of a little-endian TIFF, with no pixels behind them."""
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


def kind_of(source) -> str:
    with pytest.raises(RecordError) as caught:
        load_image(source)
    return caught.value.kind


# What becomes of the pixels


@pytest.mark.parametrize("ending", LOSSLESS)
def test_lossless_containers_give_the_very_pixels_and_one_hash(tmp_path, ending):
    path = tmp_path / f"picture.{ending}"
    picture().save(path, **LOSSLESS[ending])
    for source in (path, str(path), path.read_bytes(), File(str(path))):
        assert pixels(load_image(source)) == pixels(picture())
        assert pixel_hash(load_image(source)) == pixel_hash(picture())


@pytest.mark.parametrize("format", LOSSY)
def test_lossy_formats_give_nearly_the_pixels(format):
    assert_close(load_image(to_bytes(picture(), format, quality=95)), picture(), tolerance=12)


def test_hash_tells_apart_one_pixel_and_two_shapes_of_the_same_pixels():
    changed = picture()
    changed.putpixel((3, 5), (1, 2, 3))
    assert pixel_hash(changed) != pixel_hash(picture())
    assert pixel_hash(Image.new("RGB", (4, 2))) != pixel_hash(Image.new("RGB", (2, 4)))
    assert re.fullmatch("[0-9a-f]{32}", pixel_hash(picture()))


LEVELS = [0, 128, 129, 257, 20_000, 32_768, 65_000, 65_535]
LEVELS_IN_8_BITS = [0, 0, 1, 1, 78, 128, 253, 255]  # value / 257, rounded


@pytest.mark.parametrize(
    "dtype, format",
    [("<u2", "PNG"), ("<u2", "TIFF"), (">u2", "TIFF"), ("<u2", "PPM"), ("<i4", "TIFF")],
)
def test_16_bit_grayscale_is_scaled_and_not_clipped(dtype, format):
    data = to_bytes(Image.fromarray(np.array([LEVELS], dtype=dtype)), format)
    assert Image.open(io.BytesIO(data)).mode.startswith("I")
    assert pixels(load_image(data)) == [[[level] * 3 for level in LEVELS_IN_8_BITS]]


def test_16_bit_colour_keeps_its_levels():
    row = struct.pack(">6H", 0, 0x8000, 0xFFFF, 0x1234, 0x00FF, 0xFF00)
    assert pixels(load_image(png(2, 1, 16, 2, [row]))) == [[[0, 0x80, 0xFF], [0x12, 0, 0xFF]]]


def test_grayscale_and_1_bit_become_rgb():
    gray = Image.fromarray(np.array([[0, 100, 255]], dtype=np.uint8))
    for format in ("PNG", "BMP", "TIFF", "PPM", "GIF"):
        assert pixels(load_image(to_bytes(gray, format))) == [[[0] * 3, [100] * 3, [255] * 3]]
    bits = gray.point(lambda level: 255 * (level > 50)).convert("1")
    for format in ("PNG", "BMP", "TIFF", "PPM", "GIF"):
        assert pixels(load_image(to_bytes(bits, format))) == [[[0] * 3, [255] * 3, [255] * 3]]


def test_palette_becomes_its_colours():
    colours = Image.new("P", (3, 1))
    colours.putpalette([*RED, *BLUE, 1, 2, 3])
    colours.putdata([2, 0, 1])
    for format in ("PNG", "BMP", "TIFF", "GIF"):
        assert pixels(load_image(to_bytes(colours, format))) == [[[1, 2, 3], [*RED], [*BLUE]]]


def seen_through(mode: str) -> Image.Image:
    """Two pixels: one that is invisible, of a colour that must not be seen, and an opaque one."""
    if mode == "LA":
        image = Image.new("LA", (2, 1), (30, 0))
        image.putpixel((1, 0), (200, 255))
    elif mode == "RGBA":
        image = Image.new("RGBA", (2, 1), (*RED, 0))
        image.putpixel((1, 0), (*BLUE, 255))
    elif mode == "PA":
        image = Image.new("PA", (2, 1), (0, 0))
        image.putpalette([*RED, *BLUE])
        image.putpixel((1, 0), (1, 255))
    elif mode == "P":
        image = Image.new("P", (2, 1), 0)
        image.putpalette([*RED, *BLUE])
        image.putpixel((1, 0), 1)
    else:
        image = Image.new("RGB", (2, 1), RED)
        image.putpixel((1, 0), BLUE)
    return image


@pytest.mark.parametrize(
    "mode, format, options",
    [
        ("RGBA", "PNG", {}),
        ("RGBA", "TIFF", {}),
        ("RGBA", "WEBP", {"lossless": True, "exact": True}),
        ("LA", "PNG", {}),
        ("LA", "TIFF", {}),
        ("PA", "TIFF", {}),
        ("P", "PNG", {"transparency": 0}),
        ("P", "PNG", {"transparency": b"\0\xff"}),
        ("P", "GIF", {"transparency": 0}),
        ("RGB", "PNG", {"transparency": RED}),
    ],
)
def test_what_is_transparent_is_white(mode, format, options):
    opaque = (200, 200, 200) if mode == "LA" else BLUE
    assert pixels(load_image(to_bytes(seen_through(mode), format, **options))) == [[[*WHITE], [*opaque]]]


def test_half_transparent_pixels_are_mixed_with_white():
    assert pixels(load_image(to_bytes(Image.new("RGBA", (1, 1), (0, 0, 0, 128)), "PNG"))) == [[[127] * 3]]
    sheer = Image.new("P", (1, 1), 0)
    sheer.putpalette([0, 0, 0])
    assert pixels(load_image(to_bytes(sheer, "PNG", transparency=b"\x80"))) == [[[127] * 3]]


def test_transparent_levels_and_colours_of_16_bit_png_are_white():
    gray = png(3, 1, 16, 0, [struct.pack(">3H", 0, 256, 65_535)], chunk(b"tRNS", struct.pack(">H", 256)))
    assert pixels(load_image(gray)) == [[[0] * 3, [255] * 3, [255] * 3]]
    colours = [0x1010, 0x2020, 0x3030]
    row = struct.pack(">6H", *colours, 0xFFFF, 0, 0)
    assert pixels(load_image(png(2, 1, 16, 2, [row], chunk(b"tRNS", struct.pack(">3H", *colours))))) == [
        [[*WHITE], [*RED]]
    ]
    with_alpha = png(2, 1, 16, 4, [struct.pack(">4H", 0x3030, 0, 0x3030, 0xFFFF)])
    assert pixels(load_image(with_alpha)) == [[[*WHITE], [0x30] * 3]]


INKS = {(0, 255, 255, 0): RED, (255, 255, 0, 0): BLUE, (0, 0, 0, 0): WHITE, (0, 0, 0, 255): (0, 0, 0)}


@pytest.mark.parametrize("ink", INKS)
def test_cmyk_inks_give_their_colours(ink):
    swatch, expected = Image.new("CMYK", (16, 16), ink), Image.new("RGB", (16, 16), INKS[ink])
    assert pixels(load_image(to_bytes(swatch, "TIFF"))) == pixels(expected)
    assert_close(load_image(to_bytes(swatch, "JPEG", quality=95)), expected, tolerance=3)


@pytest.mark.parametrize("ink", INKS)
def test_ycck_jpeg_gives_its_colours(ink):
    cyan, magenta, yellow, black = ink
    luma = Image.new("RGB", (1, 1), (cyan, magenta, yellow)).convert("YCbCr").getpixel((0, 0))
    # PIL writes the inverse of what it is given, without conversion, and says so in the last byte of the Adobe marker
    swatch = Image.new("CMYK", (16, 16), (*(255 - level for level in luma), black))
    data = to_bytes(swatch, "JPEG", quality=95)
    marker = data.index(b"\xff\xee\0\x0eAdobe")
    assert data[marker + 15] == 0
    data = data[: marker + 15] + b"\2" + data[marker + 16 :]
    assert Image.open(io.BytesIO(data)).info["adobe_transform"] == 2
    assert_close(load_image(data), Image.new("RGB", (16, 16), INKS[ink]), tolerance=6)


@pytest.mark.parametrize("colour", [WHITE, (0, 0, 0), (120, 130, 140), (200, 100, 60), (40, 90, 60)])
def test_lab_gives_its_colours(colour):
    swatch = Image.new("RGB", (4, 4), colour)
    assert_close(load_image(to_bytes(swatch.convert("LAB"), "TIFF")), swatch, tolerance=2)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_first_frame_of_several_is_taken(format):
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, BLUE, WHITE)]
    options = {"lossless": True} if format == "WEBP" else {}
    data = to_bytes(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert_close(load_image(data), frames[0], tolerance=2)


def test_first_frame_smaller_than_its_animation_stands_on_white():
    frame = Image.new("P", (2, 1), 1)
    frame.putpalette([*RED, *BLUE])
    data = bytearray(to_bytes(frame, "GIF", transparency=0, optimize=False))
    data[6:10] = struct.pack("<HH", 3, 2)  # the size of the whole
    assert pixels(load_image(bytes(data))) == [[[*BLUE], [*BLUE], [*WHITE]], [[*WHITE], [*WHITE], [*WHITE]]]


# EXIF

# How a camera that is held so stores an upright picture. Source: EXIF 2.32, tag 0x0112
STORED = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("format", ["PNG", "TIFF", *LOSSY])
def test_every_orientation_gives_the_same_upright_picture(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](np.asarray(picture()))))
    image = load_image(to_bytes(stored, format, exif=exif, **({} if format in ("PNG", "TIFF") else {"quality": 95})))
    assert_close(image, picture(), tolerance=0 if format in ("PNG", "TIFF") else 12)
    assert not image.getexif(), "would be turned again by whoever opens its copy"


@pytest.mark.parametrize("seed", range(50))
def test_exif_that_cannot_be_parsed_means_no_rotation(seed):
    noise = random.Random(seed).randbytes(60)
    header = (b"Exif\0\0", b"Exif\0\0II*\0", b"Exif\0\0MM\0*\0\0\0\x08\0\2", b"Exif\0\0II*\0\x08\0\0\0\x03\0")[seed % 4]
    for format in ("JPEG", "PNG", "WEBP"):
        assert load_image(to_bytes(picture(), format, exif=header + noise)).size == (24, 16)


def test_orientation_is_found_in_exif_that_pil_cannot_write_anew():
    # an ASCII ImageWidth, as some phones write it
    entries = struct.pack("<HHI4s", 0x0100, 2, 4, b"abc\0") + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    assert load_image(to_bytes(picture(), "JPEG", exif=exif)).size == (16, 24)


# What is refused


def test_missing_images_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("cat.png", to_bytes(picture(), "PNG"))
    (tmp_path / "file.txt").write_text("text")
    missing = [
        tmp_path / "none.png",
        str(tmp_path / "none.png"),
        tmp_path,
        tmp_path / "file.txt" / "cat.png",
        File(str(tmp_path / "none.png")),
        File(str(tmp_path / "images.zip"), "dog.png"),
        File(str(tmp_path / "none.zip"), "cat.png"),
        File(str(tmp_path / "none.arrow"), "0/image"),
    ]
    for source in missing:
        with pytest.raises(RecordError, match=re.escape(f"missing image: {source}: ")):
            load_image(source)
    assert pixels(load_image(File(str(tmp_path / "images.zip"), "cat.png"))) == pixels(picture())


def test_empty_files_are_named(tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("empty.jpg", b"")
    for source in (b"", tmp_path / "empty.jpg", File(str(tmp_path / "images.zip"), "empty.jpg")):
        assert kind_of(source) == "empty image file"


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"<!DOCTYPE html><title>404 Not Found</title>", "HTML, SVG or other XML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "a pointer of Git LFS"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 16\n", "PostScript"),
        (b"%PDF-1.7\n", "a PDF"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "HTML, SVG or other XML"),
        (b"\0", "an unknown format"),
        (bytes(1000), "zeros"),
        (b"root:x:0:0:secret\n", "an unknown format"),
        (b"\0\0\0\x18ftyp", "an unknown format"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0", "an unknown format"),
    ],
)
def test_unknown_formats_are_named_without_a_byte_of_the_file(data, what):
    """A record may name any file of the machine, and a report of it may be shared."""
    with pytest.raises(RecordError) as caught:
        load_image(data)
    assert str(caught.value).startswith(f"not an image: {len(data)} bytes: {what}")
    assert "root" not in str(caught.value) and repr(data[:8])[2:-1] not in str(caught.value)


def test_eps_never_starts_ghostscript():
    assert kind_of(to_bytes(picture(), "EPS")) == "not an image"


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "GIF", *LOSSY])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_images_are_damaged(format, share):
    noise = Image.frombytes("RGB", (24, 16), random.Random(0).randbytes(24 * 16 * 3))
    data = to_bytes(noise, format)
    assert kind_of(data[: int(len(data) * share)]) == "damaged image"


def test_damaged_archives_are_damaged_images(tmp_path):
    path = tmp_path / "images.zip"
    data = to_bytes(picture(), "BMP")
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        path = tmp_path / f"{compression}.zip"
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("cat.bmp", data)
        damaged = bytearray(path.read_bytes())
        for place in range(60, 70):  # behind the local header
            damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        with pytest.raises(RecordError, match=re.escape(f"damaged image: {path}!cat.bmp: ")):
            load_image(File(str(path), "cat.bmp"))
    path = tmp_path / "text.zip"
    path.write_bytes(b"not a zip file")
    assert kind_of(File(str(path), "cat.bmp")) == "damaged image"


def test_float_pixels_are_refused():
    data = to_bytes(Image.fromarray(np.array([[0.5, 1.0]], dtype=np.float32)), "TIFF")
    with pytest.raises(RecordError, match="damaged image: .* bytes: 32-bit float pixels"):
        load_image(data)


BOMBS = {
    "png": png(50_000, 50_000, 8, 2, [b""]),
    "below PIL's limit": png(10_001, 10_000, 8, 2, [b""]),
    "bmp": b"BM" + struct.pack("<IIIIiiHHIIIIII", 54, 0, 54, 40, 40_000, 40_000, 1, 24, 0, 0, 0, 0, 0, 0),
    "ppm": b"P6 30000 30000 255\n",
    "gif": b"GIF89a"
    + struct.pack("<HHBBB", 60_000, 60_000, 0, 0, 0)
    + b","
    + struct.pack("<HHHHB", 0, 0, 9, 9, 0)
    + b"\x08\0;",
    "tiff": tiff((256, 30_000), (257, 30_000), (258, 8), (259, 8), (262, 1), (273, 8), (278, 30_000), (279, 9)),
    "tile of a tiff": tiff(
        (256, 20), (257, 20), (258, 8), (259, 8), (262, 1), (322, 32_752), (323, 32_752), (324, 8), (325, 9)
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_without_decoding(monkeypatch, name):
    def never(*_):
        pytest.fail("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    monkeypatch.setattr(Image.core, "new", never)
    monkeypatch.setattr(Image.core, "fill", never)
    assert kind_of(BOMBS[name]) == "image too large"


@pytest.mark.parametrize("limit", [None, 10, 380])
def test_pils_own_limit_does_not_change_ours(monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # 384 pixels are an error above 2 * limit, a warning above it
    data = to_bytes(picture(), "PNG")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert kind_of(BOMBS["png"]) == "image too large"
        if limit == 10:
            assert kind_of(data) == "image too large"
        else:
            assert load_image(data).size == (24, 16)
    assert not caught


@pytest.mark.parametrize("size", [(101, 1), (1, 101), (2000, 19)])
def test_absurd_sizes_are_refused(size):
    assert kind_of(to_bytes(Image.new("RGB", size), "PNG")) == "absurd image size"


@pytest.mark.parametrize("size", [(1, 1), (100, 1), (1, 100), (2000, 20)])
def test_long_images_are_not_absurd(size):
    assert load_image(to_bytes(Image.new("RGB", size), "PNG")).size == size


def scans(data: bytes) -> list[int]:
    """Where each scan of a JPEG begins, and where the image ends."""
    return [found.start() for found in re.finditer(rb"\xff\xda", data)] + [data.rindex(b"\xff\xd9")]


def with_scans(count: int) -> bytes:
    """A progressive JPEG that goes on over its pixels until it has so many scans."""
    data = to_bytes(picture(), "JPEG", progressive=True)
    starts = scans(data)
    last = data[starts[-2] : starts[-1]]
    return data[: starts[-1]] + last * (count - len(starts) + 1) + data[starts[-1] :]


def test_a_jpeg_of_many_scans_is_refused_without_decoding(monkeypatch, processor):
    assert load_image(with_scans(10)).size == load_image(with_scans(images.MAX_SCANS)).size == (24, 16)
    for mode in ("exact", "fast"):
        with pytest.raises(RecordError, match="image too costly: .* more than 50 scans"):
            Preprocessor(CLIPImageProcessorPil(size={"shortest_edge": 8}), mode)(with_scans(images.MAX_SCANS + 1))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    assert kind_of(with_scans(images.MAX_SCANS + 1)) == kind_of(with_scans(20_000)) == "image too costly"
    comments = b"\xff\xfe\0\2" * 100_000
    data = to_bytes(picture(), "JPEG")
    assert kind_of(data[:2] + comments + data[2:]) == "image too costly"


def test_a_jpeg_of_many_scans_in_a_tiff_is_refused(monkeypatch):
    tags = [(256, 24), (257, 16), (258, 8), (259, 7), (262, 6), (277, 3), (278, 16)]
    for count, expected in ((10, "decoded"), (images.MAX_SCANS + 1, "image too costly")):
        jpeg = with_scans(count)
        begin = len(tiff(*tags, (273, 0), (279, 0)))
        monkeypatch.setattr(TiffImagePlugin.TiffImageFile, "load", lambda image: 1 / 0)
        with pytest.raises(RecordError) as caught:
            load_image(tiff(*tags, (273, begin), (279, len(jpeg))) + jpeg)
        assert caught.value.kind == ("damaged image" if expected == "decoded" else expected)


def test_marks_of_scans_that_are_not_of_the_image_do_not_count():
    """In a maker's note of EXIF, and in the film that phones put behind a photo."""
    data = to_bytes(picture(), "JPEG", quality=95)
    note = b"\xff\xda" * 10_000
    segment = b"\xff\xe1" + struct.pack(">H", len(note) + 2) + note
    assert pixels(load_image(data[:2] + segment + data[2:] + note)) == pixels(load_image(data))


def test_zip_members_of_an_absurd_size_are_refused_before_they_are_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(70 * 2**20))
        archive.writestr("plain.png", to_bytes(picture(), "PNG"))
    lying = bytearray(path.read_bytes())  # the central directory claims 4 GB
    place = lying.index(b"PK\1\2", lying.index(b"PK\1\2") + 4) + 24
    lying[place : place + 4] = struct.pack("<I", 2**32 - 2)
    (tmp_path / "lying.zip").write_bytes(lying)
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("unpacked"))
    for source in (File(str(path), "bomb.png"), File(str(tmp_path / "lying.zip"), "plain.png")):
        with pytest.raises(RecordError, match=re.escape(f"file too large: {source}: ")):
            load_image(source)
    monkeypatch.undo()
    assert pixels(load_image(File(str(path), "plain.png"))) == pixels(picture())


def test_a_file_of_gigabytes_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "huge.jpg"
    path.touch()
    os.truncate(path, 2**40)
    for source in (path, File(str(path))):
        assert kind_of(source) == "file too large"


# Colour profiles and photos from phones


def profile(description: str = "Swap", swap: bool = True) -> bytes:
    """An ICC profile of RGB in which red and green have changed their places, or that of sRGB."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    name = "sRGB".encode("utf-16-be")
    assert data.count(name) == 1
    data = data.replace(name, description.encode("utf-16-be"))
    if swap:
        data = data.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")
    return data


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG", pytest.param("AVIF", marks=LOSSY[-1].marks)])
def test_colours_of_a_profile_become_those_of_srgb(format):
    options = {"lossless": True} if format == "WEBP" else {"quality": 95} if format in ("JPEG", "AVIF") else {}
    data = to_bytes(Image.new("RGB", (16, 16), RED), format, icc_profile=profile(), **options)
    assert_close(load_image(data), Image.new("RGB", (16, 16), (0, 255, 0)), tolerance=6)
    preprocess = [Preprocessor(CLIPImageProcessorPil(size={"shortest_edge": 8}), mode) for mode in ("exact", "fast")]
    assert torch.equal(preprocess[0](data), preprocess[1](data))


def test_colours_of_a_profile_hold_in_every_mode():
    green = Image.new("RGB", (2, 1), (0, 255, 0))
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([*RED])
    sheer = Image.new("RGBA", (2, 1), (*RED, 255))
    sheer.putpixel((1, 0), (*RED, 0))
    for image in (palette, sheer):
        found = load_image(to_bytes(image, "PNG", icc_profile=profile()))
        assert found.getpixel((0, 0)) == green.getpixel((0, 0)) and "icc_profile" not in found.info
    assert load_image(to_bytes(sheer, "PNG", icc_profile=profile())).getpixel((1, 0)) == WHITE


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("data", [b"noise", b"", profile()[:200], profile("sRGB")], ids=["noise", "", "cut", "sRGB"])
def test_damaged_profiles_and_srgb_itself_change_nothing(mode, data):
    image = picture().convert(mode)
    format = "TIFF" if mode == "CMYK" else "PNG"
    assert pixels(load_image(to_bytes(image, format, icc_profile=data))) == pixels(image.convert("RGB"))


@pytest.mark.parametrize("name", ["HEIF", "AVIF"])
def test_formats_that_are_not_installed_are_named_with_their_package(name, monkeypatch):
    brand = {"HEIF": b"heic", "AVIF": b"avif"}[name]
    monkeypatch.setattr(images, "has_heif", lambda: False)
    monkeypatch.setattr(images.features, "check", lambda feature: False)
    for brands in (brand + bytes(4) + b"mif1", b"mif1" + bytes(4) + brand):
        data = struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands + bytes(100)
        with pytest.raises(RecordError, match="image of a format that is not installed: .* pip install") as caught:
            load_image(data)
        assert ("clip-phi[photos]" in str(caught.value)) == (name == "HEIF")
    assert "pip install" in images.image_suffixes()[f".{name.lower()}"]


def test_heic_photos_are_read():
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    assert images.image_suffixes()[".heic"] is None
    for options in ({}, {"icc_profile": profile()}):
        data = to_bytes(picture(), "HEIF", quality=-1, **options)
        expected = load_image(to_bytes(picture(), "PNG", **options))
        assert_close(load_image(data), expected, tolerance=12)
        assert kind_of(data[: len(data) // 2]) == "damaged image"
    assert kind_of(data[:4] + b"ftypheic") == "damaged image"
    exif = Image.Exif()
    exif[0x0112] = 6  # a HEIC is turned by its own box: this tag is only a copy
    assert load_image(to_bytes(picture(), "HEIF", exif=exif)).size == (24, 16)


# Arrow files


def test_images_in_an_arrow_file_are_read_by_row_column_and_place(tmp_path):
    datasets = pytest.importorskip("datasets")
    image = datasets.Image()
    table = {
        "image": [{"bytes": to_bytes(picture(), "PNG"), "path": None}, {"bytes": None, "path": "cat.png"}, None],
        "images": [[{"bytes": to_bytes(Image.new("RGB", (4, 4), colour), "PNG")} for colour in (RED, BLUE)], [], []],
        "jpeg": [to_bytes(picture(), "JPEG"), b"", b"<html>"],
    }
    kinds = datasets.Features({"image": image, "images": datasets.Sequence(image), "jpeg": datasets.Value("binary")})
    path = str(tmp_path / "data.arrow")
    from datasets.arrow_writer import ArrowWriter

    with ArrowWriter(path=path, features=kinds) as writer:
        for row in range(3):
            writer.write({name: values[row] for name, values in table.items()})
        writer.finalize()
    assert pixels(load_image(File(path, "0/image"))) == pixels(picture())
    assert load_image(File(path, "0/images/0")).getpixel((0, 0)) == RED
    assert load_image(File(path, "0/images/1")).getpixel((0, 0)) == BLUE
    assert load_image(File(path, "0/jpeg")).size == (24, 16)
    missing = ["1/image", "2/image", "3/image", "0/none", "0/images/2", "1/images/0"]
    assert {member: kind_of(File(path, member)) for member in missing} == dict.fromkeys(missing, "missing image")
    assert kind_of(File(path, "1/jpeg")) == "empty image file"
    assert kind_of(File(path, "2/jpeg")) == "not an image"


# Anything


def small_images() -> list[bytes]:
    """One or more of every format and of most kinds of pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    small, frames = picture(), [Image.new("RGB", (24, 16), RED), Image.new("RGB", (24, 16), BLUE)]
    made = [
        to_bytes(small, "JPEG", exif=exif),
        to_bytes(small, "JPEG", progressive=True),
        to_bytes(small.convert("CMYK"), "JPEG"),
        to_bytes(small, "MPO", save_all=True, append_images=frames),
        to_bytes(small, "PNG", exif=exif),
        to_bytes(small.convert("RGBA"), "PNG"),
        to_bytes(small.convert("P"), "PNG", transparency=3),
        to_bytes(frames[0], "PNG", save_all=True, append_images=frames),
        to_bytes(Image.fromarray(np.arange(384, dtype=np.uint16).reshape(16, 24) * 100), "PNG"),
        to_bytes(small, "WEBP", exif=exif),
        to_bytes(small.convert("RGBA"), "WEBP", lossless=True),
        to_bytes(frames[0], "WEBP", save_all=True, append_images=frames),
        to_bytes(small, "GIF"),
        to_bytes(frames[0], "GIF", save_all=True, append_images=frames),
        to_bytes(small, "BMP"),
        to_bytes(small.convert("P"), "BMP"),
        to_bytes(small, "TIFF", exif=exif),
        to_bytes(small, "TIFF", compression="tiff_lzw"),
        to_bytes(small, "TIFF", compression="jpeg"),
        to_bytes(small.convert("1"), "TIFF", compression="group4"),
        to_bytes(Image.new("F", (24, 16), 0.5), "TIFF"),
        to_bytes(small, "PPM"),
        b"P3 2 2 255 0 0 0 9 9 9 99 99 99 255 255 255",
        png(2, 2, 2, 0, [b"\x60", b"\x90"], chunk(b"tRNS", b"\0\1")),
    ]
    return [*made, to_bytes(small, "AVIF", exif=exif)] if HAS_AVIF else made


def mutate(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """Flip bits, cut off, insert, leave out, repeat, or splice with another format: mostly near the header."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        place = chance.randrange(min(len(changed), chance.choice((32, 200, 10**6, 10**6))) or 1)
        how = chance.randrange(8)
        if how <= 2 and changed:
            changed[place] ^= 1 << chance.randrange(8)
        elif how == 3:
            changed[place : place + 4] = chance.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\1\0"))
        elif how == 4:
            changed = changed[: chance.randrange(len(changed) + 1)]
        elif how == 5:
            changed[place:place] = chance.randbytes(chance.choice((1, 2, 16)))
        elif how == 6:
            del changed[place : place + chance.choice((1, 4, 12))]
        else:
            other = chance.choice(others)
            changed[:place] = other[: chance.choice((place, 8, 16))]
    return bytes(changed)


def test_10_000_mutations_give_an_image_or_a_defect_and_nothing_else(monkeypatch, capfd, caplog):
    monkeypatch.setattr(images, "MAX_PIXELS", 300_000)  # for speed: some mutations are large images, and good ones
    chance, sources, counts = random.Random(0), small_images(), {}
    assert all(load_image(data).mode == "RGB" for data in sources if Image.open(io.BytesIO(data)).mode != "F")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(10_000):
            data = mutate(sources[number % len(sources)], sources, chance)
            try:
                image = load_image(data)
            except RecordError as defect:
                kind = defect.kind
                assert re.fullmatch(r"[^\n]{1,150}", defect.detail) or kind == "empty image file"
                assert not re.search("0x[0-9a-f]{6}", defect.detail), "differs from run to run"
            else:
                kind = "image"
                assert image.mode == "RGB" and 0 < image.width * image.height <= 300_000
                assert len(image.tobytes()) == image.width * image.height * 3
            counts[kind] = counts.get(kind, 0) + 1
    assert not caught, caught[0]
    assert not caplog.records
    assert capfd.readouterr() == ("", "")
    assert set(counts) - {"image of a format that is not installed"} == {
        "image",
        "empty image file",
        "not an image",
        "damaged image",
        "image too large",
        "absurd image size",
    }
    assert min(counts["image"], counts["damaged image"]) > 2000, counts


# Pixel values


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours and the noise of a sensor."""
    chance = np.random.default_rng(seed)
    coarse = Image.fromarray(chance.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray((smooth + chance.normal(0, 6, (height, width, 1))).clip(0, 255).astype(np.uint8))


def clip_processor(edge: int = 32, **settings) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(
        **{"size": {"shortest_edge": edge}, "crop_size": {"height": edge, "width": edge}} | settings
    )


def hugging_face(image_processor, source) -> torch.Tensor:
    return image_processor(load_image(source), return_tensors="pt")["pixel_values"][0]


def off_by(pixel_values: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    return (pixel_values.int() - others.int()).abs()


def test_exact_pixels_equal_hugging_faces_for_any_size_and_settings():
    chance = np.random.default_rng(0)
    for number in range(80):
        width, height = np.exp(chance.uniform(0, 6, 2)).astype(int).tolist()
        if max(width, height) > 100 * min(width, height):
            continue
        edge = int(chance.integers(1, 120))
        crop_height, crop_width = chance.integers(1, edge + 1, 2).tolist() if number % 2 else (edge, edge)
        image_processor = clip_processor(
            edge,
            crop_size={"height": crop_height, "width": crop_width},
            resample=int(chance.choice([3, 3, 0, 1, 2, 4, 5])),
            image_mean=chance.uniform(0, 1, 3).tolist(),
            image_std=chance.uniform(0.05, 2, 3).tolist(),
            do_normalize=number % 7 > 0,
            do_rescale=number % 5 > 0,
        )
        preprocessor = Preprocessor(image_processor)
        assert preprocessor.table is not None
        data = to_bytes(photo(width, height, number), "PNG")
        ours, theirs = preprocessor(data), hugging_face(image_processor, data)
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), (width, height, image_processor)


def test_exact_pixels_of_clips_own_settings_are_float32_and_contiguous(tmp_path):
    image_processor = CLIPImageProcessorPil()
    preprocessor = pickle.loads(pickle.dumps(Preprocessor(image_processor)))
    path = tmp_path / "photo.jpg"
    for size in [(640, 480), (427, 640), (500, 375), (224, 224), (225, 223), (31, 17), (1, 1), (3000, 40)]:
        path.write_bytes(to_bytes(photo(*size), "JPEG", quality=90))
        expected = hugging_face(image_processor, path)
        for source in (path, str(path), File(str(path)), path.read_bytes()):
            pixel_values = preprocessor(source)
            assert (pixel_values.dtype, pixel_values.shape) == (torch.float32, (3, 224, 224))
            assert pixel_values.is_contiguous() and torch.equal(pixel_values, expected)


class OtherProcessor(CLIPImageProcessorPil):
    def rescale(self, image, scale, **kwargs):
        return super().rescale(image, scale, **kwargs) * 2


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize(
    "image_processor",
    [
        OtherProcessor(),
        clip_processor(crop_size={"height": 40, "width": 32}),
        clip_processor(do_center_crop=False),
        clip_processor(do_resize=False),
        clip_processor(size={"height": 40, "width": 50}),
        clip_processor(size={"shortest_edge": 32, "longest_edge": 40}),
        clip_processor(do_pad=True, pad_size={"height": 50, "width": 50}),
    ],
    ids=["subclass", "crop and pad", "no crop", "no resize", "two sides", "longest edge", "pad"],
)
def test_other_image_processors_are_themselves_called(image_processor, mode):
    if mode == "fast":
        pytest.importorskip("simplejpeg")
    data = to_bytes(photo(90, 70), "JPEG")
    assert torch.equal(Preprocessor(image_processor, mode)(data), hugging_face(image_processor, data))


def test_unknown_pixels_are_refused():
    with pytest.raises(ValueError, match="image_processing 'near': choose from exact, fast"):
        Preprocessor(clip_processor(), "near")


def test_fast_pixels_without_simplejpeg_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'clip-phi[fast]'")):
        Preprocessor(clip_processor(), "fast")
    assert Preprocessor(clip_processor())(to_bytes(photo(90, 70), "JPEG")).shape == (3, 32, 32)


def in_levels(edge: int = 32, **settings) -> tuple[Preprocessor, Preprocessor]:
    """Exact and fast, neither rescaled nor normalised."""
    pytest.importorskip("simplejpeg")
    image_processor = clip_processor(edge, do_rescale=False, do_normalize=False, **settings)
    return Preprocessor(image_processor), Preprocessor(image_processor, "fast")


def test_fast_pixels_of_photos_are_one_level_off_and_less_than_1_in_100():
    exact, fast = in_levels(112)
    differing = []
    for number, size in enumerate([(640, 480), (480, 640), (333, 500), (168, 168), (1000, 170), (400, 401)]):
        data = to_bytes(photo(*size, number), "JPEG", quality=90)
        assert _decode_plain_jpeg(data, 168) is not None
        difference = off_by(fast(data), exact(data))
        assert difference.max() <= 1, size
        differing.append((difference > 0).float().mean())
    assert 0 < torch.tensor(differing).max() <= 0.01, differing


def test_fast_pixels_of_patterns_are_one_level_off():
    exact, fast = in_levels()
    chance = np.random.default_rng(0)
    checks = np.indices((80, 96)).sum(0)[..., None] % 2 * np.array([255, 254, 1])
    stripes = np.broadcast_to(chance.integers(0, 256, (1, 96, 3)), (80, 96, 3))
    noise = chance.integers(0, 2, (80, 96, 3)) * 255
    for levels in (checks, stripes, noise, stripes[::-1, ::-1].swapaxes(0, 1)):
        data = to_bytes(Image.fromarray(levels.astype(np.uint8)), "JPEG", quality=100, subsampling=0)
        assert off_by(fast(data), exact(data)).max() <= 1


def test_simplejpeg_decodes_to_the_pixels_of_pil():
    pytest.importorskip("simplejpeg")
    for number in range(36):
        options = {"subsampling": number % 3, "progressive": number % 2 > 0, "quality": 20 + 2 * number}
        data = to_bytes(photo(33 + number * 3, 90 - number, number), "JPEG", **options)
        assert np.array_equal(_decode_plain_jpeg(data, 0), np.asarray(load_image(data))), options


def test_fast_pixels_of_all_but_plain_jpegs_are_exact():
    exact, fast = in_levels(8)
    image, exif = photo(90, 70), Image.Exif()
    exif[0x0112] = 6
    plain = to_bytes(image, "JPEG")
    others = {
        "rotated": to_bytes(image, "JPEG", exif=exif),
        "gray": to_bytes(image.convert("L"), "JPEG"),
        "cmyk": to_bytes(image.convert("CMYK"), "JPEG"),
        "two frames": to_bytes(image, "MPO", save_all=True, append_images=[photo(90, 70, 1)]),
        "small": to_bytes(photo(11, 11), "JPEG"),
        "with a warning": plain[:-40] + b"\xff\xd0" + plain[-38:],
    }
    others |= {format: to_bytes(image, format) for format in ("PNG", "WEBP", "BMP", "TIFF")}
    assert _decode_plain_jpeg(plain, 12) is not None
    for name, data in others.items():
        assert _decode_plain_jpeg(data, 12) is None, name
        assert torch.equal(fast(data), exact(data)), name
    exact, fast = in_levels(8, resample=Image.Resampling.BILINEAR)
    assert torch.equal(fast(plain), exact(plain))


def test_mutated_jpegs_give_the_same_defects_in_fast_mode():
    exact, fast = in_levels(8)
    chance = random.Random(0)
    sources = [
        to_bytes(photo(20 + number, 40 - number, number), "JPEG", progressive=number % 3 == 0, subsampling=number % 2)
        for number in range(12)
    ]

    def outcome(preprocessor: Preprocessor, data: bytes) -> torch.Tensor | str:
        try:
            return preprocessor(data)
        except RecordError as defect:
            return str(defect)

    counts = {"defect": 0, "fast": 0, "exact": 0}
    for number in range(3000):
        data = mutate(sources[number % len(sources)], sources, chance)
        ours, expected = outcome(fast, data), outcome(exact, data)
        if isinstance(expected, str):
            assert ours == expected
            counts["defect"] += 1
        else:
            assert isinstance(ours, torch.Tensor) and off_by(ours, expected).max() <= 1
            counts["exact" if torch.equal(ours, expected) else "fast"] += 1
    assert min(counts.values()) > 100, counts
