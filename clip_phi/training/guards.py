"""What can go wrong in a run: bad numbers, data that stalls, memory and disks that are full; and run.json."""

import fcntl
import math
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import recursively_apply
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from ..batching.packing import PackedBatch
from ..data.files import replace_file
from ..data.report import plain, plain_json
from ..environment import without_secrets
from .arguments import TrainingArguments
from .fsdp import gather, trained_weights

STALL_SECONDS = 60
MAX_SAVED = 10  # bad steps whose batches are saved; each holds its images
MAX_IN_A_ROW = 50  # steps without an update: a run that only skips learns nothing
TIME_FORMAT = "%Y-%m-%dT%H:%M:%S%z"
WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)  # torch.save and safetensors have their own for a full disk
GUARD_STATE = {"skipped": 0, "in_a_row": 0, "spikes": 0, "seen": 0, "mean": 0.0, "square": 0.0}


@dataclass
class NonFiniteGuard:
    """Finds steps whose loss or gradient is not finite, and losses that jump.

    folder: of the run. nan_policy: stop or skip. log: prints a line. state: steps left out in all and in a row, loss
    spikes, steps seen, mean of the loss and of its square."""

    folder: Path
    nan_policy: str
    log: Callable[[str], Any]
    state: dict[str, Any] = field(default_factory=GUARD_STATE.copy)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = dict(state)

    def is_finite_step(self, step: int, loss: float, grad_norm: float, scaled: bool) -> bool:
        """Whether loss and gradient are finite; the same on all ranks.

        scaled: the loss scaler handles a gradient that is not. Raises ValueError if too many steps in a row are not."""
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        in_a_row = self.state["in_a_row"] = 0 if finite else self.state["in_a_row"] + 1
        if in_a_row > MAX_IN_A_ROW:
            raise ValueError(f"step {step}: loss or gradient was not finite in {in_a_row} steps in a row")
        return finite or (scaled and math.isfinite(loss))

    def handle_bad_step(
        self, step: int, packs: Sequence[PackedBatch], model: Any, numbers: tuple[float, float], ranks: Any
    ) -> None:
        """Save the weights and batches of a step that is left out, and stop or continue. All ranks call it.

        numbers: loss and gradient norm. ranks: the Accelerator. Raises ValueError with --nan_policy stop."""
        loss, grad_norm = numbers
        self.state["skipped"] += 1
        place = self.folder / "not_finite" / f"step-{step:08}"
        weights = recursively_apply(gather, trained_weights(model), ranks.is_main_process)
        if self.state["skipped"] <= MAX_SAVED:
            place.mkdir(parents=True, exist_ok=True)
            about = {"step": step, "loss": loss, "grad_norm": grad_norm, "origins": [pack.origins for pack in packs]}
            inputs = [dict(pack.to(torch.device("cpu")).inputs) for pack in packs]
            torch.save(about | {"inputs": inputs}, place / f"rank-{ranks.process_index}.pt")
            if ranks.is_main_process:
                save_file(weights, place / "trained.safetensors")
        origins = ", ".join(origin for pack in packs for origin in pack.origins)
        saved = f"saved in {place}" if place.exists() else f"not saved, after {MAX_SAVED} others"
        message = f"step {step}: loss {loss}, gradient norm {grad_norm}; its samples: {origins}; {saved}"
        ranks.wait_for_everyone()
        if self.nan_policy == "stop":
            raise ValueError(message + ". --nan_policy skip leaves such steps out")
        self.log(plain(f"{message}. It is left out"))

    def spikes_at(self, loss: float) -> bool:
        """Whether a loss exceeds the mean of those before it by six standard deviations and by half of the mean."""
        state, mean, square = self.state, self.state["mean"], self.state["square"]
        deviation = math.sqrt(max(square - mean**2, 0.0))
        spike = state["seen"] >= 20 and loss > mean + max(6 * deviation, 0.5 * abs(mean))
        state["seen"] += 1
        weight = max(0.02, 1 / state["seen"])
        state["mean"] += weight * (loss - mean)
        state["square"] += weight * (loss**2 - square)
        state["spikes"] += spike
        return spike


def frozen_hashes(model: torch.nn.Module) -> dict[str, int]:
    """A hash of each frozen weight, or of this process' slice of it, by name. One changed element changes it."""
    trained = trained_weights(model)  # after which the slices of a sharded model are its own again
    frozen = {name: value.detach() for name, value in model.named_parameters() if name not in trained}
    own = {name: each.to_local() if isinstance(each, DTensor) else each for name, each in frozen.items()}
    return {name: torch.hash_tensor(value).item() for name, value in own.items()}


