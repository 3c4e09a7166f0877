"""Checkpoints to go on from: all that changes in training, some MB, whole or not there at all.

A folder step-00001200 holds trained.safetensors (the trained weights), state.pt (optimizer, schedule, random numbers of
every rank) and about.json (position, options, data, and the size and hash of the other two). It is written aside,
flushed to the disk and renamed, so that a run may be killed at any moment.
"""

import dataclasses
import hashlib
import json
import math
import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..data.report import Report
from .arguments import TrainingArguments
from .fsdp import gather, shard_like, trained_weights

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: a signal stopped the run, and --resume_from_checkpoint goes on with it
FILES = ("trained.safetensors", "state.pt")
# Other values give the samples another order, or the weights another meaning.
FIXED = {
    *(
        "stage",
        "seed",
        "max_length",
        "per_device_train_batch_size",
        "max_tokens_per_batch",
        "captions_per_image",
        "optim",
    ),
    *("vision_backbone", "vision_revision", "text_backbone", "text_revision", "init_from", "projector_type"),
    *("lora_r", "lora_alpha", "lora_targets", "holdout_images", "tune_decoder", "quantization"),
}
# Other values change nothing that is learnt. Any that is in neither set may change, but then so does the training.
FREE = {
    *(
        "config",
        "output_dir",
        "debug",
        "resume_from_checkpoint",
        "save_total_limit",
        "save_steps",
        "logging_steps",
        "eval_steps",
        "data",
        "eval_data",
    ),
    *("max_eval_images", "max_bad_fraction", "dataloader_num_workers", "num_sample_texts", "max_new_tokens", "merged"),
    *("caption_instruction", "gradient_checkpointing", "report_to", "peak_tflops", "eval_task", "eval_task_images"),
    *("push_to_hub", "hub_private_repo"),
}


class Checkpoints:
    """Those of one run, in output_dir/checkpoints. keep: how many of the newest stay."""

    def __init__(self, output_dir: Path, keep: int, accelerator: Accelerator):
        self.folder = output_dir / "checkpoints"
        self.keep = keep
        self.accelerator = accelerator

    def begin_anew(self) -> None:
        """Move those of an earlier run in the same folder out of the way, to checkpoints.before; one such run stays."""
        if self.accelerator.is_main_process and self.folder.is_dir():
            before = self.folder.with_name("checkpoints.before")
            shutil.rmtree(before, ignore_errors=True)
            os.replace(self.folder, before)
            self.accelerator.print(
                f"an earlier run's checkpoints are moved to {before}; --resume_from_checkpoint would go on with them"
            )
        self.accelerator.wait_for_everyone()

    def save(self, step: int, model: Any, optimizer: Any, scheduler: Any, about: dict[str, Any]) -> None:
        """All ranks call it; the main process writes. about: what else belongs to the position, for json.

        Raises OSError that names the folder if it cannot be written."""
        keep = self.accelerator.is_main_process
        weights = {name: gather(value, keep) for name, value in trained_weights(model).items()}
        scaler = self.accelerator.scaler
        state = {
            "optimizer": whole_optimizer_state(optimizer, keep),
            "scheduler": scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "random": gather_object([random_state()]),
        }
        problem = None
        if self.accelerator.is_main_process:
            try:
                self._write(step, weights, state, about)
            except (OSError, SafetensorError, RuntimeError) as error:  # the latter two of libraries, for a full disk
                problem = error
        self.accelerator.wait_for_everyone()
        if problem is not None:
            raise OSError(f"cannot write a checkpoint in {self.folder}: {problem}") from problem

    def _write(self, step: int, weights: dict[str, torch.Tensor], state: dict[str, Any], about: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob("making-*"):
            shutil.rmtree(leftover)
        aside = self.folder / f"making-{step:08}"
        aside.mkdir()
        save_file(weights, aside / FILES[0])
        torch.save(state, aside / FILES[1])
        files = {name: [(aside / name).stat().st_size, _hash(aside / name)] for name in FILES}
        (aside / "about.json").write_text(json.dumps({"step": step, "files": files, **about}), encoding="utf-8")
        for name in (*FILES, "about.json", "."):
            _flush(aside / name)
        place = self.folder / f"step-{step:08}"
        if place.exists():
            shutil.rmtree(place)
        os.replace(aside, place)
        _flush(self.folder)
        for old in sorted(self.folder.glob("step-*"))[: -self.keep]:
            shutil.rmtree(old)

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest whole checkpoint and its about.json; what is torn is passed over, and said so."""
        for place in sorted(self.folder.glob("step-*"), reverse=True):
            problem = None
            try:
                about = json.loads((place / "about.json").read_text(encoding="utf-8"))
                for name, expected in about["files"].items():
                    if [(place / name).stat().st_size, _hash(place / name)] != expected:
                        problem = f"{name} is not what was written"
            except (OSError, ValueError, KeyError) as error:
                problem = str(error)
            if problem is None:
                return place, about
            self.accelerator.print(f"{place} is not whole and is passed over: {problem}")
        return None

    def restore(self, place: Path, model: Any, optimizer: Any, scheduler: Any) -> None:
        """Everything as it was when save() was called. Raises ValueError if the trained weights are others."""
        weights = load_file(place / FILES[0])
        own = trained_weights(model)
        if weights.keys() != own.keys():
            odd = sorted(weights.keys() ^ own.keys())
            raise ValueError(f"{place} holds other trained weights than this run has: {', '.join(odd[:3])}, ...")
        for name, value in own.items():
            value.copy_(shard_like(weights[name], value))
        state = torch.load(place / FILES[1], map_location="cpu", weights_only=True)
        load_optimizer_state(optimizer, state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if len(state["random"]) == self.accelerator.num_processes:
            set_random_state(state["random"][self.accelerator.process_index])


def whole_optimizer_state(optimizer: Any, keep: bool) -> dict[str, Any]:
    """Its state_dict(), put together if it is sharded, in the process that keeps it; all ranks call it."""
    found = optimizer.state_dict()
    states = {
        number: {name: gather(value, keep) for name, value in state.items()} for number, state in found["state"].items()
    }
    return {**found, "state": states}


def load_optimizer_state(optimizer: Any, found: dict[str, Any]) -> None:
    """What whole_optimizer_state gave, under any number of processes, sharded or not."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {
        number: {
            name: shard_like(value, parameters[number]) if _has_shape_of(parameters[number], value) else value
            for name, value in state.items()
        }
        for number, state in found["state"].items()
    }
    optimizer.load_state_dict({**found, "state": states})


