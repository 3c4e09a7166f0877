"""Speech for whole data sets: transcripts of their recordings, and recordings of their questions."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..data.files import read_json, replace_file
from ..data.report import NUM_EXAMPLES, RecordError, Report
from ..data.sample import SPOKEN_INSTRUCTION, File
from ..data.schema import IMAGE_TOKEN
from ..data.source import DataSource
from .asr import make_transcriber
from .audio import MAX_SECONDS, load_audio
from .tts import TextToSpeech, shorten, write_wav


@dataclass
class TranscriptionStats:
    """Counts of recordings, and the first errors."""

    recordings: int  # distinct ones without a transcript in the data
    new: int  # transcribed now
    silent: int  # without speech
    truncated: int  # longer than max_speech_seconds
    bad: int  # without a transcript, because of an error
    examples: list[str]

    def __str__(self) -> str:
        line = f"{self.recordings:,} recordings: {self.new:,} transcribed now, {self.silent:,} without speech, "
        return _with_examples(line + f"{self.truncated:,} cut, {self.bad:,} bad", self.examples)


def transcribe_source(
    source: DataSource, device: str = "cpu", compute_type: str | None = None
) -> tuple[TranscriptionStats, Report]:
    """Transcribe the recordings of a source that have no transcript yet; device and compute_type: of make_transcriber.

    Returns the statistics, and the report of reading the source."""
    if source.streaming:
        raise ValueError(f"{source.path} is a stream: its recordings cannot be transcribed in advance")
    transcripts, report = source.transcripts(), Report()
    pending: dict[str, File | bytes] = {}  # by their hash
    texts: dict[str, str] = {}
    errors: dict[str, str] = {}
    new = truncated = 0
    turns = (turn for sample in source.read(source.media(), report) for each in sample.conversations for turn in each)
    for recording in (turn.speech for turn in turns if turn.speech is not None and turn.transcript is None):
        try:
            key, known = transcripts.key(recording), transcripts.get(recording)
        except RecordError as error:
            errors[str(recording)] = str(error)
            continue
        if known is None or "error" in known:
            pending[key] = recording
        else:
            texts[key] = known["text"]
    engine, model, language, max_seconds = transcripts.settings
    with ExitStack() as stack:
        if pending:
            asr = stack.enter_context(closing(make_transcriber(engine, model, device, language, compute_type)))
        for key, recording in tqdm(pending.items(), unit="recording", disable=None, dynamic_ncols=True):
            try:
                clip = load_audio(recording, max_seconds)
            except ValueError as error:
                errors[key] = str(error)
                transcripts.add(recording, error=str(error))
                continue
            texts[key] = asr.transcribe(clip).text
            transcripts.add(recording, text=texts[key])
            new += 1
            truncated += clip.truncated
    silent, examples = sum(not text for text in texts.values()), list(errors.values())[:NUM_EXAMPLES]
    return TranscriptionStats(len(texts) + len(errors), new, silent, truncated, len(errors), examples), report


@dataclass
class SpeechStats:
    """Counts of questions and recordings, and the first errors."""

    questions: int = 0
    spoken: int = 0  # questions with a recording
    recordings: int = 0  # distinct ones
    new: int = 0  # recorded now
    unspeakable: int = 0  # questions without sound in this voice, which stay text
    long: int = 0  # recordings longer than MAX_SECONDS
    examples: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        line = f"{self.spoken:,} of {self.questions:,} questions have a recording; {self.recordings:,} recordings "
        line += f"({self.new:,} new, {self.long:,} too long); {self.unspeakable:,} questions without sound in the voice"
        return _with_examples(line, self.examples)


def synthesize_questions(
    annotations: Path, output: Path, tts: TextToSpeech, share: float = 1.0, seed: int = 0
) -> SpeechStats:
    """Write a LLaVA json with spoken questions: "speech" names a recording, and SPOKEN_INSTRUCTION replaces the text.

    Args:
        annotations: a LLaVA json. Raises ValueError if it is not a list of records.
        output: the new json. Its recordings go to the folder of that name without ".json", one for each distinct
            question; existing ones are reused.
        share: of the questions that become spoken, chosen by the seed."""
    if not 0 <= share <= 1:
        raise ValueError(f"the share of spoken questions must be between 0 and 1, not {share}")
    if output.suffix != ".json" or output.resolve() == annotations.resolve():
        raise ValueError(f"the output must be another file whose name ends in .json, not {output}")
    records = read_json(annotations)
    if not isinstance(records, list):
        raise ValueError(f"{annotations} is not a list of records")
    folder, turns, rng = output.with_suffix(""), list(_questions(records)), random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    stats = SpeechStats(questions=len(turns))
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
            (folder / f"{name}.part").replace(folder / name)
            stats.new += 1
        seconds = ((folder / name).stat().st_size - 44) / 2 / tts.sampling_rate
        stats.long += seconds > MAX_SECONDS
        names[text] = name
    stats.recordings = len(names)
    for turn in chosen:
        if name := names.get(_question(turn), ""):
            stats.spoken += 1
            image = f"{IMAGE_TOKEN}\n" if IMAGE_TOKEN in turn["value"] else ""
            turn.update(value=image + SPOKEN_INSTRUCTION, speech=name)
    replace_file(output, json.dumps(records))
    return stats


def _questions(records: list[Any]) -> Iterator[dict[str, Any]]:
    """The turns with a question in text; malformed turns are left to the reader, which reports them."""
    for record in records:
        turns = record.get("conversations") if isinstance(record, dict) else None
        for turn in turns if isinstance(turns, list) else ():
            asks = isinstance(turn, dict) and turn.get("from") in ("human", "user")
            is_text = asks and turn.get("speech") is None and turn.get("transcript") is None
            if is_text and isinstance(turn.get("value"), str) and _question(turn):
                yield turn


def _question(turn: dict[str, Any]) -> str:
    return " ".join(turn["value"].replace(IMAGE_TOKEN, " ").split())


def _with_examples(line: str, examples: list[str]) -> str:
    return "\n".join([line, *(f"  e.g. {shorten(example)}" for example in examples)])
