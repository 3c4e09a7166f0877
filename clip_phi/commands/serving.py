"""clip-phi chat, serve and space: a model in the browser and over HTTP."""

import argparse
import os
import sys
from pathlib import Path

from .common import choose_model, load_engine


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

    modalities = load_modalities(arguments.speech_model, None, None, None, arguments.max_audio_seconds)
    if arguments.speech_model is not None and modalities.transcribe is None:
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
        options |= {"abstain_below": arguments.abstain_below, "transcribe": modalities.transcribe}
        app = create_app(engine, name, api_key=api_key, limits=limits, **options)
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
