"""WhisperX in a process and a Python environment of its own, since its pins cannot live beside transformers 5."""

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
from .audio import Clip
from .transcript import Segment, Transcript, Word, one_line

REQUIREMENT = "whisperx==3.8.6"
FORMS = ("full", "cpu", "light")
TORCH_CPU = "https://download.pytorch.org/whl/cpu"  # PyTorch's own index of builds without CUDA
SCRIPT = str(Path(__file__).with_name("whisperx_worker.py"))
ABOUT = "clip_phi.json"  # written last: an environment without it is not whole
START_SECONDS = 600.0  # loading takes seconds, and downloading a model minutes
HEAR_SECONDS = 120.0  # for a clip of ten seconds, which takes two
CLOSE_SECONDS = 5.0
NO_TELEMETRY = {"PYANNOTE_METRICS_ENABLED": "false", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}


class WorkerError(OSError):
    """The worker cannot be started, has died or does not answer."""


class Installation(NamedTuple):
    """form: full, cpu or light. python: its interpreter. version: of WhisperX."""

    folder: Path
    form: str
    python: Path
    version: str

    @property
    def vad(self) -> str:
        """What detects voices: WhisperX's pyannote, or where it was left out the Silero of faster-whisper."""
        return "silero" if self.form == "light" else "pyannote"


