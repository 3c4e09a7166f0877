"""Corpora in the official layouts with every kind of damage planted in them, and what must become of each.

An oracle of its own: nothing here is taken from clip_phi, the names of the kinds are written down once more."""

import io
import json
import random
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

END, PAD = "<|endoftext|>", "<pad>"
HALF = "\ud83d"  # the first half of an emoji, as json's "\ud83d" gives it
LONG = "very " * 120  # at 3 or more characters a token: longer than the tiny decoder's context of 256
NUM_GOOD_IMAGES = 60
IMAGE_KINDS = {"empty image file", "not an image", "damaged image", "image too large", "absurd image size"}


@dataclass
class Corpus:
    """source: KIND:PATH,... of each file. skipped and mended: what a report must say, by kind; a kind in IMAGE_KINDS
    is only found in training. damage: how often each kind of damage (and of oddity that is used as is) is planted."""

    sources: list[str] = field(default_factory=list)
    records: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    damage: Counter[str] = field(default_factory=Counter)

    def plant(self, name: str, times: int, records: int, outcome: str, kind: str = "") -> None:
        """So many records in all; of each planting one is mended, or all are skipped."""
        self.damage[name] += times
        self.records += records
        if outcome == "skipped":
            self.skipped[kind] += records
        elif outcome == "repaired":
            self.repaired[kind] += times
        else:
            assert outcome == "used", outcome

    @property
    def found_by_reading(self) -> int:
        """Records that are skipped before any image is opened."""
        return sum(count for kind, count in self.skipped.items() if kind not in IMAGE_KINDS)


# Images


