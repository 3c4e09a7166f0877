"""clip-phi chat, serve and space: a model to talk to, in a browser and over HTTP."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from .common import DEMO_CHECKPOINT, add_quantization, need_checkpoint, positive

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add_to(commands: Any) -> None:
    chat = commands.add_parser("chat", help="a page to talk to a model in: pictures, speech, text")
    _add_engine(chat)
    _add_address(chat, 7860)
    chat.add_argument(
        "--speech_model", default="base.en", help="Whisper model that hears: a name or a folder (default: %(default)s)"
    )
    chat.add_argument(
        "--voice", default="", help="of spoken answers: a name or a folder (default: a small English one)"
    )
    chat.add_argument("--drawing_model", help="Hub id or folder of a text-to-image model of diffusers, to draw answers")
    chat.add_argument("--examples", type=Path, metavar="DIR", help="pictures to begin with (default: drawn scenes)")
    chat.set_defaults(run=run_chat)

    serve = commands.add_parser("serve", help="an HTTP API in the shape of OpenAI's chat completions")
    _add_engine(serve)
    _add_address(serve, 8000)
    serve.add_argument("--name", help="of the model, as clients give it (default: the last part of CHECKPOINT)")
    serve.add_argument(
        "--api_key", help="what clients must bring (default: the environment's CLIP_PHI_API_KEY, or nothing)"
    )
    serve.add_argument("--speech_model", help="Whisper model that hears input_audio: a name or a folder")
    serve.add_argument("--max_audio_seconds", type=positive, default=30, help="of a recording (default: %(default)s)")
    serve.add_argument(
        "--max_batch", type=positive, default=32, help="requests answered at once (default: %(default)s)"
    )
    serve.add_argument("--max_waiting", type=positive, default=256, help="requests in the queue (default: %(default)s)")
    serve.add_argument("--max_body_mb", type=positive, default=32, help="of a request (default: %(default)s)")
    serve.add_argument("--max_megapixels", type=positive, default=25, help="of an image (default: %(default)s)")
    serve.add_argument("--max_images", type=positive, default=8, help="of a request (default: %(default)s)")
    serve.add_argument("--max_tokens", type=positive, default=1024, help="of an answer (default: %(default)s)")
    levels = ("critical", "error", "warning", "info", "debug")
    serve.add_argument("--log_level", choices=levels, default="info", help="(default: %(default)s)")
    serve.set_defaults(run=run_serve)

    space = commands.add_parser("space", help="the chat page as a Hugging Face Space: app.py, requirements, README")
    space.add_argument("repo_id", metavar="USER/NAME", help="of the Space")
    space.add_argument(
        "--model",
        default=DEMO_CHECKPOINT,
        help="id on the Hub, or the folder of a merged checkpoint, which is copied (default: %(default)s)",
    )
    space.add_argument("--output", type=Path, metavar="DIR", help="a new folder (default: outputs/space/NAME)")
    space.add_argument("--push", action="store_true", help="upload it, too ('hf auth login' first)")
    space.add_argument("--private", action="store_true", help="with --push: for yourself alone")
    space.set_defaults(run=run_space)


def _add_engine(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "checkpoint",
        nargs="?",
        default=DEMO_CHECKPOINT,
        metavar="CHECKPOINT",
        help="folder or Hub id of a trained model (default: %(default)s, which 'make demo' writes)",
    )
    command.add_argument("--device", help="for example cuda:1 or cpu (default: CUDA if there is one)")
    add_quantization(command)
    command.add_argument(
        "--compile", action="store_true", help="torch.compile the model: slow first answers, then fast"
    )


def _add_address(command: argparse.ArgumentParser, port: int) -> None:
    command.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: %(default)s, this one alone)"
    )
    command.add_argument("--port", type=positive, default=port, help="(default: %(default)s)")


def run_chat(arguments: argparse.Namespace) -> None:
    need_checkpoint(arguments.checkpoint)
    from ..serving.chat import launch
    from ..serving.modalities import load_modalities

    modalities = load_modalities(arguments.speech_model, arguments.voice, arguments.drawing_model, arguments.device)
    with _load_engine(arguments) as engine:
        launch(engine, modalities, arguments.host, arguments.port, arguments.examples)


def run_serve(arguments: argparse.Namespace) -> None:
    need_checkpoint(arguments.checkpoint)
    from ..serving.api import ApiLimits, create_app, serve
    from ..serving.engine import Limits
    from ..serving.modalities import load_modalities

    transcribe = None
    if arguments.speech_model is not None:
        modalities = load_modalities(arguments.speech_model, None, None, None, arguments.max_audio_seconds)
        if (transcribe := modalities.transcribe) is None:
            raise ImportError(modalities.missing[0])
    limits = ApiLimits(
        max_body=arguments.max_body_mb * 2**20,
        max_pixels=arguments.max_megapixels * 10**6,
        max_images=arguments.max_images,
        max_tokens=arguments.max_tokens,
    )
    api_key = arguments.api_key or os.environ.get("CLIP_PHI_API_KEY")
    if arguments.host not in LOOPBACK and api_key is None:
        print(f"clip-phi: note: whoever reaches {arguments.host} can use it: give --api_key", file=sys.stderr)
    name = arguments.name or Path(arguments.checkpoint).resolve().name
    engine = _load_engine(arguments, Limits(max_batch=arguments.max_batch, max_waiting=arguments.max_waiting))
    with engine:
        app = create_app(engine, name, api_key=api_key, limits=limits, transcribe=transcribe)
        print(f"model {name!r} at http://{arguments.host}:{arguments.port}/v1", file=sys.stderr, flush=True)
        serve(app, arguments.host, arguments.port, arguments.log_level)


def run_space(arguments: argparse.Namespace) -> None:
    need_checkpoint(arguments.model)
    if arguments.private and not arguments.push:
        raise ValueError("--private is of --push")
    from ..serving.space import push_space, write_space

    folder = arguments.output or Path("outputs/space") / arguments.repo_id.rpartition("/")[2]
    write_space(arguments.repo_id, arguments.model, folder)
    print(f"the Space is in {folder}: 'python app.py' there tries it")
    if arguments.push:
        print(push_space(arguments.repo_id, folder, arguments.private))


def _load_engine(arguments: argparse.Namespace, limits: Any = None) -> Any:
    from ..serving.engine import Engine, Limits

    options = (arguments.device, arguments.quantization, arguments.compile, limits or Limits())
    return Engine.from_pretrained(arguments.checkpoint, *options)
