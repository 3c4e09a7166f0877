"""Transcripts of recordings, made ahead of training: one file for each AsrSettings, by the hash of a recording."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from .files import checked_line, file_stamp, read_checked_lines
from .report import RecordError, Report, Skip
from .sample import SPOKEN_INSTRUCTION, Conversation, File, Sample, Turn

Engine = Literal["faster-whisper", "whisperx"]
ENGINES: tuple[Engine, ...] = get_args(Engine)


class AsrSettings(NamedTuple):
    """How recordings are transcribed.

    engine: the program that runs Whisper. model: of Whisper, by name, Hub id or folder. language: None to detect it.
    max_seconds: how much of the beginning is transcribed."""

    engine: Engine = "faster-whisper"
    model: str = "base.en"
    language: str | None = None
    max_seconds: float = 10.0


class Transcripts:
    """The transcripts made with some settings, in the folder clip_phi/transcripts of Hugging Face's cache (HF_HOME).

    Each a checked_line(), {"audio": hash, "text" or "error"}: a process that is killed loses the last at most."""

    def __init__(self, settings: AsrSettings, folder: Path | None = None):
        from huggingface_hub.constants import HF_HOME

        if os.path.isdir(settings.model):
            settings = settings._replace(model=os.path.abspath(settings.model))
        digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=6).hexdigest()
        name = re.sub(r"[^\w.-]+", "-", f"{settings.engine}-{Path(settings.model).name}-{digest}")
        self.settings = settings
        self.path = (folder or Path(HF_HOME) / "clip_phi" / "transcripts") / f"{name}.jsonl"
        self._keys: dict[File, str] = {}

    def key(self, recording: File | bytes) -> str:
        """The hash of a recording's bytes. Raises RecordError if they cannot be read."""
        if isinstance(recording, bytes):
            return hashlib.blake2b(recording, digest_size=16).hexdigest()
        if recording not in self._keys:
            try:
                self._keys[recording] = self.key(recording.read())
            except Exception as error:  # zipfile, zlib and pyarrow each have errors of their own
                raise RecordError("missing speech", f"{recording}: {' '.join(str(error).split())}") from error
        return self._keys[recording]

    def get(self, recording: File | bytes) -> dict[str, Any] | None:
        """{"text"} or {"error"}, or None if there is no transcript yet. Raises RecordError if it cannot be read."""
        return self._entries.get(self.key(recording))

    def add(self, recording: File | bytes, **entry: Any) -> None:
        """entry: text, or error."""
        entry = {"audio": self.key(recording)} | entry
        self._entries[entry["audio"]] = entry  # the file is read before it is added to
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            # An empty line between, because a process may have been killed in the last one.
            file.write("\n" * (file.tell() > 0) + checked_line(entry))

    def fill(self, samples: Iterable[Sample], report: Report) -> Iterator[Sample]:
        """The Samples, with transcripts where a turn has a recording and none.

        A recording without speech is left out, and its conversation with it if the turn has no other text. A turn
        whose transcript is not made yet stays as it is: it is skipped when it is tokenised."""
        for sample in samples:
            good: list[tuple[Conversation, str, tuple[int, Any]]] = []
            ids = sample.ids or ((0, None),) * len(sample.origins)
            for conversation, origin, its_id in zip(sample.conversations, sample.origins, ids, strict=True):
                try:
                    good.append((tuple(self._fill(turn, origin, report) for turn in conversation), origin, its_id))
                except RecordError as error:
                    report.skip(Skip(error.kind, origin, error.detail))
            if good:
                conversations, origins, ids = zip(*good, strict=True)
                yield replace(sample, conversations=conversations, origins=origins, ids=ids)

    def file_stamps(self) -> dict[str, list[int] | None]:
        """file_stamp() of the file, if a transcript was looked up."""
        return {str(self.path): file_stamp(str(self.path))} if "_entries" in self.__dict__ else {}

    def _fill(self, turn: Turn, origin: str, report: Report) -> Turn:
        if turn.speech is None or turn.transcript is not None or (found := self.get(turn.speech)) is None:
            return turn
        name = "a recording" if isinstance(turn.speech, bytes) else str(turn.speech)
        if "error" in found:
            raise RecordError("recording cannot be decoded", f"{name}: {found['error']}")
        if found["text"]:
            return turn._replace(transcript=found["text"])
        if turn.text == SPOKEN_INSTRUCTION:
            raise RecordError("no speech in the recording", name)
        report.repair("no speech in the recording, which was left out", origin, name)
        return turn._replace(speech=None)

    @cached_property
    def _entries(self) -> dict[str, dict[str, Any]]:
        # A recording whose line was cut, or has changed on disk, is transcribed again.
        entries = read_checked_lines(self.path) if self.path.exists() else []
        return {entry["audio"]: entry for entry in entries}
