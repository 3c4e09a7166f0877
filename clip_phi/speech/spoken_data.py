"""Whole data sets: their recordings written down ahead, and their questions spoken."""

import hashlib
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..data.files import read_json
from ..data.report import NUM_EXAMPLES, RecordError, Report
from ..data.sample import SPOKEN_INSTRUCTION, File
from ..data.schema import IMAGE_TOKEN
from ..data.source import DataSource
from .asr import make_transcriber
from .audio import load_clip
from .tts import Speaker, shorten, write_wav


@dataclass
class Heard:
    """recordings: distinct ones that need a transcript. new: heard now, the others were known. silent: in which nobody
    speaks. truncated: longer than max_speech_seconds. bad: that cannot be heard."""

    recordings: int = 0
    new: int = 0
    silent: int = 0
    truncated: int = 0
    bad: int = 0
    examples: list[str] = field(default_factory=list)


def transcribe_source(source: DataSource, device: str = "cpu", compute_type: str | None = None) -> tuple[Heard, Report]:
    """Write down what is said in the recordings of a source, for training to read; what is known is not heard again.

    device, compute_type: of make_transcriber. Returns what was heard, and the report of reading the source."""
    if source.streaming:
        raise ValueError(f"{source.path} is a stream: its recordings cannot be heard ahead")
    transcripts, report, found = source.transcripts(), Report(), Heard()
    pending: dict[str, File | bytes] = {}
    keys = set()
    for recording in _recordings(source, report):
        try:
            key, known = transcripts.key(recording), transcripts.get(recording)
        except RecordError as defect:
            if str(recording) not in keys:
                _bad(found, str(defect))
            keys.add(str(recording))
            continue
        if key not in keys and (known is None or "error" in known):
            pending[key] = recording
        elif key not in keys and known is not None:
            found.silent += not known["text"]
        keys.add(key)
    found.recordings = len(keys)
    if not pending:
        return found, report
    engine, model, language, max_seconds = transcripts.settings
    with closing(make_transcriber(engine, model, device, language, compute_type)) as transcriber:  # type: ignore[arg-type]
        for recording in tqdm(pending.values(), unit="recording", disable=not sys.stderr.isatty(), dynamic_ncols=True):
            try:
                clip = load_clip(recording, max_seconds)
            except ValueError as error:
                transcripts.add(recording, error=str(error))
                _bad(found, str(error))
                continue
            transcript = transcriber.transcribe(clip)
            transcripts.add(recording, text=transcript.text)
            found.new += 1
            found.silent += not transcript.text
            found.truncated += clip.truncated
    return found, report


def _recordings(source: DataSource, report: Report) -> Iterator[File | bytes]:
    for sample in source.read(source.media(), report):
        for conversation in sample.conversations:
            yield from (turn.speech for turn in conversation if turn.speech is not None and turn.transcript is None)


def _bad(found: Heard, reason: str) -> None:
    found.bad += 1
    found.examples += [reason][: NUM_EXAMPLES - len(found.examples)]


@dataclass
class Spoken:
    """questions: all; spoken: of these. recordings: distinct ones; new: made now. unspeakable: questions that the voice
    cannot say, which stay typed. long: recordings longer than max_seconds."""

    questions: int = 0
    spoken: int = 0
    recordings: int = 0
    new: int = 0
    unspeakable: int = 0
    long: int = 0
    examples: list[str] = field(default_factory=list)


def speak_questions(
    annotations: Path, output: Path, speaker: Speaker, share: float = 1.0, seed: int = 0, max_seconds: float = 10.0
) -> Spoken:
    """The spoken form of a LLaVA json: in a share of its questions, chosen by the seed, the text gives way to
    SPOKEN_INSTRUCTION and "speech" names a recording. All else stays as it is.

    output: the new json; its recordings go to the folder of that name without ".json", each distinct question once. A
    second run speaks only what is not there. Raises ValueError if the file is not a list of records."""
    if not 0 <= share <= 1:
        raise ValueError(f"the share of spoken questions must be between 0 and 1, not {share}")
    if output.suffix != ".json" or output.resolve() == annotations.resolve():
        raise ValueError(f"the spoken form must go to another file that ends in .json, not to {output}")
    records = read_json(annotations)
    if not isinstance(records, list):
        raise ValueError(f"{annotations} is not a list of records")
    folder, found, rng = output.with_suffix(""), Spoken(), random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    turns = list(_questions(records))
    found.questions = len(turns)
    chosen = [turn for turn in turns if rng.random() < share]
    texts = Counter(_question(turn) for turn in chosen)
    names: dict[str, str] = {}
    for text in tqdm(texts, unit="question", disable=not sys.stderr.isatty(), dynamic_ncols=True):
        name = f"{hashlib.blake2b(f'{speaker.voice}:{text}'.encode(), digest_size=10).hexdigest()}.wav"
        if not (folder / name).exists():
            try:
                speech = speaker.speak(text)
            except ValueError as error:
                found.unspeakable += texts[text]
                found.examples += [str(error)][: NUM_EXAMPLES - len(found.examples)]
                continue
            write_wav(folder / f"{name}.part", speech)
            os.replace(folder / f"{name}.part", folder / name)
            found.new += 1
        seconds = ((folder / name).stat().st_size - 44) / 2 / speaker.sampling_rate
        found.long += seconds > max_seconds
        names[text] = name
    found.recordings = len(names)
    for turn in chosen:
        name = names.get(_question(turn), "")
        if name:
            found.spoken += 1
            image = f"{IMAGE_TOKEN}\n" if IMAGE_TOKEN in turn["value"] else ""
            turn.update(value=image + SPOKEN_INSTRUCTION, speech=name)
    output.with_suffix(".json.part").write_text(json.dumps(records), encoding="utf-8")
    os.replace(output.with_suffix(".json.part"), output)
    return found


def _questions(records: list[Any]) -> Iterator[dict[str, Any]]:
    """The turns with a question that is not spoken yet; what is no well-formed turn is for the reader to report."""
    for record in records:
        turns = record.get("conversations") if isinstance(record, dict) else None
        for turn in turns if isinstance(turns, list) else ():
            if not isinstance(turn, dict) or turn.get("from") not in ("human", "user"):
                continue
            spoken = turn.get("speech") is not None or turn.get("transcript") is not None
            if not spoken and isinstance(turn.get("value"), str) and _question(turn):
                yield turn


def _question(turn: dict[str, Any]) -> str:
    return " ".join(turn["value"].replace(IMAGE_TOKEN, " ").split())


def as_text(found: Heard | Spoken) -> str:
    """One line, and the first examples of what went wrong."""
    if isinstance(found, Heard):
        line = f"{found.recordings:,} recordings: {found.new:,} heard now, in {found.silent:,} nobody speaks, "
        line += f"{found.truncated:,} longer than is heard, {found.bad:,} cannot be heard"
    else:
        line = f"{found.spoken:,} of {found.questions:,} questions are spoken, in {found.recordings:,} recordings "
        line += f"({found.new:,} new, {found.long:,} longer than is heard); {found.unspeakable:,} cannot be said"
    return "\n".join([line, *(f"  e.g. {shorten(example)}" for example in found.examples)])
