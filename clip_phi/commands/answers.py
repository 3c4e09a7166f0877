"""clip-phi caption and ask: what an image shows."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .common import add_checkpoint, add_quantization, need_checkpoint, positive


def add_to(commands: Any) -> None:
    caption = commands.add_parser("caption", help="say what images show")
    caption.add_argument(
        "images", nargs="+", metavar="IMAGE", help="image file, or a folder: all pictures in it and in its folders"
    )
    caption.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="write a json object a line there; bad pictures are counted, not fatal",
    )
    caption.add_argument("--resume", action="store_true", help="go on with the FILE of a stopped run")
    caption.set_defaults(run=run_caption)

    ask = commands.add_parser("ask", help="ask a question about an image")
    ask.add_argument("image", metavar="IMAGE", help="image file")
    ask.add_argument("question", metavar="QUESTION", help="for example: 'What color is the circle?'")
    ask.set_defaults(run=run_ask)

    for command in (caption, ask):
        add_checkpoint(command)
        add_quantization(command)
        command.add_argument(
            "--max_new_tokens", type=positive, default=64, help="longest answer (default: %(default)s)"
        )
        command.add_argument("--json", action="store_true", help="print one json object a line instead of the text")


def run_caption(arguments: argparse.Namespace) -> int:
    if arguments.resume and arguments.output is None:
        raise ValueError("--resume goes on with a file: give --output FILE")
    if arguments.output is not None or any(Path(name).is_dir() for name in arguments.images):
        return _caption_many(arguments)
    from ..batching.images import load_image

    images = [(name, load_image(name)) for name in arguments.images]  # a bad one is told before the model is loaded
    engine = _load_engine(arguments)
    for name, image in images:
        pieces = engine.caption(image, arguments.max_new_tokens)
        prefix = f"{name}: " if len(images) > 1 else ""
        _say(pieces, arguments, {"image": name}, "caption", prefix)
    return 0


def _caption_many(arguments: argparse.Namespace) -> int:
    """Returns 1 if there was a bad picture, else 0."""
    from ..serving.folder import caption_files, find_pictures

    names = find_pictures(arguments.images)
    if arguments.output is not None and arguments.output.exists() and not arguments.resume:
        raise ValueError(f"{arguments.output} is there already: --resume goes on with it")
    with _load_engine(arguments) as engine:
        counts = caption_files(engine, names, arguments.output, arguments.max_new_tokens)
    return int(any(kind not in ("captioned", "done before") for kind in counts))


def run_ask(arguments: argparse.Namespace) -> None:
    from ..batching.images import load_image

    image = load_image(arguments.image)
    engine = _load_engine(arguments)
    pieces = engine.stream(arguments.question, image, arguments.max_new_tokens)
    _say(pieces, arguments, {"image": arguments.image, "question": arguments.question}, "answer")


def _load_engine(arguments: argparse.Namespace) -> Any:
    need_checkpoint(arguments.checkpoint)
    from ..serving.engine import Engine

    return Engine(arguments.checkpoint, arguments.device, arguments.quantization)


def _say(
    pieces: Iterator[str], arguments: argparse.Namespace, record: dict[str, str], key: str, prefix: str = ""
) -> None:
    if arguments.json:
        print(json.dumps(record | {key: "".join(pieces).strip()}), flush=True)
        return
    print(prefix, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)
