"""Training checkpoints, from which a run is resumed: all that changes in training, some MB, whole or absent.

A folder step-00001200 holds three files: trained.safetensors has the trained weights. state.pt has optimizer, schedule
and the random numbers of every rank. about.json has the step, the options, the states of the run's other objects, and
the size and hash of the other two files. The folder is written under another name, flushed to the disk and renamed, so
that a run may be killed at any moment."""

import dataclasses
import hashlib
import json
import math
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, recursively_apply
from safetensors.torch import load_file, save_file

from .arguments import NEWEST, OPTIONS, TrainingArguments
from .data import TrainData
from .fsdp import gather, shard_like, trained_weights
from .guards import WRITE_ERRORS

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: a signal stopped the run, and --resume_from_checkpoint continues it
FILES = ("trained.safetensors", "state.pt")
# What may not differ in a run that is resumed, and what is not compared; data and batches_per_step: of describe_run.
FIXED = {"data", "batches_per_step", *(name for name, about in OPTIONS.items() if about.get("resume") == "fixed")}
FREE = {"given", *(name for name, about in OPTIONS.items() if about.get("resume") == "free")}


@dataclass
class Checkpoints:
    """The training checkpoints of one run, in output_dir/checkpoints.

    limit: how many of the newest are kept. run: what one must agree with to be resumed from; see describe_run.
    weights: model, optimizer, scheduler. tracked: by name, all other objects whose state_dict (for json) is saved."""

    output_dir: Path
    limit: int
    accelerator: Accelerator
    run: dict[str, Any]
    weights: tuple[Any, Any, Any]
    tracked: dict[str, Any]

    def __post_init__(self) -> None:
        self.folder, self.before = self.output_dir / "checkpoints", self.output_dir / "checkpoints.before"
        self.model, self.optimizer, self.scheduler = self.weights

    def save(self, step: int) -> None:
        """All ranks call it; the main process writes. Raises OSError that names the folder if it cannot be written."""
        keep = self.accelerator.is_main_process
        weights = recursively_apply(gather, trained_weights(self.model), keep)
        scaler = self.accelerator.scaler
        state = {
            "optimizer": recursively_apply(gather, self.optimizer.state_dict(), keep),
            "scheduler": self.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "random": gather_object([random_state()]),
        }
        try:
            if keep:
                self._write(step, weights, state)
        except WRITE_ERRORS as error:
            raise OSError(f"cannot write a training checkpoint in {self.folder}: {error}") from error
        finally:
            self.accelerator.wait_for_everyone()

    def _write(self, step: int, weights: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob("making-*"):
            shutil.rmtree(leftover)
        aside = self.folder / f"making-{step:08}"
        aside.mkdir()
        save_file(weights, aside / FILES[0])
        torch.save(state, aside / FILES[1])
        about = {
            "step": step,
            "files": {name: [(aside / name).stat().st_size, _hash(aside / name)] for name in FILES},
            "run": self.run,
            "tracked": {name: each.state_dict() for name, each in self.tracked.items()},
        }
        (aside / "about.json").write_text(json.dumps(about), encoding="utf-8")
        for name in (*FILES, "about.json", "."):
            _flush(aside / name)
        place = self.folder / f"step-{step:08}"
        shutil.rmtree(place, ignore_errors=True)
        os.replace(aside, place)
        _flush(self.folder)
        for old in sorted(self.folder.glob("step-*"))[: -self.limit]:
            shutil.rmtree(old)

    def resume(self, wanted: str | None) -> int:
        """Restore everything as it was when a training checkpoint was saved, and return its step, or 0.

        wanted: NEWEST, the folder of one, or None for a new run. Those of other runs in the folder, and newer ones, are
        moved aside. Raises ValueError if it is not whole, or of a run that cannot be continued by this one."""
        if wanted not in (None, NEWEST) and Path(wanted).resolve().parent == self.before.resolve():
            raise ValueError(f"--resume_from_checkpoint {wanted}: move it out of {self.before}, which is replaced")
        step, kept = 0, 0
        for place, about in _whole(self.folder, wanted, self.accelerator.print):
            check_same_run(about["run"], self.run, self.accelerator.print)
            self._restore(place)
            for name, each in self.tracked.items():
                each.load_state_dict(about["tracked"][name])
            step = about["step"]
            kept = step if place.resolve().parent == self.folder.resolve() else 0
            self.accelerator.print(f"resuming from {place}, after step {step:,} of {self.run['num_steps']:,}")
            break
        if wanted == NEWEST:
            return step
        self.accelerator.wait_for_everyone()  # until all have read theirs
        later = [place for place in self.folder.glob("step-*") if int(place.name.removeprefix("step-")) > kept]
        if self.accelerator.is_main_process and later:
            shutil.rmtree(self.before, ignore_errors=True)
            self.before.mkdir()
            for place in later:
                os.replace(place, self.before / place.name)
            self.accelerator.print(f"the training checkpoints of an earlier run are moved to {self.before}")
        self.accelerator.wait_for_everyone()
        return step

    def _restore(self, place: Path) -> None:
        """Raises ValueError if the trained weights are others."""
        weights = load_file(place / FILES[0])
        own = trained_weights(self.model)
        if weights.keys() != own.keys():
            odd = sorted(weights.keys() ^ own.keys())
            raise ValueError(f"{place} holds other trained weights than this run has: {', '.join(odd[:3])}, ...")
        for name, value in own.items():
            value.copy_(shard_like(weights[name], value))
        state = torch.load(place / FILES[1], map_location="cpu", weights_only=True)
        decays, rates = [group["weight_decay"] for group in self.optimizer.param_groups], list(self.scheduler.base_lrs)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for number, moments in state["optimizer"]["state"].items():
            for name, value in moments.items():
                if isinstance(value, torch.Tensor) and value.shape == parameters[number].shape:
                    moments[name] = shard_like(value, parameters[number])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        # The options of now, which may be others, at the place in the schedule of then.
        self.scheduler.base_lrs = rates
        factors = [function(self.scheduler.last_epoch) for function in self.scheduler.lr_lambdas]
        for group, rate, factor, decay in zip(self.optimizer.param_groups, rates, factors, decays, strict=True):
            group |= {"initial_lr": rate, "lr": rate * factor, "weight_decay": decay}
        self.scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if len(state["random"]) == self.accelerator.num_processes:
            restore_random_state(state["random"][self.accelerator.process_index])


def saved_run(output_dir: Path, wanted: str | None) -> dict[str, Any] | None:
    """What describe_run said of the run that is resumed, if it is: of the newest training checkpoint, or the named."""
    return next((about["run"] for _, about in _whole(output_dir / "checkpoints", wanted, lambda text: None)), None)


def _whole(folder: Path, wanted: str | None, log: Callable[[str], Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The training checkpoints that may be resumed and their about.json, the newest first; see Checkpoints.resume."""
    places = sorted(folder.glob("step-*"), reverse=True) if wanted == NEWEST else [Path(wanted)] if wanted else []
    for place in places:
        try:
            about = json.loads((place / "about.json").read_text(encoding="utf-8"))
            for name, expected in about["files"].items():
                if [(place / name).stat().st_size, _hash(place / name)] != expected:
                    raise ValueError(f"{name} is not what was written")
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:  # no object, too
            if wanted != NEWEST:
                what = "is not a whole training checkpoint"
                raise ValueError(f"--resume_from_checkpoint {place} {what}: {error}") from error
            log(f"{place} is not whole and is passed over: {error}")
        else:
            yield place, about


def random_state() -> dict[str, Any]:
    """Of every generator that training may use, in this process."""
    state: Any = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (state[0], state[1].tolist(), *state[2:]),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) and torch.cuda.is_available():
        states = state["cuda"]  # earlier versions saved those of all devices
        number = min(torch.cuda.current_device(), len(states) - 1)
        torch.cuda.set_rng_state(states if torch.is_tensor(states) else states[number])


def describe_run(arguments: TrainingArguments, data: TrainData, world_size: int) -> dict[str, Any]:
    """What a training checkpoint must agree with to be resumed from; see check_same_run."""
    options = {name: value for name, value in dataclasses.asdict(arguments).items() if name not in FREE}
    batches = {"world_size": world_size, "batches_per_step": arguments.gradient_accumulation_steps * world_size}
    return {**options, "data": data.fingerprint, "num_steps": data.num_steps, **batches}


def check_same_run(before: dict[str, Any], now: dict[str, Any], log: Callable[[str], Any]) -> None:
    """Log what differs from the run of a training checkpoint. Raises ValueError if it must not differ."""
    names = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    differences = {name: f"{name}: {before.get(name)!r} then, {now.get(name)!r} now" for name in names}
    if fixed := [text for name, text in differences.items() if name in FIXED]:
        problem = "\n  ".join(["--resume_from_checkpoint would continue another run:", *fixed])
        rule = "gradient_accumulation_steps x processes must stay the same, data the same records"
        raise ValueError(f"{problem}\nGive the same values ({rule}), or start a new run in another --output_dir.")
    for name, text in differences.items():
        same = name in ("world_size", "gradient_accumulation_steps")
        note = "equal up to float error to" if same else "different from"
        log(f"resuming with another {text}. It is allowed; the result will be {note} that of an uninterrupted run")


class StopSignal:
    """SIGTERM or SIGINT ends the run after this step, with a training checkpoint; a second SIGINT ends it at once."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True


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


@dataclass
class EarlyStopping:
    """The best evaluation so far, its value at step, and the number of evaluations since: misses.

    metric: decides which is better, loss or a metric of --eval_task; "none": nothing does. patience: evaluations in a
    row without a better one until the run stops; 0: it never does."""

    metric: str = "none"
    patience: int = 0
    value: float | None = None
    step: int = 0
    misses: int = 0

    def update(self, step: int, values: dict[str, float]) -> bool:
        """Count an evaluation; values: its metrics by name. Returns whether it is the best so far."""
        if self.metric == "none":
            return False
        value = values[self.metric]
        better = self.value is None or (value < self.value if self.metric == "loss" else value > self.value)
        if better and not math.isnan(value):
            self.value, self.step, self.misses = value, step, 0
            return True
        self.misses += 1
        return False

    @property
    def exhausted(self) -> bool:
        return 0 < self.patience <= self.misses

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "patience"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state, unless it is about another metric."""
        if state["metric"] == self.metric:
            vars(self).update(state)
