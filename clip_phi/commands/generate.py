"""clip-phi caption and ask: what an image shows, said in text, aloud or as a picture."""

import argparse
import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .common import (
    add_checkpoint,
    add_quantization,
    natural,
    need_checkpoint,
    positive,
)
from .speech import add_hearing


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
    ask.add_argument("question", metavar="QUESTION", nargs="?", help="for example: 'What color is the circle?'")
    ask.add_argument("--speech", metavar="FILE", help="a recording: the question itself, or what is said before it")
    add_hearing(ask)
    ask.add_argument("--speak", metavar="WAV", help="write the spoken answer to this file")
    ask.add_argument("--voice", help="of --speak: a name, or Hub id or folder of a text-to-speech model")
    ask.add_argument("--draw", metavar="PNG", help="write a picture of the answer to this file")
    ask.add_argument("--drawing_model", help="of --draw: Hub id or folder of a text-to-image model of diffusers")
    ask.add_argument("--seed", type=natural, default=0, help="of --draw: another one draws another picture")
    ask.add_argument("--size", type=positive, help="of --draw: pixels of both sides (default: the model's own)")
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
    with _load_engine(arguments) as engine:
        for name, image in images:
            pieces = engine.caption(image, arguments.max_new_tokens)
            prefix = f"{name}: " if len(images) > 1 else ""
            _say(pieces, arguments, {"image": name}, "caption", prefix)
    return 0


def _caption_many(arguments: argparse.Namespace) -> int:
    """Returns 1 if there was a bad picture, else 0."""
    from ..serving.batch_captions import caption_files, find_images

    names = find_images(arguments.images)
    if arguments.output is not None and arguments.output.exists() and not arguments.resume:
        raise ValueError(f"{arguments.output} is there already: --resume goes on with it")
    with _load_engine(arguments) as engine:
        counts = caption_files(engine, names, arguments.output, arguments.max_new_tokens)
    return int(any(kind not in ("captioned", "done before") for kind in counts))


def run_ask(arguments: argparse.Namespace) -> None:
    from ..batching.images import load_image

    if arguments.question is None and arguments.speech is None:
        raise ValueError("there is no question: write one, or give a recording of it with --speech")
    if arguments.draw and not arguments.drawing_model:
        raise ValueError("--draw needs --drawing_model: the Hub id or folder of a text-to-image model of diffusers")
    for path in filter(None, (arguments.speak, arguments.draw)):  # told before minutes of work
        if not Path(path).absolute().parent.is_dir():
            raise ValueError(f"cannot write {path}: there is no such folder")
    image = load_image(arguments.image)
    speaker, drawer = _make_speaker(arguments), _make_drawer(arguments)
    question, record = arguments.question, {"image": arguments.image, "question": arguments.question}
    transcript = None
    if arguments.speech is not None:
        question, transcript, heard = _listen(arguments)
        record |= heard
    answer: list[str] = []
    with _load_engine(arguments) as engine:
        pieces = engine.stream(question, image, arguments.max_new_tokens, transcript)
        noted = _noted(pieces, answer, aloud=not arguments.json)
        if speaker is None:
            deque(noted, maxlen=0)
        else:
            record["speak"] = _write_speech(speaker.stream(noted), arguments.speak)
    if drawer is not None:
        drawer.generate("".join(answer), arguments.seed, arguments.size).save(arguments.draw, format="PNG")
        record["draw"] = arguments.draw
    if arguments.json:
        print(json.dumps(record | {"answer": "".join(answer).strip()}), flush=True)


def _listen(arguments: argparse.Namespace) -> tuple[str, str | None, dict[str, Any]]:
    """Question and transcript for the prompt, and what is reported of the recording."""
    from ..data.sample import SPOKEN_INSTRUCTION
    from .speech import hear

    heard = hear(arguments.speech, arguments)
    if arguments.question is None and not heard.text:
        raise ValueError(f"nobody speaks in {arguments.speech}: write the question, or record it again")
    about = {"transcript": heard.text, "engine": heard.engine, "seconds": heard.seconds, "truncated": heard.truncated}
    return arguments.question or SPOKEN_INSTRUCTION, heard.text or None, about


def _make_speaker(arguments: argparse.Namespace) -> Any:
    if arguments.speak is None:
        return None
    from ..speech.tts import make_tts

    return make_tts(arguments.voice)


def _make_drawer(arguments: argparse.Namespace) -> Any:
    if arguments.draw is None:
        return None
    from ..serving.text_to_image import TextToImage

    return TextToImage(arguments.drawing_model, arguments.device)


def _noted(pieces: Iterator[str], answer: list[str], aloud: bool) -> Iterator[str]:
    """The pieces, each of which is kept, and printed as it passes."""
    for piece in pieces:
        answer.append(piece)
        if aloud:
            print(piece, end="", flush=True)
        yield piece
    if aloud:
        print(flush=True)


def _write_speech(sentences: Iterator[Any], path: str) -> str:
    from ..speech.tts import join, write_wav

    write_wav(path, join(sentences))
    return path


def _load_engine(arguments: argparse.Namespace) -> Any:
    need_checkpoint(arguments.checkpoint)
    from ..serving.engine import Engine

    return Engine.from_pretrained(arguments.checkpoint, arguments.device, arguments.quantization)


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
