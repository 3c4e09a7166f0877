"""clip-phi caption and ask: what an image shows."""

import argparse
import json
from collections.abc import Iterator
from typing import Any

from .common import add_checkpoint, need_checkpoint, positive


def add_to(commands: Any) -> None:
    caption = commands.add_parser("caption", help="say what images show")
    caption.add_argument("images", nargs="+", metavar="IMAGE", help="image file")
    caption.set_defaults(run=run_caption)

    ask = commands.add_parser("ask", help="ask a question about an image")
    ask.add_argument("image", metavar="IMAGE", help="image file")
    ask.add_argument("question", metavar="QUESTION", help="for example: 'What color is the circle?'")
    ask.set_defaults(run=run_ask)

    for command in (caption, ask):
        add_checkpoint(command)
        command.add_argument(
            "--int8", action="store_true", help="on the CPU: the decoder in 8 bits, smaller, faster, a little rougher"
        )
        command.add_argument(
            "--max_new_tokens", type=positive, default=64, help="longest answer (default: %(default)s)"
        )
        command.add_argument("--json", action="store_true", help="print one json object a line instead of the text")


def run_caption(arguments: argparse.Namespace) -> None:
    from ..batching.images import load_image

    images = [(name, load_image(name)) for name in arguments.images]  # a bad one is told before the model is loaded
    engine = _load_engine(arguments)
    for name, image in images:
        pieces = engine.caption(image, arguments.max_new_tokens)
        prefix = f"{name}: " if len(images) > 1 else ""
        _say(pieces, arguments, {"image": name}, "caption", prefix)


def run_ask(arguments: argparse.Namespace) -> None:
    from ..batching.images import load_image

    image = load_image(arguments.image)
    engine = _load_engine(arguments)
    pieces = engine.stream(arguments.question, image, arguments.max_new_tokens)
    _say(pieces, arguments, {"image": arguments.image, "question": arguments.question}, "answer")


def _load_engine(arguments: argparse.Namespace) -> Any:
    need_checkpoint(arguments.checkpoint)
    from ..serving.engine import Engine

    return Engine(arguments.checkpoint, arguments.device, arguments.int8)


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
