"""clip-phi transcribe-clip: what is said in a recording. And the options of all commands that hear."""

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from .common import positive_number

ENGINES = ("faster-whisper", "whisperx")


def add_to(commands: Any) -> None:
    clip = commands.add_parser("transcribe-clip", help="write down what is said in a recording")
    clip.add_argument("file", metavar="FILE", help="any sound or video file")
    add_hearing(clip)
    clip.add_argument("--word_timestamps", action="store_true", help="the place of each word, in the json object")
    clip.add_argument("--json", action="store_true", help="print a json object: text, seconds, truncated, engine, ...")
    clip.set_defaults(run=run_transcribe_clip)


def add_hearing(command: argparse.ArgumentParser) -> None:
    """What hears speech."""
    command.add_argument(
        "--engine", choices=ENGINES, default="faster-whisper", help="what hears speech (default: %(default)s)"
    )
    command.add_argument(
        "--speech_model",
        default="base.en",
        help="Whisper model: a name, a Hub id or a folder in CTranslate2's form (default: %(default)s)",
    )
    command.add_argument("--speech_device", default="cpu", help="cpu, cuda or cuda:1 (default: %(default)s)")
    command.add_argument("--compute_type", help="of CTranslate2 (default: int8 on the CPU, float16 on CUDA)")
    command.add_argument("--language", help="that is spoken, for example en (default: found out by listening)")
    command.add_argument(
        "--max_speech_seconds",
        type=positive_number,
        default=10.0,
        help="so much of the beginning of a recording is heard (default: %(default)s)",
    )


def make_ear(arguments: argparse.Namespace) -> Any:
    """The Transcriber of these options."""
    from ..speech.transcribe import make_transcriber

    return make_transcriber(
        arguments.engine,
        arguments.speech_model,
        arguments.speech_device,
        arguments.language,
        arguments.compute_type,
        getattr(arguments, "word_timestamps", False),
    )


def hear(file: str, arguments: argparse.Namespace) -> Any:
    """The Transcript of a recording. What is cut off or not there is told on stderr."""
    from contextlib import closing

    from ..speech.clip import load_clip

    clip = load_clip(file, arguments.max_speech_seconds)
    with closing(make_ear(arguments)) as transcriber:
        transcript = transcriber.transcribe(clip)
    if transcript.truncated:
        print(f"clip-phi: note: only the first {clip.seconds:.1f} s of {file} are heard", file=sys.stderr)
    if not transcript.text:
        print(f"clip-phi: note: nobody speaks in {file}", file=sys.stderr)
    return transcript


def run_transcribe_clip(arguments: argparse.Namespace) -> None:
    transcript = hear(arguments.file, arguments)
    if arguments.json:
        found = asdict(transcript) | {"model": arguments.speech_model}
        found["segments"] = [
            segment._asdict() | {"words": [word._asdict() for word in segment.words]} for segment in transcript.segments
        ]
        print(json.dumps(found))
    else:
        print(transcript.text)