def _has_shape_of(parameter: torch.Tensor, value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == parameter.shape


def random_state() -> dict[str, Any]:
    """Of every generator that training may use, in this process."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    name, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def describe_run(
    arguments: TrainingArguments, data_fingerprint: str, num_steps: int, world_size: int
) -> dict[str, Any]:
    """What a checkpoint must agree with to be gone on from; see check_same_run."""
    options = {name: value for name, value in dataclasses.asdict(arguments).items() if name not in FREE}
    return {
        **options,
        "data": data_fingerprint,
        "num_steps": num_steps,
        "world_size": world_size,
        "batches_per_step": options.pop("gradient_accumulation_steps") * world_size,
    }


def check_same_run(before: dict[str, Any], now: dict[str, Any], say: Callable[[str], Any]) -> None:
    """Say what differs from the run that a checkpoint is of. Raises ValueError if it may not."""
    changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    differences = {name: f"{name}: {before.get(name)!r} then, {now.get(name)!r} now" for name in changed}
    fixed = [differences[name] for name in changed if name in FIXED | {"data", "batches_per_step"}]
    if fixed:
        raise ValueError(
            "--resume_from_checkpoint would go on with another run:\n  " + "\n  ".join(fixed) + "\n"
            "Give the same values (gradient_accumulation_steps x processes must stay the same, data the same records), "
            "or start anew in another --output_dir."
        )
    for name in changed:
        note = "equal to float error" if name in ("world_size", "gradient_accumulation_steps") else "it will differ"
        say(f"resuming with another {differences[name]}. It is allowed; compared with a run never stopped, {note}")


def report_state(report: Report) -> dict[str, Any]:
    return {**report.as_dict(), "seen": sorted(report.seen)}


def restore_report(report: Report, state: dict[str, Any]) -> None:
    found = Report.from_dict(state)
    report.records, report.skipped, report.repaired = found.records, found.skipped, found.repaired
    report.examples, report.seen = found.examples, set(state["seen"])


class StopSignal:
    """SIGTERM or SIGINT asks for the end of this step and a checkpoint; a second SIGINT ends at once."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def _flush(path: Path) -> None:
    """A file's content, or a folder's entries, to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


NONE = "none"


LOSS = "loss"


@dataclass
class EarlyStopping:
    """metric: what decides, loss or one of the judged ones; "none": nothing does. patience: evaluations in a row
    without a better one until the run stops; 0: it never does.

    value, step: of the best one. misses: evaluations since. What is known here belongs into a checkpoint."""

    metric: str = NONE
    patience: int = 0
    value: float | None = None
    step: int = 0
    misses: int = 0

    def update(self, step: int, values: dict[str, float]) -> bool:
        """Count an evaluation; values: its metrics by name. Returns whether it is the best so far."""
        if self.metric == NONE:
            return False
        value = values[self.metric]
        better = self.value is None or (value < self.value if self.metric == LOSS else value > self.value)
        if better and not math.isnan(value):
            self.value, self.step, self.misses = value, step, 0
            return True
        self.misses += 1
        return False

    @property
    def exhausted(self) -> bool:
        return 0 < self.patience <= self.misses

    def state(self) -> dict[str, Any]:
        return {"metric": self.metric, "value": self.value, "step": self.step, "misses": self.misses}

    def restore(self, state: dict[str, Any] | None) -> None:
        """What a checkpoint knows; nothing, if it is about another metric."""
        if state is not None and state["metric"] == self.metric:
            self.value, self.step, self.misses = state["value"], state["step"], state["misses"]
