"""clip-phi transcribe-clip, transcribe, speak-data and speech install: recordings, and data sets with speech."""

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from ..data.transcripts import ENGINES, AsrSettings
from .common import natural, positive_number

DEFAULT = AsrSettings()
FORMS = ("full", "cpu", "light")


def add_to(commands: Any) -> None:
    clip = commands.add_parser("transcribe-clip", help="write down what is said in a recording")
    clip.add_argument("file", metavar="FILE", help="any sound or video file")
    add_hearing(clip)
    clip.add_argument("--word_timestamps", action="store_true", help="the place of each word, in the json object")
    clip.add_argument("--json", action="store_true", help="print a json object: text, seconds, truncated, engine, ...")
    clip.set_defaults(run=run_transcribe_clip)

    data = commands.add_parser("transcribe", help="write down ahead what is said in a data set's recordings")
    data.add_argument(
        "data",
        nargs="+",
        metavar="DATA",
        help="as --data of train_accelerate.py: [KIND:]PATH[,option=value...]; engine=, speech_model=, language= and "
        "max_speech_seconds= say how it is heard",
    )
    data.add_argument("--speech_device", default="cpu", help="cpu, cuda or cuda:1 (default: %(default)s)")
    data.add_argument("--compute_type", help="of CTranslate2 (default: int8 on the CPU, float16 on CUDA)")
    data.add_argument("--json", action="store_true", help="print one json object a source instead of the text")
    data.set_defaults(run=run_transcribe)

    speak = commands.add_parser("speak-data", help="make the spoken form of a LLaVA json: its questions as recordings")
    speak.add_argument("annotations", metavar="JSON", help="a list of records with conversations")
    speak.add_argument("output", metavar="OUT.json", help="the spoken form; the recordings go to the folder OUT")
    speak.add_argument("--share", type=float, default=1.0, help="of the questions is spoken (default: all)")
    speak.add_argument("--seed", type=natural, default=0, help="another one chooses other questions")
    speak.add_argument("--voice", help="a name, or Hub id or folder of a text-to-speech model")
    speak.add_argument("--json", action="store_true", help="print a json object instead of the text")
    speak.set_defaults(run=run_speak_data)

    speech = commands.add_parser("speech", help="speech install: WhisperX, in a Python environment of its own")
    actions = speech.add_subparsers(dest="action", required=True, metavar="ACTION")
    install = actions.add_parser("install", help="make the environment of --engine whisperx")
    install.add_argument(
        "--form",
        choices=FORMS,
        default="full",
        help="full: 7.7 GB with CUDA; cpu: the same without; light: 40 MB beside this environment's torch, with "
        "another voice detection and no word timestamps (default: %(default)s)",
    )
    install.add_argument("--folder", help="where it goes (default: CLIP_PHI_WHISPERX, or Hugging Face's cache)")
    install.set_defaults(run=run_install)


def add_hearing(command: argparse.ArgumentParser) -> None:
    """What hears speech."""
    command.add_argument(
        "--engine", choices=ENGINES, default=DEFAULT.engine, help="what hears speech (default: %(default)s)"
    )
    command.add_argument(
        "--speech_model",
        default=DEFAULT.model,
        help="Whisper model: a name, a Hub id or a folder in CTranslate2's form (default: %(default)s)",
    )
    command.add_argument("--speech_device", default="cpu", help="cpu, cuda or cuda:1 (default: %(default)s)")
    command.add_argument("--compute_type", help="of CTranslate2 (default: int8 on the CPU, float16 on CUDA)")
    command.add_argument("--language", help="that is spoken, for example en (default: found out by listening)")
    command.add_argument(
        "--max_speech_seconds",
        type=positive_number,
        default=DEFAULT.max_seconds,
        help="so much of the beginning of a recording is heard (default: %(default)s)",
    )


def make_ear(arguments: argparse.Namespace) -> Any:
    """The Transcriber of these options."""
    from ..speech.asr import make_transcriber

    return make_transcriber(
        arguments.engine,
        arguments.speech_model,
        arguments.speech_device,
        arguments.language,
        arguments.compute_type,
        getattr(arguments, "word_timestamps", False),
    )


def hear(file: str, arguments: argparse.Namespace) -> Any:
    """The Transcript of a recording. What heard it, and what is cut off or not there, is told on stderr."""
    from contextlib import closing

    from ..speech.audio import load_clip

    clip = load_clip(file, arguments.max_speech_seconds)
    with closing(make_ear(arguments)) as transcriber:
        transcript = transcriber.transcribe(clip)
    if not arguments.json:
        print(f"clip-phi: {transcript.engine} heard: {transcript.text or '(nothing)'}", file=sys.stderr)
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


def run_transcribe(arguments: argparse.Namespace) -> None:
    from ..data.source import parse_source
    from ..speech.spoken_data import as_text, transcribe_source

    for source in [parse_source(text) for text in arguments.data]:
        if problems := source.problems():
            raise ValueError(f"no such file: {', '.join(problems)}")
        found, report = transcribe_source(source, arguments.speech_device, arguments.compute_type)
        if arguments.json:
            told = asdict(found) | source.asr_settings._asdict() | {"data": source.path, "report": report.as_dict()}
            print(json.dumps(told), flush=True)
        else:
            print(f"{source.path}: {as_text(found)}", *filter(None, [report.table()]), sep="\n", flush=True)


def run_speak_data(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from ..speech.spoken_data import as_text, speak_questions
    from ..speech.tts import make_speaker

    output = Path(arguments.output)
    found = speak_questions(
        Path(arguments.annotations), output, make_speaker(arguments.voice), arguments.share, arguments.seed
    )
    print(json.dumps(asdict(found)) if arguments.json else as_text(found))
    if not arguments.json:
        data = f"llava:{output},images=IMAGES,recordings={output.with_suffix('')}"
        print(f"next: clip-phi transcribe {data}, and train on it with --data {data}")


def run_install(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from ..speech.whisperx import folder_bytes, install

    found = install(arguments.form, Path(arguments.folder) if arguments.folder else None)
    size = folder_bytes(found.folder) / 1e9
    print(f"WhisperX {found.version} ({found.form} form) is in {found.folder}, {size:.2f} GB; try: --engine whisperx")
    if arguments.folder:
        print(f"export CLIP_PHI_WHISPERX={found.folder}")