def picture(seed: int = 0, size: tuple[int, int] = (40, 36)) -> Image.Image:
    return Image.frombytes("RGB", size, random.Random(seed).randbytes(size[0] * size[1] * 3))


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(width: int, height: int, pixels: bytes) -> bytes:
    """pixels: what stands in the IDAT chunk."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _sideways() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(), "JPEG", exif=exif)


def _put(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


JPEG, PNG = encoded(picture(), "JPEG"), encoded(picture(), "PNG")
FRAMES = [picture(seed) for seed in range(3)]
# name: (how a report calls it, "" if the image is used; the file's ending; what puts it there)
IMAGES: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "missing file": ("missing image", ".jpg", lambda path: None),
    "folder instead of a file": ("missing image", ".jpg", Path.mkdir),
    "dangling link": ("missing image", ".jpg", lambda path: path.symlink_to("gone.jpg")),
    "ending in other case": ("missing image", ".jpg", lambda path: path.with_suffix(".JPG").write_bytes(JPEG)),
    "zero bytes": ("empty image file", ".jpg", _put(b"")),
    "truncated jpeg": ("damaged image", ".jpg", _put(JPEG[: len(JPEG) // 2])),
    "jpeg without pixels": ("damaged image", ".jpg", _put(JPEG[: JPEG.index(b"\xff\xda")])),
    "truncated png": ("damaged image", ".png", _put(PNG[: len(PNG) // 2])),
    "truncated gif": ("damaged image", ".gif", _put(encoded(picture(), "GIF")[:900])),
    "png header alone": ("damaged image", ".png", _put(PNG[:40])),
    "corrupt zlib stream": ("damaged image", ".png", _put(png(40, 36, b"\x78\x9c" + bytes(range(200))))),
    "float pixels": ("damaged image", ".tif", _put(encoded(Image.new("F", (9, 9), 0.5), "TIFF"))),
    "text called jpg": ("not an image", ".jpg", _put(b"this is a note\n")),
    "html error page": ("not an image", ".jpg", _put(b"<!DOCTYPE html><title>404 Not Found</title>")),
    "git lfs pointer": ("not an image", ".jpg", _put(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n")),
    "svg": ("not an image", ".jpg", _put(b'<svg xmlns="http://www.w3.org/2000/svg"/>')),
    "zeros": ("not an image", ".jpg", _put(bytes(5000))),
    "bomb header": ("image too large", ".png", _put(png(50_000, 50_000, zlib.compress(b"")))),
    "absurd strip": ("absurd image size", ".png", _put(encoded(Image.new("RGB", (1, 500)), "PNG"))),
    "cmyk": ("", ".jpg", _put(encoded(picture().convert("CMYK"), "JPEG"))),
    "16-bit": ("", ".png", _put(encoded(Image.new("I;16", (40, 36), 30_000), "PNG"))),
    "palette": ("", ".png", _put(encoded(picture().convert("P"), "PNG"))),
    "palette with transparency": ("", ".png", _put(encoded(picture().convert("P"), "PNG", transparency=3))),
    "grayscale": ("", ".jpg", _put(encoded(picture().convert("L"), "JPEG"))),
    "grayscale with alpha": ("", ".png", _put(encoded(picture().convert("LA"), "PNG"))),
    "1-bit": ("", ".png", _put(encoded(picture().convert("1"), "PNG"))),
    "rgba": ("", ".png", _put(encoded(picture().convert("RGBA"), "PNG"))),
    "gif": ("", ".gif", _put(encoded(picture(), "GIF"))),
    "animated gif": ("", ".gif", _put(encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]))),
    "webp": ("", ".webp", _put(encoded(picture(), "WEBP"))),
    "bmp": ("", ".bmp", _put(encoded(picture(), "BMP"))),
    "tiff": ("", ".tif", _put(encoded(picture(), "TIFF"))),
    "progressive jpeg": ("", ".jpg", _put(encoded(picture(), "JPEG", progressive=True))),
    "exif-rotated": ("", ".jpg", _put(_sideways())),
    "garbage as exif": ("", ".jpg", _put(encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0*" + bytes(range(90, 150))))),
    "png called jpg": ("", ".jpg", _put(PNG)),
    "gif called png": ("", ".png", _put(encoded(picture(), "GIF"))),
    "bytes behind the end": ("", ".jpg", _put(JPEG + b"<html>ad</html>" * 9)),
    "one pixel": ("", ".png", _put(encoded(picture(size=(1, 1)), "PNG"))),
    # PIL leaves the rows black that a whole zlib stream does not hold, and says nothing
    "too few rows in a png": ("", ".png", _put(png(40, 36, zlib.compress(bytes(121 * 9))))),
    "link to a good file": ("", ".jpg", lambda path: path.symlink_to("good0.jpg")),
}


def write_good_images(folder: Path) -> None:
    for number in range(NUM_GOOD_IMAGES):
        (folder / f"good{number}.jpg").write_bytes(encoded(picture(number), "JPEG"))


def file_name(name: str, number: int) -> str:
    return f"{name.replace(' ', '_')}_{number}{IMAGES[name][1]}"


def write_image(folder: Path, name: str, number: int) -> str:
    """Plant an image of this kind. Returns the name of its file."""
    path = folder / file_name(name, number)
    IMAGES[name][2](path)
    return path.name


# LLaVA-Instruct and its relatives


def record(number: int, *values: Any, image: Any = "", **more: Any) -> dict[str, Any]:
    """A good record: a question and an answer, or these values in turn, about a good image or this one; None: none."""
    values = values or (f"<image>\nWhat is number {number}?", f"Number {number}.")
    turns = [{"from": "human" if place % 2 == 0 else "gpt", "value": value} for place, value in enumerate(values)]
    image = f"good{number % NUM_GOOD_IMAGES}.jpg" if image == "" else image
    return {"id": str(number), "conversations": turns} | ({} if image is None else {"image": image}) | more


def changed(number: int, **turn: Any) -> dict[str, Any]:
    """A good record with this in its first turn."""
    whole = record(number)
    whole["conversations"][0] |= turn
    return whole


def turns(number: int, *speakers: str) -> dict[str, Any]:
    said = [{"from": speaker, "value": f"{speaker} {number} {place}"} for place, speaker in enumerate(speakers)]
    return record(number) | {"conversations": said}


def question(number: int, **more: Any) -> dict[str, Any]:
    return {"image": f"good{number % NUM_GOOD_IMAGES}.jpg", "question": f"What, {number}?", "answers": ["A."]} | more


def without(row: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != key}


def messages(number: int, content: Any) -> dict[str, Any]:
    said = [{"role": "user", "content": content}, {"role": "assistant", "content": f"Number {number}."}]
    return {"image": f"good{number % NUM_GOOD_IMAGES}.jpg", "messages": said}


NOT_ONCE, AFTER = "<image> not once for each image", "several images, but an <image> after text"
IMAGE_OUTSIDE = "<image> outside a question"
LATER, NO_TOKEN = "image stood in a later turn, and was put first", "image without <image> in the text was put first"
UNANSWERED = "last question has no answer, and was cut"
CUT = "longer than max_length, and was cut after an answer"
# name: (kind, record by number), one record each
SKIPPED: dict[str, tuple[str, Callable[[int], Any]]] = {
    "null record": ("record is not an object", lambda n: None),
    "list as record": ("record is not an object", lambda n: [n, "x"]),
    "text as record": ("record is not an object", lambda n: f"record {n}"),
    "empty record": ("no conversation, question or caption", lambda n: {}),
    "no conversation": ("no conversation, question or caption", lambda n: without(record(n), "conversations")),
    "misspelt conversations": ("no conversation, question or caption", lambda n: {"image": "x", "conversation": []}),
    "empty conversation": ("conversation is empty", lambda n: record(n) | {"conversations": []}),
    "conversation is text": ("conversation is not a list of turns", lambda n: record(n) | {"conversations": "hello"}),
    "conversation is an object": (
        "conversation is not a list of turns",
        lambda n: record(n) | {"conversations": {"from": "human", "value": "x"}},
    ),
    "turn is text": ("turn is not an object", lambda n: record(n) | {"conversations": ["What?", "That."]}),
    "turn is null": ("turn is not an object", lambda n: record(n) | {"conversations": [None]}),
    "unknown speaker": ("unknown speaker", lambda n: turns(n, "human", "bot")),
    "no speaker": ("unknown speaker", lambda n: record(n) | {"conversations": [{"value": "x"}]}),
    "speaker is a number": ("unknown speaker", lambda n: changed(n, **{"from": n})),
    "no text": ("question is not text", lambda n: record(n) | {"conversations": [{"from": "human"}]}),
    "null answer": ("answer is not text", lambda n: record(n, f"<image> {n}?", None)),
    "number as answer": ("answer is not text", lambda n: record(n, f"<image> {n}?", n)),
    "nan as question": ("question is not text", lambda n: record(n, float("nan"), "x")),
    "object as question": ("question is not text", lambda n: record(n, {"text": "x"}, "x")),
    "nothing but <image>": ("question is empty", lambda n: record(n, "<image>\n", f"Number {n}.")),
    "empty answer": ("answer is empty", lambda n: record(n, f"<image> {n}?", "")),
    "blank answer": ("answer is empty", lambda n: record(n, f"<image> {n}?", " \n\t\u00a0\u2003")),
    "answer comes first": ("first turn is an answer", lambda n: turns(n, "gpt", "human", "gpt")),
    "two questions in a row": ("two questions in a row", lambda n: turns(n, "human", "human", "gpt")),
    "two answers in a row": ("two answers in a row", lambda n: turns(n, "human", "gpt", "gpt")),
    "system in the middle": ("system turn is not the first", lambda n: turns(n, "human", "system", "gpt")),
    "no answer": ("no answer", lambda n: turns(n, "human")),
    "system alone": ("no answer", lambda n: turns(n, "system")),
    "<image> in an answer": (IMAGE_OUTSIDE, lambda n: record(n, f"What, {n}?", "It is <image>.")),
    "two <image>": ("several <image> for one image", lambda n: record(n, f"<image><image> {n}?", "x")),
    "<image> in two turns": ("several <image> for one image", lambda n: record(n, "<image> a", "b", "<image> c", "d")),
    "<image> without an image": ("<image> without an image", lambda n: record(n, image=None)),
    "one <image> for two": (NOT_ONCE, lambda n: record(n, f"<image> {n}?", "x", image=["good0.jpg", "good1.jpg"])),
    "<image> after text": (AFTER, lambda n: record(n, f"<image> {n} <image>?", "x", image=["good0.jpg", "good1.jpg"])),
    "image is a number": ("image name is not text", lambda n: record(n, image=n)),
    "image is an object": ("image name is not text", lambda n: record(n, image={"path": "good1.jpg"})),
    "image name is blank": ("image name is empty", lambda n: record(n, image=" ")),
    "image name with a zero byte": ("image name is not valid", lambda n: record(n, image="good1.jpg\0")),
    "image name with half a character": ("image name is not valid Unicode", lambda n: record(n, image=f"{HALF}.jpg")),
    "image name is a folder's": ("missing image", lambda n: record(n, image="../images/")),
    "image name is too long": ("image name is not valid", lambda n: record(n, image="x" * 5000 + ".jpg")),
    "question with half a character": ("question is not valid Unicode", lambda n: record(n, f"<image> {HALF}?", "x")),
    "answer with half a character": ("answer is not valid Unicode", lambda n: record(n, f"<image> {n}?", f"{HALF}.")),
    "end token in a question": ("text cannot be encoded", lambda n: record(n, f"<image> {n} {END}?", "x")),
    "end token in an answer": ("text cannot be encoded", lambda n: record(n, f"<image> {n}?", f"x {END}")),
    "pad token in an answer": ("text cannot be encoded", lambda n: record(n, f"<image> {n}?", f"x {PAD} y")),
    "<image> made by taking one out": ("text cannot be encoded", lambda n: record(n, f"<im<image>age> {n}?", "x")),
    "first answer too long": ("longer than max_length", lambda n: record(n, f"<image> {n}?", LONG)),
    "first question too long": ("longer than max_length", lambda n: record(n, f"<image> {LONG}", "x")),
    "missing recording": ("missing speech", lambda n: changed(n, speech=f"{n}.wav")),
    "recording is a number": ("speech name is not text", lambda n: changed(n, speech=n)),
    "recording without transcript": ("speech without a transcript", lambda n: changed(n, speech="speech.wav")),
    "empty transcript": ("transcript is empty", lambda n: changed(n, speech="speech.wav", transcript=" ")),
    "transcript is a list": ("transcript is not text", lambda n: changed(n, transcript=["x"])),
    "<image> in a transcript": ("text cannot be encoded", lambda n: changed(n, transcript="an <image>")),
}
SKIPPED_LINES: dict[str, tuple[str, Callable[[int], Any]]] = {
    "line broken off": ("line is not json", lambda n: json.dumps(record(n)).encode()[:-9]),
    "line not in utf-8": ("line is not json", lambda n: b'{"question": "caf\xe9 %d"}' % n),
    "half a character in raw bytes": (
        "question is not valid Unicode",
        lambda n: b'{"prompt": "%d \xed\xa0\xbd", "completion": "x"}' % n,
    ),
    "binary line": ("line is not json", lambda n: b"\x89PNG\r\x1a\0\xff\xd8" + bytes([n % 7, 1, 2])),
    "two records in a line": ("line is not json", lambda n: json.dumps(record(n)).encode() * 2),
    "line nested too deep": ("line is not json", lambda n: b"[" * 100_000),
    "no answers": ("answers are not a list, or it is empty", lambda n: question(n, answers=[])),
    "answers are text": ("answers are not a list, or it is empty", lambda n: question(n, answers="A.")),
    "empty among the answers": ("answer is empty", lambda n: question(n, answers=["A.", ""])),
    "question is null": ("question is not text", lambda n: question(n, question=None)),
    "question asks of no image": (
        "<image> without an image",
        lambda n: without(question(n, question="<image>?"), "image"),
    ),
    "prompt is a number": (
        "prompt or completion is neither text nor a list",
        lambda n: {"prompt": n, "completion": "x"},
    ),
    "video": (
        "content is not text or image",
        lambda n: messages(n, [{"type": "video"}, {"type": "text", "text": "x"}]),
    ),
    "content without type": ("content is not text or image", lambda n: messages(n, ["What?"])),
    "content text is a number": ("content text is not text", lambda n: messages(n, [{"type": "text", "text": n}])),
    "caption of no image": ("caption without an image", lambda n: {"caption": f"Number {n}."}),
    "no captions": ("no caption", lambda n: {"image": "good1.jpg", "captions": []}),
    "caption is a number": ("caption is not text", lambda n: {"image": "good1.jpg", "caption": n}),
}
MENDED: dict[str, tuple[str, Callable[[int], Any]]] = {
    "no <image> in the text": (NO_TOKEN, lambda n: record(n, f"What is number {n}?", "x")),
    "<image> in the second question": (
        LATER,
        lambda n: record(n, f"Hello {n}.", "Hello.", "<image>\nWhat is it?", "x"),
    ),
    "question at the end": (UNANSWERED, lambda n: record(n, f"<image> {n}?", "x", "And?")),
    "second answer too long": (CUT, lambda n: record(n, f"<image> {n}?", "x", "And?", LONG)),
    "second question too long": (CUT, lambda n: record(n, f"<image> {n}?", "x", LONG, "y")),
}
USED: dict[str, Callable[[int], Any]] = {
    "text-only": lambda n: record(n, f"What is 1 + {n}?", "More.", image=None),
    "null image": lambda n: record(n, f"What is 2 + {n}?", "More.", image=None) | {"image": None},
    "empty list of images": lambda n: record(n, f"What is 3 + {n}?", "More.", image=None) | {"images": []},
    "list of one image": lambda n: record(n, image=[f"good{n % NUM_GOOD_IMAGES}.jpg"]),
    "<image> last": lambda n: record(n, f"What is number {n}?\n<image>", "x"),
    "<image> in the middle": lambda n: record(n, f"What is <image> number {n}?", "x"),
    "emoji": lambda n: record(
        n, f"<image> \N{DOG FACE} {n}?", "\U0001f469\u200d\U0001f52c \u2014 na\u00efve caf\u00e9"
    ),
    "right to left": lambda n: record(
        n, f"<image> \u0645\u0631\u062d\u0628\u0627 {n}", "\u05e9\u05dc\u05d5\u05dd \u202e"
    ),
    "control characters": lambda n: record(n, f"<image> \0\x07\x1b[31m {n}", "a\0b\x7f\ufeff\ufffd\uffff"),
    "template's own marks": lambda n: record(n, f"<image> {{{{ messages }}}} {n} {{% if %}}", "\nOutput: x\nInstruct:"),
    "almost <image>": lambda n: record(n, f"<image> <IMAGE> < image> {n}", "</image> <|endof text|>"),
    "id used twice, other text": lambda n: record(n) | {"id": "0"},
    "no id": lambda n: without(record(n), "id"),
    "unknown keys": lambda n: record(n, source="web", score=float("nan"), nested=[[[{}]]]),
    "system first": lambda n: (
        record(n) | {"conversations": [{"from": "system", "value": f"Be {n}."}] + record(n)["conversations"]}
    ),
    "transcript": lambda n: changed(n, transcript="what is it", speech="speech.wav"),
    "image in a subfolder": lambda n: record(n, image=f"sub/../good{n % NUM_GOOD_IMAGES}.jpg"),
    "image name with blanks around": lambda n: record(n, image=f" good{n % NUM_GOOD_IMAGES}.jpg\n"),
}
USED_LINES: dict[str, Callable[[int], Any]] = {
    "messages": lambda n: messages(n, [{"type": "image"}, {"type": "text", "text": f"Which number, {n}?"}]),
    "messages without image item": lambda n: messages(n, f"Which number is {n}?"),
    "prompt and completion": lambda n: {"prompt": f"Say {n}.", "completion": f"{n}."},
    "question and answers": lambda n: question(n, answers=[{"answer": "yes"}, {"answer": "no"}, {"answer": "yes"}]),
    "question and answer": lambda n: without(question(n, answer="yes"), "answers"),
    "caption": lambda n: {"image": f"good{n % NUM_GOOD_IMAGES}.jpg", "caption": f"Number {n}."},
    "a key that is there twice": lambda n: b'{"prompt": 5, "prompt": "Say it, %d.", "completion": "It."}' % n,
    "blanks around a line": lambda n: b" \t" + json.dumps(record(n)).encode() + b" \r",
}  # fmt: skip


def write_llava(folder: Path, num_good: int = 300) -> Corpus:
    """images/, instruct.json (LLaVA-Instruct) and lines.jsonl (all other layouts, and damaged lines) in folder."""
    corpus = Corpus()
    images = folder / "images"
    images.mkdir(parents=True)
    write_good_images(images)
    (images / "sub").mkdir()
    (images / "speech.wav").write_bytes(b"RIFF")
    numbers = iter(range(10**6))
    items = [record(next(numbers)) for _ in range(num_good)]
    lines = [question(next(numbers)) for _ in range(50)]
    corpus.records += num_good + 50
    for place, name in enumerate(IMAGES):
        kind, times = IMAGES[name][0], 1 + place % 3
        for _ in range(times):
            image = write_image(images, name, next(numbers))
            items += [record(next(numbers), image=image) for _ in range(2)]
        corpus.plant(name, times, 2 * times, "skipped" if kind else "used", kind)
    for rows, skipped, used in ((items, SKIPPED, USED), (lines, SKIPPED_LINES, USED_LINES)):
        for place, (name, (kind, make)) in enumerate(skipped.items()):
            times = 1 + place % 3
            rows += [make(next(numbers)) for _ in range(times)]
            corpus.plant(name, times, times, "skipped", kind)
        for place, (name, make) in enumerate(used.items()):
            times = 1 + place % 3
            rows += [make(next(numbers)) for _ in range(times)]
            corpus.plant(name, times, times, "used")
    for place, (name, (kind, make)) in enumerate(MENDED.items()):
        times = 1 + place % 3
        items += [make(next(numbers)) for _ in range(times)]
        corpus.plant(name, times, times, "repaired", kind)
    items += [items[0], items[1], items[1]]
    corpus.plant("record that is there twice", 3, 3, "skipped", "duplicate record")
    random.Random(0).shuffle(items)
    random.Random(1).shuffle(lines)
    (folder / "instruct.json").write_text(json.dumps(items), encoding="utf-8")
    whole = [line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode() for line in lines]
    (folder / "lines.jsonl").write_bytes(b"\n\n".join(whole))
    corpus.sources = [f"llava:{folder}/{name},images={images}" for name in ("instruct.json", "lines.jsonl")]
    return corpus


# COCO

# name: (kind, "" if it is used; what stands in the annotation instead), one caption each
CAPTIONS: dict[str, tuple[str, Callable[[int], Any]]] = {
    "null caption entry": ("caption without 'image_id'", lambda n: None),
    "list as caption entry": ("caption without 'image_id'", lambda n: [n]),
    "no image_id": ("caption without 'image_id'", lambda n: {"image_id": ...}),
    "null image_id": ("caption without 'image_id'", lambda n: {"image_id": None}),
    "float image_id": ("caption without 'image_id'", lambda n: {"image_id": 1.0}),
    "image_id of no image": ("caption of an image that is not listed", lambda n: {"image_id": 10**9}),
    "image_id is text": ("caption of an image that is not listed", lambda n: {"image_id": "1"}),
    "caption id used twice": ("duplicate caption id", lambda n: {"id": 0}),
    "no caption": ("caption is not text", lambda n: {"caption": ...}),
    "null caption": ("caption is not text", lambda n: {"caption": None}),
    "number as caption": ("caption is not text", lambda n: {"caption": n}),
    "list as caption": ("caption is not text", lambda n: {"caption": [f"{n}"]}),
    "empty caption": ("caption is empty", lambda n: {"caption": ""}),
    "blank caption": ("caption is empty", lambda n: {"caption": "\n \u3000"}),
    "caption with half a character": ("caption is not valid Unicode", lambda n: {"caption": f"a {HALF}"}),
    "<image> in a caption": (IMAGE_OUTSIDE, lambda n: {"caption": f"<image> {n}"}),
    "end token in a caption": ("text cannot be encoded", lambda n: {"caption": f"Number {n}.{END}"}),
    "pad token in a caption": ("text cannot be encoded", lambda n: {"caption": f"Number {n} {PAD}"}),
    "caption too long": ("longer than max_length", lambda n: {"caption": f"{n} {LONG}"}),
    "caption without id": ("", lambda n: {"id": ...}),
    "emoji in a caption": ("", lambda n: {"caption": f"\N{DOG FACE} {n} \u2014 caf\u00e9 \U0001f469\u200d\U0001f52c"}),
    "line break in a caption": ("", lambda n: {"caption": f" Number\r\n{n}.\n"}),
    "caption that is there twice": ("", lambda n: {"caption": "Number 0."}),
}
# name: (kind, what stands in the entry of the image instead), each with five captions
ENTRIES: dict[str, tuple[str, Callable[[int], Any]]] = {
    "no file_name": ("image name is empty", lambda n: {"file_name": ...}),
    "null file_name": ("caption without an image", lambda n: {"file_name": None}),
    "blank file_name": ("image name is empty", lambda n: {"file_name": "  "}),
    "number as file_name": ("image name is not text", lambda n: {"file_name": n}),
    "two file_names": ("several images", lambda n: {"file_name": ["good1.jpg", "good2.jpg"]}),
    "file_name with half a character": ("image name is not valid Unicode", lambda n: {"file_name": f"{HALF}.jpg"}),
    "file_name with a zero byte": ("image name is not valid", lambda n: {"file_name": "\0"}),
    "file_name of another image": ("", lambda n: {"file_name": "good1.jpg"}),
    "file_name with its folder": ("", lambda n: {"file_name": f"../train2017/good{n % NUM_GOOD_IMAGES}.jpg"}),
    "entry without sizes": ("", lambda n: {"height": ..., "width": ...}),
}
# name: (kind, entry), without a caption
LONE_ENTRIES: dict[str, tuple[str, Callable[[int], Any]]] = {
    "null image entry": ("image without 'id'", lambda n: None),
    "image entry without id": ("image without 'id'", lambda n: {"file_name": "good1.jpg"}),
    "float as image id": ("image without 'id'", lambda n: {"id": n + 0.5, "file_name": "good1.jpg"}),
    "image id used twice": ("duplicate image id", lambda n: {"id": 0, "file_name": "good1.jpg"}),
}


NOTHING: dict[str, Any] = {}


def _changed(entry: dict[str, Any], change: Any) -> Any:
    """... takes a key away."""
    if not isinstance(change, dict):
        return change
    return {key: value for key, value in (entry | change).items() if value is not ...}


def write_coco(folder: Path) -> Corpus:
    """annotations/captions_train2017.json and train2017/ in folder."""
    corpus = Corpus()
    images = folder / "train2017"
    images.mkdir(parents=True)
    (folder / "annotations").mkdir()
    write_good_images(images)
    entries: list[Any] = []
    captions: list[Any] = []

    def add(file_name: str, change: Any = NOTHING) -> None:
        """An image and its five captions."""
        number = len(entries)
        entry = {"id": number, "file_name": file_name, "height": 36, "width": 40, "license": 1}
        entries.append(_changed(entry, change))
        captions.extend(caption(number) for _ in range(5))

    def caption(image_id: int, change: Any = NOTHING) -> Any:
        number = next(numbers)
        return _changed({"image_id": image_id, "id": number, "caption": f"Number {number}."}, change)

    numbers = iter(range(10**6))
    for number in range(NUM_GOOD_IMAGES):
        add(f"good{number}.jpg")
    corpus.records += 5 * NUM_GOOD_IMAGES
    for place, name in enumerate(IMAGES):
        kind, times = IMAGES[name][0], 1 + place % 3
        for _ in range(times):
            add(write_image(images, name, len(entries)))
        corpus.plant(name, times, 5 * times, "skipped" if kind else "used", kind)
    for place, (name, (kind, make)) in enumerate(ENTRIES.items()):
        times = 1 + place % 3
        for _ in range(times):
            add(f"good{len(entries) % NUM_GOOD_IMAGES}.jpg", make(len(entries)))
        corpus.plant(name, times, 5 * times, "skipped" if kind else "used", kind)
    for place, (name, (kind, make)) in enumerate(CAPTIONS.items()):
        times = 1 + place % 3
        captions += [caption((7 * place + time) % NUM_GOOD_IMAGES, make(place)) for time in range(times)]
        corpus.plant(name, times, times, "skipped" if kind else "used", kind)
    for place, (name, (kind, make)) in enumerate(LONE_ENTRIES.items()):
        times = 1 + place % 3
        entries += [make(10**5 + 10 * place + time) for time in range(times)]
        corpus.plant(name, times, times, "skipped", kind)
    entries.append({"id": 10**7, "file_name": "good3.jpg"})
    corpus.plant("image without captions", 1, 0, "used")
    content = {"images": entries, "annotations": captions, "info": None}
    (folder / "annotations/captions_train2017.json").write_text(json.dumps(content), encoding="utf-8")
    corpus.sources = [f"coco:{folder}/annotations/captions_train2017.json,images={images}"]
    return corpus


# Any records


def valid_rows(images: list[str]) -> list[dict[str, Any]]:
    """One or more of every layout of rows.py."""
    image = {"image": images[0]}
    talk = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A circle."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ]
    items = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    answer = {"role": "assistant", "content": "A circle."}
    return [
        image | {"id": "1", "conversations": talk},
        {"id": 2, "conversations": talk[3:]},
        image
        | {"conversations": [{"from": "human", "value": "Hi.", "transcript": "what", "speech": images[1]}, talk[2]]},
        {"images": [images[1]], "messages": [{"role": "user", "content": items}, answer]},
        {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "Hi."}, answer]},
        image | {"prompt": "What is it?", "completion": "A circle."},
        {"prompt": [{"role": "user", "content": "Hi."}], "completion": [answer]},
        image | {"question": "What is it?", "answers": [{"answer": "circle"}, {"answer": "ring"}, {"answer": "ring"}]},
        image | {"question": "<image> What is it?", "answer": "A circle."},
        {"question": "1 + 1?", "answers": ["2", "two"]},
        image | {"captions": ["A circle.", "A red circle."]},
        {"file_name": images[1], "caption": "A circle."},
        image | {"sentences": [{"raw": "A circle.", "tokens": ["a", "circle"]}, {"raw": "Red."}]},
        {"jpg": images[0], "txt": "A circle."},
    ]


def _deep(chance: random.Random) -> Any:
    value: Any = "x"
    for _ in range(chance.choice((3, 30, 300))):
        value = [value] if chance.random() < 0.5 else {"content": value}
    return value


TEXTS = (
    *("", " ", "\n\u00a0", "x", "\0", "\x1b[2J", "\ud800", "a\udfffb", "\U0001f600", "e\u0301", "\ufeff", "\u202e"),
    *("<image>", "<image><image>", "a <image> b", "<im<image>age>", END, PAD, "{{ x }}", "{% generation %}", "human"),
    *("gpt", "user", "assistant", "system", "text", "image", "NaN", "null", "Instruct: x\nOutput: y", "a.jpg\0"),
    *("..", "../..", "/", ".", "~"),
)
KEYS = (
    *("image", "images", "jpg", "file_name", "conversations", "messages", "prompt", "completion", "question"),
    *("answers", "answer", "captions", "caption", "sentences", "text", "txt", "from", "role", "value", "content"),
    *("type", "raw", "transcript", "speech", "id", "", "\0", "x"),
)


def any_value(chance: random.Random) -> Any:
    pick = chance.randrange(12)
    if pick <= 3:
        return chance.choice(TEXTS)
    if pick == 4:
        return chance.choice((None, True, False, 0, 1, -1, 10**30, 0.5, float("nan"), float("inf"), -0.0))
    if pick == 5:
        return [] if chance.random() < 0.5 else {}
    if pick == 6:
        return [any_value(chance) for _ in range(chance.randrange(1, 4))]
    if pick == 7:
        return {chance.choice(KEYS): any_value(chance) for _ in range(chance.randrange(1, 4))}
    if pick == 8:
        return "".join(chr(chance.choice((chance.randrange(128), chance.randrange(0x110000)))) for _ in range(9))
    if pick == 9:
        return chance.choice(("a", "a b ", "\u00e9", "<image>", "/", "\n", "a\n")) * chance.choice((300, 3000))
    if pick == 10:
        return _deep(chance)
    return chance.choice((None, "", "A circle.", ["A circle."], {"raw": "A circle."}))


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in it."""
    found = []
    stack = [value]
    while stack:
        container = stack.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], dict | list):
                stack.append(container[key])
    return found


