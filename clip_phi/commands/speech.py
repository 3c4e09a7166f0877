"""clip-phi speech transcribe, dataset and install: recordings, and data sets with speech."""

import argparse
import json
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..data.report import plain
from ..data.transcripts import AsrSettings

DEFAULT = AsrSettings()
# Options for a recording, which a data set has in its own text: --data KIND:PATH,engine=whisperx.
ASR_OPTIONS = ("engine", "speech_model", "language", "max_speech_seconds")


def transcribe(file: str, arguments: argparse.Namespace) -> Any:
    """The Transcript of a recording. Notes on stderr name the engine, a cut recording and a silent one."""
    from ..speech.asr import make_transcriber
    from ..speech.audio import load_audio

    clip = load_audio(file, arguments.max_speech_seconds or DEFAULT.max_seconds)
    engine, model = arguments.engine or DEFAULT.engine, arguments.speech_model or DEFAULT.model
    how = (arguments.speech_device, arguments.language, arguments.compute_type)
    with closing(make_transcriber(engine, model, *how, getattr(arguments, "word_timestamps", False))) as transcriber:
        transcript = transcriber.transcribe(clip)
    if not arguments.json:
        print(plain(f"clip-phi: {transcript.engine}: {transcript.text or '(no speech)'}"), file=sys.stderr)
    if transcript.truncated:
        print(f"clip-phi: note: only the first {clip.seconds:.1f} s of {file} are transcribed", file=sys.stderr)
    if not transcript.text:
        print(f"clip-phi: note: no speech in {file}", file=sys.stderr)
    return transcript


def run_transcribe(arguments: argparse.Namespace) -> None:
    if (arguments.recording is None) == (not arguments.data):
        raise ValueError("transcribe needs either a RECORDING or --data DATA")
    if arguments.data:
        return _transcribe_data(arguments)
    transcript = transcribe(arguments.recording, arguments)
    if not arguments.json:
        return print(plain(transcript.text))
    found = asdict(transcript) | {"model": arguments.speech_model or DEFAULT.model}
    parts = transcript.segments
    found["segments"] = [part._asdict() | {"words": [word._asdict() for word in part.words]} for part in parts]
    print(json.dumps(found))


def _transcribe_data(arguments: argparse.Namespace) -> None:
    for name in ASR_OPTIONS:
        if (value := getattr(arguments, name)) is not None:
            raise ValueError(f"--{name} is for a RECORDING; for a data set write --data ...,{name}={value}")
    if arguments.word_timestamps:
        raise ValueError("--word_timestamps is for a RECORDING; transcripts of a data set have none")
    from ..data.source import parse_files
    from ..speech.spoken_data import transcribe_source

    for source in parse_files(arguments.data):
        found, report = transcribe_source(source, arguments.speech_device, arguments.compute_type)
        if arguments.json:
            record = asdict(found) | source.asr_settings._asdict() | {"data": source.path, "report": report.as_dict()}
            print(json.dumps(record), flush=True)
        else:
            print(f"{source.path}: {found}", *filter(None, [report.table()]), sep="\n", flush=True)


def run_dataset(arguments: argparse.Namespace) -> None:
    from ..speech.spoken_data import synthesize_questions
    from ..speech.tts import make_tts

    annotations, output = Path(arguments.annotations), arguments.output
    found = synthesize_questions(annotations, output, make_tts(arguments.voice), arguments.share, arguments.seed)
    print(json.dumps(asdict(found)) if arguments.json else found)
    if not arguments.json:
        data = f"llava:{output},images=IMAGES,recordings={output.with_suffix('')}"
        print(f"next: clip-phi speech transcribe --data {data}, and train on it with --data {data}")


def run_install(arguments: argparse.Namespace) -> None:
    from ..speech.whisperx import install

    found = install(arguments.form, arguments.folder)
    size = sum(path.lstat().st_size for path in found.folder.rglob("*")) / 1e9
    print(f"WhisperX {found.version} ({found.form} form) is in {found.folder}, {size:.2f} GB; try: --engine whisperx")
    if arguments.folder:
        print(f"export CLIP_PHI_WHISPERX={found.folder}")
