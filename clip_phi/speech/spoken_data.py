"""Speech for whole data sets: transcripts of their recordings, and recordings of their questions."""

import hashlib
import json
import os
import random
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
from .audio import load_audio
from .tts import TextToSpeech, shorten, write_wav


@dataclass
class TranscriptionStats:
    """Counts of recordings, and the first errors."""

    recordings: int = 0  # distinct ones without a transcript in the data
    new: int = 0  # transcribed now
    silent: int = 0  # without speech
    truncated: int = 0  # longer than max_speech_seconds
    bad: int = 0  # without a transcript, because of an error
    examples: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        line = f"{self.recordings:,} recordings: {self.new:,} transcribed now, {self.silent:,} without speech, "
        return _with_examples(line + f"{self.truncated:,} cut, {self.bad:,} bad", self.examples)

    def add_error(self, error: str) -> None:
        self.bad += 1
        self.examples += [error][: NUM_EXAMPLES - len(self.examples)]


def transcribe_source(
    source: DataSource, device: str = "cpu", compute_type: str | None = None
) -> tuple[TranscriptionStats, Report]:
    """Transcribe the recordings of a source that have no transcript yet, for training.

    device, compute_type: as in make_transcriber.
    Returns the statistics, and the report of reading the source."""
    if source.streaming:
        raise ValueError(f"{source.path} is a stream: its recordings cannot be transcribed in advance")
    transcripts, report, stats = source.transcripts(), Report(), TranscriptionStats()
    pending: dict[str, File | bytes] = {}
    keys: set[str] = set()
    for recording in _recordings(source, report):
        try:
            key, known = transcripts.key(recording), transcripts.get(recording)
        except RecordError as error:
            if str(recording) not in keys:
                stats.add_error(str(error))
            keys.add(str(recording))
            continue
        if key not in keys:
            if known is None or "error" in known:
                pending[key] = recording
            else:
                stats.silent += not known["text"]
        keys.add(key)
    stats.recordings = len(keys)
    if not pending:
        return stats, report
    engine, model, language, max_seconds = transcripts.settings
    with closing(make_transcriber(engine, model, device, language, compute_type)) as transcriber:
        for recording in tqdm(pending.values(), unit="recording", disable=None, dynamic_ncols=True):
            try:
                clip = load_audio(recording, max_seconds)
            except ValueError as error:
                transcripts.add(recording, error=str(error))
                stats.add_error(str(error))
                continue
            transcript = transcriber.transcribe(clip)
            transcripts.add(recording, text=transcript.text)
            stats.new += 1
            stats.silent += not transcript.text
            stats.truncated += clip.truncated
    return stats, report


def _recordings(source: DataSource, report: Report) -> Iterator[File | bytes]:
    for sample in source.read(source.media(), report):
        for conversation in sample.conversations:
            yield from (turn.speech for turn in conversation if turn.speech is not None and turn.transcript is None)


@dataclass
class SpeechStats:
    """Counts of questions and recordings, and the first errors."""

    questions: int = 0
    spoken: int = 0  # questions with a recording
    recordings: int = 0  # distinct ones
    new: int = 0  # recorded now
    unspeakable: int = 0  # questions without sound in this voice, which stay text
    long: int = 0  # recordings longer than max_seconds
    examples: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        line = f"{self.spoken:,} of {self.questions:,} questions have a recording; {self.recordings:,} recordings "
        line += (
            f"({self.new:,} new, {self.long:,} too long); {self.unspeakable:,} questions without sound in this voice"
        )
        return _with_examples(line, self.examples)


def synthesize_questions(
    annotations: Path, output: Path, tts: TextToSpeech, share: float = 1.0, seed: int = 0, max_seconds: float = 10.0
) -> SpeechStats:
    """Write a LLaVA json with spoken questions: "speech" names a recording, and SPOKEN_INSTRUCTION replaces the text.

    annotations: a LLaVA json.
    output: the new json. Its recordings go to the folder of that name without ".json", one for each distinct question;
        existing ones are reused.
    share: of the questions that become spoken, chosen by the seed.
    max_seconds: longer recordings are counted.
    Raises ValueError if the file is not a list of records."""
    if not 0 <= share <= 1:
        raise ValueError(f"the share of spoken questions must be between 0 and 1, not {share}")
    if output.suffix != ".json" or output.resolve() == annotations.resolve():
        raise ValueError(f"the output must be another file whose name ends in .json, not {output}")
    records = read_json(annotations)
    if not isinstance(records, list):
        raise ValueError(f"{annotations} is not a list of records")
    folder, stats, rng = output.with_suffix(""), SpeechStats(), random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    turns = list(_questions(records))
    stats.questions = len(turns)
    chosen = [turn for turn in turns if rng.random() < share]
    texts = Counter(_question(turn) for turn in chosen)
    names: dict[str, str] = {}
    for text in tqdm(texts, unit="question", disable=None, dynamic_ncols=True):
        name = f"{hashlib.blake2b(f'{tts.voice}:{text}'.encode(), digest_size=10).hexdigest()}.wav"
        if not (folder / name).exists():
            try:
                speech = tts.synthesize(text)
            except ValueError as error:
                stats.unspeakable += texts[text]
                stats.examples += [str(error)][: NUM_EXAMPLES - len(stats.examples)]
                continue
            write_wav(folder / f"{name}.part", speech)
            os.replace(folder / f"{name}.part", folder / name)
            stats.new += 1
        seconds = ((folder / name).stat().st_size - 44) / 2 / tts.sampling_rate
        stats.long += seconds > max_seconds
        names[text] = name
    stats.recordings = len(names)
    for turn in chosen:
        if name := names.get(_question(turn), ""):
            stats.spoken += 1
            image = f"{IMAGE_TOKEN}\n" if IMAGE_TOKEN in turn["value"] else ""
            turn.update(value=image + SPOKEN_INSTRUCTION, speech=name)
    output.with_suffix(".json.part").write_text(json.dumps(records), encoding="utf-8")
    os.replace(output.with_suffix(".json.part"), output)
    return stats


def _questions(records: list[Any]) -> Iterator[dict[str, Any]]:
    """The turns with a question in text; malformed turns are left to the reader, which reports them."""
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


def _with_examples(line: str, examples: list[str]) -> str:
    return "\n".join([line, *(f"  e.g. {shorten(example)}" for example in examples)])