def mutated(row: Any, chance: random.Random) -> Any:
    """Another record: something is taken away, renamed, doubled, replaced, shuffled or put in."""
    row = json.loads(json.dumps(row))
    if chance.random() < 0.02:
        return any_value(chance)
    for _ in range(chance.choice((1, 1, 1, 2, 2, 3, 6))):
        places = _places(row)
        if not places:
            return row
        container, key = chance.choice(places)
        how = chance.randrange(8)
        if how <= 1:
            container[key] = any_value(chance)
        elif how == 2:
            del container[key]
        elif how == 3 and isinstance(container, dict):
            container[chance.choice(KEYS)] = container.pop(key)
        elif how == 4 and isinstance(container, dict):
            container[chance.choice(KEYS)] = container[key]
        elif how == 4:
            container.insert(key, json.loads(json.dumps(container[key])))
        elif how == 5 and isinstance(container[key], list):
            chance.shuffle(container[key])
        elif how == 6 and isinstance(container[key], str):
            text, place = container[key], chance.randrange(len(container[key]) + 1)
            container[key] = text[:place] + chance.choice(TEXTS) + text[place:]
        elif isinstance(container, dict):
            container[chance.choice(KEYS)] = any_value(chance)
        else:
            container.insert(chance.randrange(len(container) + 1), any_value(chance))
    return row


def mutated_line(line: bytes, chance: random.Random) -> bytes:
    """A line of a file: flipped, cut, doubled, overwritten or mixed with anything; without a line break in it."""
    changed = bytearray(line)
    for _ in range(chance.choice((1, 1, 2, 4))):
        place = chance.randrange(len(changed) + 1)
        how = chance.randrange(6)
        if how == 0:
            changed = changed[:place]
        elif how == 1:
            changed[place : place + 1] = chance.randbytes(1)
        elif how == 2:
            changed[place:place] = chance.randbytes(chance.choice((1, 5, 40)))
        elif how == 3:
            del changed[place : place + chance.choice((1, 2, 9))]
        elif how == 4:
            changed[place:place] = chance.choice(
                (b'"', b"\\", b"{", b"]", b"\\ud800", b"NaN", b"1e999", b"\xff\xfe", b"\0")
            )
        else:
            changed += changed[:place]
    return bytes(changed).replace(b"\n", b" ").replace(b"\r", b" ")
