"""WhisperX in a process and a Python environment of its own: its pins are incompatible with transformers 5."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..data.transcripts import Engine
from .audio import AudioClip
from .transcript import Segment, Transcript, Word, make_transcript

REQUIREMENT = "whisperx==3.8.6"
# By form, the options of pip: all that WhisperX pins, with PyTorch's own index of builds without CUDA, WhisperX alone
FORMS = {"full": [], "cpu": ["--extra-index-url", "https://download.pytorch.org/whl/cpu"], "light": ["--no-deps"]}
SCRIPT = str(Path(__file__).with_name("whisperx_worker.py"))
ABOUT = "clip_phi.json"  # written last: an environment without it is incomplete
CLOSE_SECONDS = 5.0
NO_TELEMETRY = {"PYANNOTE_METRICS_ENABLED": "false", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
INSTALL_HINT = "run 'clip-phi speech install'"


class WorkerError(OSError):
    """The worker cannot start, has exited or does not answer."""


class Installation(NamedTuple):
    folder: Path
    form: str  # full, cpu or light
    version: str  # of WhisperX

    @property
    def python(self) -> Path:
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @property
    def vad(self) -> str:
        """Voice activity detection: WhisperX's pyannote, or in the light form the Silero of faster-whisper."""
        return "silero" if self.form == "light" else "pyannote"


def default_folder() -> Path:
    """CLIP_PHI_WHISPERX, or clip_phi/whisperx in Hugging Face's cache (HF_HOME)."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get("CLIP_PHI_WHISPERX") or Path(HF_HOME) / "clip_phi" / "whisperx")


def find_installation(folder: Path | None = None) -> Installation:
    """Raises WorkerError, with the command that installs it, if it is missing or incomplete."""
    folder = folder or default_folder()
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        found = Installation(folder, about["form"], about["version"])
    except FileNotFoundError:
        raise WorkerError(f"WhisperX is not installed in {folder}: {INSTALL_HINT}") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise WorkerError(f"{folder / ABOUT} is damaged ({error}): {INSTALL_HINT}") from error
    if not found.python.exists():
        raise WorkerError(f"WhisperX's environment has no {found.python}: {INSTALL_HINT}")
    return found


def install(form: str = "full", folder: Path | None = None) -> Installation:
    """Create WhisperX's environment; an existing one is replaced. Raises WorkerError with the last lines of pip.

    Args:
        form: "full", with pyannote's voice activity detection, word timestamps and the torch that WhisperX pins (7.7 GB
            on Linux with CUDA); "cpu", the same without CUDA; "light", WhisperX alone (40 MB; Silero's voice activity
            detection, no word timestamps), with torch and faster-whisper of this environment.
        folder: None for default_folder()."""
    if form not in FORMS:
        raise ValueError(f"no form {form!r} of WhisperX: choose {', '.join(FORMS)}")
    folder = (folder or default_folder()).absolute()
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").exists():
        raise WorkerError(f"{folder} exists and is no Python environment: choose another folder")
    if form == "light" and find_spec("faster_whisper") is None:
        raise ImportError("the light form uses faster-whisper: pip install 'clip-phi[speech]'")
    shutil.rmtree(folder, ignore_errors=True)
    print(f"creating a Python environment in {folder}")
    _run([sys.executable, "-m", "venv", str(folder)], "venv")
    found = Installation(folder, form, "")
    if form == "light":  # it imports the packages of this environment, after its own
        site = sysconfig.get_path("purelib", "venv", {"base": str(folder)})
        mine = [path for path in sys.path if path and Path(path).name in ("site-packages", "dist-packages")]
        Path(site, "borrowed.pth").write_text("\n".join(mine) + "\n", encoding="utf-8")
    print(f"installing {REQUIREMENT}, {form} form")
    pip = [str(found.python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    _run([*pip, *FORMS[form], REQUIREMENT], "pip")
    found = found._replace(version=check(found))
    (folder / ABOUT).write_text(json.dumps({"form": form, "version": found.version}), encoding="utf-8")
    return found


def check(installation: Installation) -> str:
    """WhisperX's version, once all imports for speech recognition work in its environment; else raises WorkerError."""
    return _run([str(installation.python), "-I", SCRIPT, "--check", installation.vad], "import").splitlines()[-1]


