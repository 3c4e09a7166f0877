"""What is said in recordings, written down ahead: one file for each way of hearing, by the hash of a recording."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from .sample import SPOKEN_INSTRUCTION, Conversation, File, Sample
from .files import file_stamp
from .report import RecordError, Report, Skip

Engine = Literal["faster-whisper", "whisperx"]
ENGINES: tuple[Engine, ...] = get_args(Engine)


class AsrSettings(NamedTuple):
    """How recordings are heard; another way may write down other words. model: of Whisper, by name, Hub id or folder.
    language: None to find it out by listening. max_seconds: so much of the beginning is heard."""

    engine: Engine = "faster-whisper"
    model: str = "base.en"
    language: str | None = None
    max_seconds: float = 10.0


class Transcripts:
    """The transcripts of one hearing, in the folder clip_phi/transcripts of Hugging Face's cache (HF_HOME).

    A json line each, {"audio": hash, "text"} or {"audio": hash, "error"}, appended as they are made: a process that is
    killed loses none but the last."""

    def __init__(self, hearing: AsrSettings, folder: Path | None = None):
        from huggingface_hub.constants import HF_HOME

        if os.path.isdir(hearing.model):
            hearing = hearing._replace(model=os.path.abspath(hearing.model))
        digest = hashlib.blake2b(json.dumps(hearing).encode(), digest_size=6).hexdigest()
        name = re.sub(r"[^\w.-]+", "-", f"{hearing.engine}-{Path(hearing.model).name}-{digest}")
        self.hearing = hearing
        self.path = (folder or Path(HF_HOME) / "clip_phi" / "transcripts") / f"{name}.jsonl"
        self.asked = False
        self._entries: dict[str, dict[str, Any]] | None = None
        self._keys: dict[File, str] = {}
        self._whole = False  # whether the file is known to end in a whole line

    def key(self, recording: File | bytes) -> str:
        """The hash of a recording's bytes. Raises RecordError if they cannot be read."""
        if isinstance(recording, bytes):
            return _hash(recording)
        if recording not in self._keys:
            try:
                self._keys[recording] = _hash(recording.read())
            except Exception as error:  # zipfile, zlib and pyarrow each have errors of their own
                raise RecordError("missing speech", f"{recording}: {' '.join(str(error).split())}") from error
        return self._keys[recording]

    def get(self, recording: File | bytes) -> dict[str, Any] | None:
        """{"text"} or {"error"}, or None if it was not heard yet. Raises RecordError if it cannot be read."""
        self.asked = True
        return self._read().get(self.key(recording))

    def add(self, recording: File | bytes, **entry: Any) -> None:
        """entry: text, or error."""
        entry = {"audio": self.key(recording)} | entry
        entries = self._read()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+") as file:
            if file.tell() and not self._whole:
                file.seek(-1, os.SEEK_END)
                self._whole = file.read() == b"\n"  # else its last line was torn when a process was killed
            file.write(b"" if self._whole else b"\n")
            file.write(json.dumps(entry).encode() + b"\n")
        self._whole = True
        entries[entry["audio"]] = entry

    def fill(self, samples: Iterable[Sample], report: Report) -> Iterator[Sample]:
        """The Samples, with transcripts where a turn has a recording and none.

        Where nobody speaks, the recording is left out; a turn that consists of it alone takes its branch along. Where
        none was written down, the turn stays as it is: what cannot be trained on is skipped when it is tokenised."""
        for sample in samples:
            if not any(
                turn.speech is not None and turn.transcript is None for each in sample.conversations for turn in each
            ):
                yield sample
                continue
            good: list[tuple[Conversation, str]] = []
            for conversation, origin in zip(sample.conversations, sample.origins, strict=True):
                try:
                    good.append((self._fill(conversation, origin, report), origin))
                except RecordError as defect:
                    report.skip(Skip(defect.kind, origin, defect.detail))
            if good:
                conversations, origins = zip(*good, strict=True)
                yield replace(sample, conversations=conversations, origins=origins)

    def file_stamps(self) -> dict[str, list[int] | None]:
        """If anything was looked up: the file, with what tells whether it has changed."""
        return {str(self.path): file_stamp(str(self.path))} if self.asked else {}

    def _fill(self, conversation: Conversation, origin: str, report: Report) -> Conversation:
        turns = []
        for turn in conversation:
            if turn.speech is not None and turn.transcript is None:
                found = self.get(turn.speech)
                name = "a recording" if isinstance(turn.speech, bytes) else str(turn.speech)
                if found is not None and "error" in found:
                    raise RecordError("recording cannot be heard", f"{name}: {found['error']}")
                if found is not None and not found["text"]:
                    if turn.text == SPOKEN_INSTRUCTION:
                        raise RecordError("nobody speaks in the recording", name)
                    report.repair("nobody speaks in the recording, which was left out", origin, name)
                    turn = turn._replace(speech=None)
                elif found is not None:
                    turn = turn._replace(transcript=found["text"])
            turns.append(turn)
        return tuple(turns)

    def _read(self) -> dict[str, dict[str, Any]]:
        if self._entries is None:
            self._entries = {}
            lines = self.path.read_bytes().splitlines() if self.path.exists() else []
            for line in lines:
                try:
                    entry = json.loads(line)
                    self._entries[entry["audio"]] = entry
                except (ValueError, KeyError, TypeError):
                    continue  # torn when its process was killed: it will be heard again
        return self._entries


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