def default_folder() -> Path:
    """CLIP_PHI_WHISPERX, or clip_phi/whisperx in Hugging Face's cache (HF_HOME)."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get("CLIP_PHI_WHISPERX") or Path(HF_HOME) / "clip_phi" / "whisperx")


def find_installation(folder: Path | None = None) -> Installation:
    """Raises WorkerError, which says how to install it, if it is not there or not whole."""
    folder = folder or default_folder()
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        found = Installation(folder, about["form"], _python(folder), about["version"])
    except FileNotFoundError:
        raise WorkerError(f"WhisperX is not installed in {folder}: run 'clip-phi speech install'") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WorkerError(f"{folder / ABOUT} is damaged ({error}): run 'clip-phi speech install'") from error
    if not found.python.exists():
        raise WorkerError(f"the environment of WhisperX has lost its {found.python}: run 'clip-phi speech install'")
    return found


def install(form: str = "full", folder: Path | None = None, say: Callable[[str], Any] = print) -> Installation:
    """Make WhisperX's environment, anew if there is one.

    form: "full", with pyannote's voice detection, word timestamps and the torch that it pins (7.7 GB on Linux with
    CUDA); "cpu", the same with PyTorch's builds without CUDA; "light", which borrows torch and faster-whisper from this
    environment and adds WhisperX alone (40 MB; Silero's voice detection, no word timestamps). Raises WorkerError with
    the last lines of pip."""
    if form not in FORMS:
        raise ValueError(f"no form {form!r} of WhisperX: there are {', '.join(FORMS)}")
    folder = (folder or default_folder()).absolute()
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").exists():
        raise WorkerError(f"{folder} is there and holds no Python environment: choose another folder")
    shutil.rmtree(folder, ignore_errors=True)
    say(f"making a Python environment in {folder}")
    _run([sys.executable, "-m", "venv", str(folder)], "venv")
    python = _python(folder)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    if form == "light":
        try:
            import faster_whisper  # noqa: F401
        except ImportError as error:
            raise ImportError("the light form borrows faster-whisper: pip install 'clip-phi[speech]'") from error
        _borrow(python, folder)
        command = [*pip, "--no-deps", REQUIREMENT]
    elif form == "cpu":
        command = [*pip, "--extra-index-url", TORCH_CPU, REQUIREMENT]
    else:
        command = [*pip, REQUIREMENT]
    say(f"installing {REQUIREMENT}, {form} form")
    _run(command, "pip")
    code = "import importlib.metadata; print(importlib.metadata.version('whisperx'))"
    version = _run([str(python), "-I", "-c", code], "python").strip()
    (folder / ABOUT).write_text(json.dumps({"form": form, "version": version}), encoding="utf-8")
    return find_installation(folder)


def check(installation: Installation) -> str:
    """Import, in its environment, all that hearing needs. Returns WhisperX's version; raises WorkerError."""
    return _run([str(installation.python), "-I", SCRIPT, "--check", installation.vad], "import").splitlines()[-1]


def folder_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def _python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _borrow(python: Path, folder: Path) -> None:
    """Let an environment see the packages of this one, behind its own."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(_run([str(python), "-I", "-c", code], "python").strip())
    mine = [path for path in sys.path if path and Path(path).name in ("site-packages", "dist-packages")]
    (site / "borrowed.pth").write_text("\n".join(mine) + "\n", encoding="utf-8")


def _run(command: list[str], what: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-3:]
        raise WorkerError(f"WhisperX's environment: {what} ended with status {done.returncode}: {' '.join(last)}")
    return done.stdout


class WhisperXTranscriber:
    """A running worker. One that dies while it hears is started again, once a clip; one that does not answer in time is
    stopped, and the next clip starts another. May be called from several threads, which wait for each other.

    Raises ValueError for what it refuses, and WorkerError if it cannot run."""

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
        hear_seconds: float = HEAR_SECONDS,
    ):
        self.installation = find_installation(folder)
        if word_timestamps and self.installation.form == "light":
            raise ValueError("the light form of WhisperX places no words: run 'clip-phi speech install --form full'")
        self.model = model
        self.start_seconds = start_seconds
        self.hear_seconds = hear_seconds
        self.starts = 0
        # Isolated: neither this folder nor PYTHONPATH may put other modules before those of its environment.
        self._command = [str(self.installation.python), "-I", SCRIPT, model, device, compute_type]
        self._command += [language or "", "1" if word_timestamps else "0", self.installation.vad]
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._errors: Any = None
        self._number = 0
        self._closed = False
        with self._lock:
            self._start()

    def transcribe(self, clip: Clip) -> Transcript:
        samples = base64.b64encode(np.ascontiguousarray(clip.samples, dtype=np.float32).tobytes()).decode()
        with self._lock:
            if self._closed:
                raise ValueError("this transcriber is closed")
            if self._process is None:
                self._start()
            try:
                answer = self._ask({"samples": samples}, self.hear_seconds)
            except _Died:
                self._start()  # what killed it may have been the machine, and not this clip
                try:
                    answer = self._ask({"samples": samples}, self.hear_seconds)
                except _Died as error:
                    raise WorkerError(f"WhisperX died twice over one clip: {error}") from error
        segments = tuple(
            Segment(
                segment["text"].strip(),
                segment["start"],
                segment["end"],
                tuple(Word(word["word"], word["start"], word["end"]) for word in segment["words"]),
            )
            for segment in answer["segments"]
        )
        language = answer["language"]
        return Transcript(one_line(segments), segments, language, self.engine, clip.seconds, clip.truncated)

    def healthy(self, seconds: float = 10.0) -> bool:
        """Whether the worker runs and answers within so many seconds; one that does not is stopped."""
        with self._lock:
            if self._process is None:
                return False
            try:
                return bool(self._ask({"ping": True}, seconds).get("ok"))
            except (WorkerError, _Died):
                return False

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._stop()

    def _start(self) -> None:
        self._stop()
        self.starts += 1
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._lines = queue.Queue()
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
        threading.Thread(target=_read, args=(self._process.stdout, self._lines), daemon=True).start()
        try:
            answer = self._answer(self.start_seconds, "start")
        except _Died as error:
            raise WorkerError(f"WhisperX does not start: {error}") from error
        if "error" in answer:
            self._stop()
            raise ValueError(f"WhisperX cannot load {self.model}: {' '.join(str(answer['error']).split())}")

    def _ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        assert self._process is not None
        self._number += 1
        line = json.dumps({"id": self._number} | request) + "\n"
        # In a thread: a worker that hangs does not read, and writing would wait for ever.
        threading.Thread(target=_write, args=(self._process.stdin, line), daemon=True).start()
        answer = self._answer(seconds, "answer")
        if "error" in answer:
            raise ValueError(f"WhisperX cannot hear this clip: {' '.join(str(answer['error']).split())}")
        if answer.get("id") != self._number:
            self._stop()
            raise WorkerError(f"WhisperX answers {answer.get('id')} where {self._number} was asked")
        return answer

    def _answer(self, seconds: float, what: str) -> dict[str, Any]:
        """The worker's next line. Raises _Died, or WorkerError after so many seconds, and stops it."""
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            self._stop()
            raise WorkerError(f"WhisperX does not {what} within {seconds:g} seconds, and was stopped") from None
        try:
            answer = json.loads(line) if line is not None else None
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise _Died(self._last_words())
        return answer

    def _last_words(self) -> str:
        """How the worker ended, and the last line that it wrote on stderr; it is gone afterwards."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_SECONDS)
        status, lines = self._process.poll(), []
        if self._errors is not None:
            self._errors.seek(0)
            lines = self._errors.read().strip().splitlines()
        self._stop()
        how = f"killed by signal {-status}" if status is not None and status < 0 else f"exit status {status}"
        return f"{how}{': ' + lines[-1] if lines else ''}"

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            if self._closed:  # it ends when there is nothing more to read
                with contextlib.suppress(OSError):
                    process.stdin.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(CLOSE_SECONDS)
            process.kill()  # before its stdin is closed, on which a thread may still wait that writes
            process.wait()
            with contextlib.suppress(OSError):
                process.stdin.close()
        if self._errors is not None:
            self._errors.close()
            self._errors = None

    def __del__(self) -> None:
        if getattr(self, "_process", None) is not None:
            self._stop()


class _Died(Exception):
    """How the worker ended."""


def _read(stream: Any, lines: "queue.Queue[str | None]") -> None:
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)


def _write(stream: Any, line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # it has died or was stopped, which who waits for the answer sees
        stream.write(line)
        stream.flush()