def check_frozen(before: dict[str, int], model: torch.nn.Module) -> None:
    """Raises ValueError if the hash of a frozen weight has changed."""
    if moved := [name for name, found in frozen_hashes(model).items() if found != before[name]]:
        why = "the saved model gets them from the original backbones, so it is not the model that was trained"
        raise ValueError(f"{len(moved)} frozen weights changed in training ({', '.join(moved[:3])}): {why}")


@contextmanager
def stalled_data_warning(describe: Callable[[], str]) -> Iterator[None]:
    """Print which data a step needs if they take too long. Raises OSError that names them if a worker has died."""
    what = f"no data for {STALL_SECONDS} s"
    timer = threading.Timer(STALL_SECONDS, lambda: print(plain(f"{what}: {describe()}"), file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        problem = f"a process that reads data has died: {describe()}"
        way_out = "If memory ran out, lower --dataloader_num_workers; --dataloader_num_workers 0 shows its error"
        raise OSError(f"{problem}. {way_out} ({str(error).splitlines()[0]})") from error
    finally:
        timer.cancel()


@contextmanager
def oom_hint(step: int, packs: Sequence[PackedBatch], device: torch.device) -> Iterator[None]:
    """Turn an out-of-memory error into a line that names a size of the forward pass that fits."""
    held, most, limit = 0, 0, None
    if device.type == "cuda":
        held, most = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        limit = torch.cuda.get_device_properties(device).total_memory
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's has no class of its own
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        tokens = max(pack.inputs["input_ids"].numel() for pack in packs)
        fits = fitting_tokens(tokens, held, most, limit)
        problem = f"step {step}: out of memory with {tokens:,} tokens in a forward pass. About {fits:,} would fit"
        way_out = f"--max_tokens_per_batch {fits}, with more --gradient_accumulation_steps"
        hint = "'clip-phi plan' computes it beforehand; --gradient_checkpointing needs less"
        raise OSError(f"{problem}: {way_out}. {hint}") from error


def fitting_tokens(tokens: int, held: int, most: int, limit: int | None) -> int:
    """Tokens that would have fitted; half of them if there is no earlier step to compute from.

    held: bytes before the step. most: peak bytes of earlier steps, which were at most as large. limit: of the card."""
    if limit is None or most <= held:
        return max(64, tokens // 2 // 64 * 64)
    per_token = (most - held) / tokens  # the earlier ones may have been smaller: too few bytes, hence the 0.85
    return max(64, min(int(0.85 * (limit - held) / per_token), int(0.9 * tokens)) // 64 * 64)


def lock_run(folder: Path) -> Any:
    """A file that is locked as long as this process lives. Raises ValueError if another one trains in the folder."""
    file = open(folder / "run.lock", "a+", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        pid = file.read().strip()
        raise ValueError(f"process {pid} trains in {folder}: stop it first, or choose another --output_dir") from error
    except OSError:  # a file system without locks
        return file
    file.truncate(0)
    print(os.getpid(), file=file, flush=True)
    return file


def check_room(folder: Path, needed: int = 0) -> None:
    """Raises OSError if the folder cannot be written or its disk has less room than the bytes needed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * 4096)
    except OSError as error:
        raise OSError(f"cannot write in {folder}: {error.strerror or error}; choose another --output_dir") from error
    free = shutil.disk_usage(folder).free
    if free < needed:
        sizes = f"{free / 1e9:.2f} GB, and training checkpoints and model need {needed / 1e9:.2f}"
        way_out = "make room, lower --save_total_limit, or choose another --output_dir"
        raise OSError(f"{folder} has room for {sizes}: {way_out}")


def room_needed(arguments: TrainingArguments, trained: int, total: int, bytes_per_weight: int) -> int:
    """Bytes of all training checkpoints and one in the making (weight and two Adam states), and of the model, or of the
    newest and the best one. trained, total: numbers of weights."""
    models = 1 if arguments.metric_for_best_model == "none" else 2
    models *= bytes_per_weight * total if arguments.merged else 4 * trained
    return 12 * trained * (arguments.save_total_limit + 1) + models


@contextmanager
def tolerate_write_errors(what: str, last: bool = False) -> Iterator[None]:
    """A disk that is full for a while costs a file, not the run; at the last step it is an error."""
    try:
        yield
    except WRITE_ERRORS as error:
        if last:
            raise OSError(f"{what} was not written: {error}") from error
        print(f"{what} was not written, and training goes on: {error}", file=sys.stderr, flush=True)


def write_run(path: Path, record: dict[str, Any]) -> None:
    """Write run.json, over that of an earlier part of the run; without tokens."""
    replace_file(path, without_secrets(plain_json(record, indent=2)) + "\n")
