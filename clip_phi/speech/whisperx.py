"""WhisperX in a process and a Python environment of its own: its pins are incompatible with transformers 5."""

import base64
import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..data.transcripts import Engine
from .audio import AudioClip
from .transcript import Segment, Transcript, Word, make_transcript

REQUIREMENT = "whisperx==3.8.6"
FORMS = ("full", "cpu", "light")
TORCH_CPU = "https://download.pytorch.org/whl/cpu"  # PyTorch's own index of builds without CUDA
SCRIPT = str(Path(__file__).with_name("whisperx_worker.py"))
ABOUT = "clip_phi.json"  # written last: an environment without it is incomplete
START_SECONDS = 600.0  # loading takes seconds, and downloading a model minutes
TRANSCRIBE_SECONDS = 120.0  # for a clip of ten seconds, which takes two
CLOSE_SECONDS = 5.0
NO_TELEMETRY = {"PYANNOTE_METRICS_ENABLED": "false", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
INSTALL_HINT = "run 'clip-phi speech install'"


class WorkerError(OSError):
    """The worker cannot start, has exited or does not answer."""


class Installation(NamedTuple):
    folder: Path
    form: str  # full, cpu or light
    python: Path  # its interpreter
    version: str  # of WhisperX

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
        found = Installation(folder, about["form"], _python(folder), about["version"])
    except FileNotFoundError:
        raise WorkerError(f"WhisperX is not installed in {folder}: {INSTALL_HINT}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WorkerError(f"{folder / ABOUT} is damaged ({error}): {INSTALL_HINT}") from error
    if not found.python.exists():
        raise WorkerError(f"WhisperX's environment has no {found.python}: {INSTALL_HINT}")
    return found


def install(form: str = "full", folder: Path | None = None, log: Callable[[str], Any] = print) -> Installation:
    """Create WhisperX's environment; an existing one is replaced.

    form: "full", with pyannote's voice activity detection, word timestamps and the torch that WhisperX pins (7.7 GB on
        Linux with CUDA); "cpu", the same with PyTorch's builds without CUDA; "light", WhisperX alone (40 MB; Silero's
        voice activity detection, no word timestamps), with torch and faster-whisper of this environment.
    folder: None for default_folder().
    log: called with a line for each step.
    Raises WorkerError with the last lines of pip."""
    if form not in FORMS:
        raise ValueError(f"no form {form!r} of WhisperX: choose {', '.join(FORMS)}")
    folder = (folder or default_folder()).absolute()
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").exists():
        raise WorkerError(f"{folder} exists and is no Python environment: choose another folder")
    shutil.rmtree(folder, ignore_errors=True)
    log(f"creating a Python environment in {folder}")
    _run([sys.executable, "-m", "venv", str(folder)], "venv")
    python = _python(folder)
    options = {"full": [], "cpu": ["--extra-index-url", TORCH_CPU], "light": ["--no-deps"]}[form]
    if form == "light":
        try:
            import faster_whisper  # noqa: F401
        except ImportError as error:
            raise ImportError("the light form uses faster-whisper: pip install 'clip-phi[speech]'") from error
        _share_packages(python)
    log(f"installing {REQUIREMENT}, {form} form")
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    _run([*pip, *options, REQUIREMENT], "pip")
    version = _evaluate(python, "importlib.metadata", "version('whisperx')")
    (folder / ABOUT).write_text(json.dumps({"form": form, "version": version}), encoding="utf-8")
    return find_installation(folder)


def check(installation: Installation) -> str:
    """Import everything for speech recognition in its environment.

    Returns WhisperX's version. Raises WorkerError."""
    return _run([str(installation.python), "-I", SCRIPT, "--check", installation.vad], "import").splitlines()[-1]


def folder_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def _python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _evaluate(python: Path, module: str, expression: str) -> str:
    return _run([str(python), "-I", "-c", f"import {module}; print({module}.{expression})"], "python").strip()


def _share_packages(python: Path) -> None:
    """Let an environment import the packages of this one, after its own."""
    site = Path(_evaluate(python, "sysconfig", "get_path('purelib')"))
    mine = [path for path in sys.path if path and Path(path).name in ("site-packages", "dist-packages")]
    (site / "borrowed.pth").write_text("\n".join(mine) + "\n", encoding="utf-8")


def _run(command: list[str], what: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-3:]
        raise WorkerError(f"WhisperX's environment: {what} ended with status {done.returncode}: {' '.join(last)}")
    return done.stdout


class WhisperXTranscriber:
    """A worker process with WhisperX. Thread-safe: one clip at a time.

    A worker that exits during a clip is restarted once for this clip. One that does not answer in time is stopped; the
    next clip starts another.
    Raises ValueError for input that WhisperX refuses, WorkerError if the worker cannot run."""

    engine: Engine = "whisperx"

    def __init__(
        self,
        model: str,
        device: str,
        language: str | None,
        compute_type: str,
        word_timestamps: bool,
        folder: Path | None = None,
        start_seconds: float = START_SECONDS,
        transcribe_seconds: float = TRANSCRIBE_SECONDS,
    ):
        self.installation = find_installation(folder)
        if word_timestamps and self.installation.form == "light":
            raise ValueError("WhisperX's light form has no word timestamps: run 'clip-phi speech install --form full'")
        self.model = model
        self.start_seconds, self.transcribe_seconds = start_seconds, transcribe_seconds
        self.starts = 0
        # Isolated: neither this folder nor PYTHONPATH may shadow modules of its environment.
        self._command = [str(self.installation.python), "-I", SCRIPT, model, device, compute_type]
        self._command += [language or "", "1" if word_timestamps else "0", self.installation.vad]
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._errors: Any = None
        self._number = 0
        self._closed = False
        with self._lock:
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
                    result = self._request(samples)
                    break
                except _WorkerExited as error:
                    if last_try:
                        raise WorkerError(f"WhisperX exited twice during one clip: {error}") from error
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
        self._stop()
        self.starts += 1
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                encoding="utf-8",
                env=os.environ | NO_TELEMETRY,
            )
        except OSError as error:
            raise WorkerError(f"WhisperX's {self.installation.python} does not start: {error.strerror}") from error
        try:
            response = self._exchange("", self.start_seconds, "start")
        except _WorkerExited as error:
            raise WorkerError(f"WhisperX does not start: {error}") from error
        if "error" in response:
            self._stop()
            raise ValueError(f"WhisperX cannot load {self.model}: {' '.join(str(response['error']).split())}")

    def _request(self, samples: str) -> dict[str, Any]:
        self._number += 1
        line = json.dumps({"id": self._number, "samples": samples}) + "\n"
        response = self._exchange(line, self.transcribe_seconds, "answer")
        if "error" in response:
            raise ValueError(f"WhisperX cannot transcribe this clip: {' '.join(str(response['error']).split())}")
        if response.get("id") != self._number:
            self._stop()
            raise WorkerError(f"WhisperX answers request {response.get('id')} instead of {self._number}")
        return response

    def _exchange(self, line: str, seconds: float, what: str) -> dict[str, Any]:
        """Send a line and receive one. Raises _WorkerExited; WorkerError, and stops the worker, if it takes longer."""
        responses: queue.SimpleQueue[str] = queue.SimpleQueue()
        # In a thread: with a worker that hangs, writing and reading block for ever.
        threading.Thread(target=_send_and_receive, args=(self._process, line, responses), daemon=True).start()
        try:
            text = responses.get(timeout=seconds)
        except queue.Empty:
            self._stop()
            raise WorkerError(f"WhisperX did not {what} within {seconds:g} seconds, and was stopped") from None
        with contextlib.suppress(ValueError):
            if isinstance(response := json.loads(text), dict):
                return response
        raise _WorkerExited(self._exit_reason())

    def _exit_reason(self) -> str:
        """The worker's exit status and its last line on stderr; stops it."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_SECONDS)
        status = self._process.poll()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        self._stop()
        how = f"killed by signal {-status}" if status is not None and status < 0 else f"exit status {status}"
        return ": ".join([how, *lines[-1:]])

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None and process.stdout is not None
            if self._closed:  # the worker exits at the end of its stdin
                with contextlib.suppress(OSError):
                    process.stdin.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(CLOSE_SECONDS)
            process.kill()  # before its pipes are closed: a thread may still use them
            process.wait()
            with contextlib.suppress(OSError):
                process.stdin.close()
            process.stdout.close()
        if self._errors is not None:
            self._errors.close()
            self._errors = None

    def __del__(self) -> None:
        if getattr(self, "_process", None) is not None:
            self._stop()


class _WorkerExited(Exception):
    """The worker has exited; the message says how."""


def _send_and_receive(process: Any, line: str, responses: "queue.SimpleQueue[str]") -> None:
    text = ""
    with contextlib.suppress(OSError, ValueError):  # the worker has exited or was stopped
        process.stdin.write(line)
        process.stdin.flush()
        text = process.stdout.readline()
    responses.put(text)
