"""clip-phi chat, serve and space: a model in the browser and over HTTP."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from .common import add_command, add_engine, add_model, choose_model, load_engine, positive


def add_to(commands: Any) -> None:
    chat = add_command(commands, "chat", run_chat, "a chat page in the browser, with images, speech and text")
    _add_server(chat, port=7860)
    chat.add_argument("--speech_model", default="base.en", help="Whisper model for speech: a name or a folder")
    help = "voice of spoken answers: a name or a folder (default: a small English one)"
    chat.add_argument("--voice", default="", help=help)
    chat.add_argument("--drawing_model", help="folder or Hub id of a text-to-image model of diffusers, for answers")
    help = "user and password that the page asks for (default: CLIP_PHI_AUTH, or none)"
    chat.add_argument("--auth", metavar="USER:PASSWORD", help=help)
    chat.add_argument("--examples", type=Path, metavar="DIR", help="folder of example images (default: drawn scenes)")

    serve = add_command(commands, "serve", run_serve, "an HTTP API in the form of OpenAI's chat completions")
    _add_server(serve, port=8000)
    serve.add_argument("--name", help="model name in requests (default: the last part of MODEL)")
    serve.add_argument("--api_key", help="key that clients must send (default: CLIP_PHI_API_KEY, or no key)")
    serve.add_argument("--speech_model", help="Whisper model for input_audio: a name or a folder (default: no speech)")
    serve.add_argument("--log_level", choices=("critical", "error", "warning", "info", "debug"), default="info")
    help = "name of this server in requests without a key, besides addresses and names without a dot"
    serve.add_argument("--allow_host", nargs="+", default=[], metavar="NAME", help=help)
    help = "web page that may send requests from a browser (CORS), for example http://localhost:5173; '*': any page"
    serve.add_argument("--allow_origin", nargs="+", default=[], metavar="ORIGIN", help=help)
    for name, default, help in (
        ("max_audio_seconds", 30, "longest recording in seconds"),
        ("max_batch", 32, "requests answered at once"),
        ("max_waiting", 256, "requests in the queue"),
        ("max_megapixels", 25, "size of an image in megapixels"),
        ("max_images", 8, "images in a request"),
        ("max_tokens", 1024, "tokens in an answer"),
        ("max_connections", 512, "open connections"),
        ("header_seconds", 10, "seconds until the headers of a request are complete"),
        ("body_seconds", 60, "seconds until its body is complete, or until a client reads on"),
    ):
        serve.add_argument(f"--{name}", type=positive, default=default, help=f"limit: {help} (default: {default})")

    help = "the chat page as a Hugging Face Space: app.py, requirements, README"
    space = add_command(commands, "space", run_space, help)
    space.add_argument("repo_id", metavar="USER/NAME", help="name of the Space")
    add_model(space)
    space.add_argument("--output_dir", type=Path, metavar="DIR", help="a new folder (default: outputs/space/NAME)")
    space.add_argument("--push", action="store_true", help="upload to the Hub (run 'hf auth login' first)")
    space.add_argument("--private", action="store_true", help="private Space (requires --push)")


def _add_server(command: argparse.ArgumentParser, port: int) -> None:
    add_engine(command, argument=True)
    command.add_argument("--compile", action="store_true", help="torch.compile: slow first answers, then faster ones")
    help = "address to listen on; 0.0.0.0: all networks (default: this machine alone)"
    command.add_argument("--host", default="127.0.0.1", help=help)
    command.add_argument("--port", type=positive, default=port, help="port to listen on")
    help = "limit: size of a request or an uploaded file in MiB (default: 32)"
    command.add_argument("--max_body_mb", type=positive, default=32, help=help)


def run_chat(arguments: argparse.Namespace) -> None:
    auth = arguments.auth or os.environ.get("CLIP_PHI_AUTH")
    if auth is not None and not all(auth.partition(":")):
        raise ValueError("--auth is USER:PASSWORD")
    choose_model(arguments)  # a wrong one is an error of its own, before gradio is imported
    from ..serving.chat import launch
    from ..serving.modalities import load_modalities

    _note_open(arguments.host, auth, "--auth")
    modalities = load_modalities(arguments.speech_model, arguments.voice, arguments.drawing_model, arguments.device)
    with load_engine(arguments) as engine:
        options = {"auth": auth, "max_body": arguments.max_body_mb * 2**20}
        launch(engine, modalities, arguments.host, arguments.port, arguments.examples, **options)


def _note_open(host: str, key: str | None, option: str) -> None:
    if host not in ("127.0.0.1", "localhost", "::1") and key is None:
        print(f"clip-phi: note: no {option}: everybody on {host}'s network may use it", file=sys.stderr)


def run_serve(arguments: argparse.Namespace) -> None:
    model = choose_model(arguments)
    from ..serving.api import ApiLimits, create_app
    from ..serving.engine import Limits
    from ..serving.modalities import load_modalities
    from ..serving.server import serve

    transcribe = None
    if arguments.speech_model is not None:
        modalities = load_modalities(arguments.speech_model, None, None, None, arguments.max_audio_seconds)
        if (transcribe := modalities.transcribe) is None:
            raise ImportError(modalities.missing[0])
    names = ("max_images", "max_tokens", "max_connections", "header_seconds", "body_seconds")
    numbers = {name: getattr(arguments, name) for name in names}
    body, pixels = arguments.max_body_mb * 2**20, arguments.max_megapixels * 10**6
    limits = ApiLimits(max_body=body, max_pixels=pixels, **numbers)
    api_key = arguments.api_key or os.environ.get("CLIP_PHI_API_KEY")
    _note_open(arguments.host, api_key, "--api_key")
    name = arguments.name or Path(model).resolve().name
    with load_engine(arguments, Limits(arguments.max_batch, arguments.max_waiting)) as engine:
        options = {"hosts": [*arguments.allow_host, arguments.host], "origins": arguments.allow_origin}
        app = create_app(engine, name, api_key=api_key, limits=limits, transcribe=transcribe, **options)
        print(f"model {name!r} at http://{arguments.host}:{arguments.port}/v1", file=sys.stderr, flush=True)
        serve(app, arguments.host, arguments.port, arguments.log_level, limits)


def run_space(arguments: argparse.Namespace) -> None:
    model = choose_model(arguments)
    if arguments.private and not arguments.push:
        raise ValueError("--private requires --push")
    from ..serving.space import push_space, write_space

    folder = arguments.output_dir or Path("outputs/space") / arguments.repo_id.rpartition("/")[2]
    write_space(arguments.repo_id, model, folder)
    print(f"the Space is in {folder}: run 'python app.py' there to try it")
    if arguments.push:
        print(push_space(arguments.repo_id, folder, arguments.private))