def _run(command: list[str], what: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        last = " ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-3:])
        raise WorkerError(f"WhisperX's environment: {what} ended with status {done.returncode}: {last}")
    return done.stdout


class WhisperXTranscriber:
    """A worker process with WhisperX. Thread-safe: one clip at a time.

    A worker that exits during a clip is restarted once for this clip. One that does not answer in time is stopped; the
    next clip starts another.
    Raises ValueError for input that WhisperX refuses, WorkerError if the worker cannot run."""

    engine: Engine = "whisperx"
    start_seconds = 600.0  # loading takes seconds, and downloading a model minutes
    transcribe_seconds = 120.0  # for a clip of ten seconds, which takes two

    def __init__(self, model: str, device: str, language: str | None, compute_type: str, word_timestamps: bool):
        found = find_installation()
        if word_timestamps and found.form == "light":
            raise ValueError("WhisperX's light form has no word timestamps: run 'clip-phi speech install --form full'")
        self.model, self.starts = model, 0
        # Isolated: neither this folder nor PYTHONPATH may shadow modules of its environment.
        self._command = [str(found.python), "-I", SCRIPT, model, device, compute_type]
        self._command += [language or "", "1" if word_timestamps else "0", found.vad]
        self._lock = threading.Lock()
        self._process: Any = None
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._closed = False
        self._start()

    def transcribe(self, clip: AudioClip) -> Transcript:
        samples = base64.b64encode(np.ascontiguousarray(clip.samples, dtype=np.float32).tobytes()).decode()
        with self._lock:
            if self._closed:
                raise ValueError("this transcriber is closed")
            for last_try in (False, True):  # the machine may be the cause of an exit, not this clip
                if self._process is None:
                    self._start()
                try:
                    result = self._exchange(f"{samples}\n", self.transcribe_seconds, "answer")
                    break
                except _WorkerExited as error:
                    if last_try:
                        raise WorkerError(f"WhisperX exited twice during one clip: {error}") from error
        if "error" in result:
            raise ValueError(f"WhisperX cannot transcribe this clip: {' '.join(result['error'].split())}")
        segments = [
            Segment(each["text"].strip(), each["start"], each["end"], tuple(Word(*word) for word in each["words"]))
            for each in result["segments"]
        ]
        return make_transcript(segments, result["language"], self.engine, clip)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._stop()

    def _start(self) -> None:
        self.starts += 1
        self._errors.seek(0)
        self._errors.truncate()
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._process = subprocess.Popen(self._command, **pipes, encoding="utf-8", env=os.environ | NO_TELEMETRY)
        try:
            response = self._exchange("", self.start_seconds, "start")
        except _WorkerExited as error:
            raise WorkerError(f"WhisperX does not start: {error}") from error
        if "error" in response:
            self._stop()
            raise ValueError(f"WhisperX cannot load {self.model}: {' '.join(response['error'].split())}")

    def _exchange(self, line: str, seconds: float, what: str) -> dict[str, Any]:
        """Send a line and receive one. Stops the worker and raises _WorkerExited if it exits, WorkerError if late."""
        process, end = self._process, time.monotonic() + seconds
        timer = threading.Timer(seconds, process.kill)  # ends what follows, which has no time limit of its own
        timer.start()
        try:
            with contextlib.suppress(OSError, ValueError):  # no pipe, or no whole line: the worker has exited
                process.stdin.write(line)
                process.stdin.flush()
                return json.loads(process.stdout.readline())
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(CLOSE_SECONDS)
        except BaseException:  # interrupted: the answer must not be taken for that of the next clip
            self._stop()
            raise
        finally:
            timer.cancel()
        status = process.poll()
        self._stop()
        if time.monotonic() >= end:
            raise WorkerError(f"WhisperX did not {what} within {seconds:g} seconds, and was stopped")
        self._errors.seek(0)
        how = f"killed by signal {-status}" if (status or 0) < 0 else f"exit status {status}"
        raise _WorkerExited(": ".join([how, *self._errors.read().strip().splitlines()[-1:]]))

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            if not self._closed:
                process.kill()
            try:
                process.communicate(timeout=CLOSE_SECONDS)  # the worker exits at the end of its stdin
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class _WorkerExited(Exception):
    """The worker has exited; the message says how."""
