"""What can go wrong while a run trains: what is said about it, what is kept of it, and what it survives."""

import json
import math
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..batching.packing import PackedBatch
from ..environment import without_secrets
from .fsdp import gather, local, trained_weights

STALL_SECONDS = 60
MAX_KEPT = 10  # packs of bad steps; each holds its images
MAX_IN_A_ROW = 50  # steps without an update: a run that only skips learns nothing
WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)  # torch.save and safetensors have their own for a full disk


class NonFiniteGuard:
    """Of the steps of one run: which may change the weights, and which are odd."""

    def __init__(self, folder: Path, nan_policy: str, say: Callable[[str], Any]):
        self.folder = folder / "not_finite"
        self.nan_policy = nan_policy
        self.say = say
        self.num_skipped = 0
        self.spikes = 0
        self._in_a_row = 0
        self._mean = self._square = 0.0
        self._seen = 0

    def is_finite_step(self, step: int, loss: float, grad_norm: float, scaled: bool) -> bool:
        """Whether loss and gradient are finite; the same on all ranks. scaled: a gradient that is not is the loss
        scaler's to handle. Raises ValueError if too many steps in a row are not."""
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        self._in_a_row = 0 if finite else self._in_a_row + 1
        if self._in_a_row > MAX_IN_A_ROW:
            raise ValueError(f"step {step}: loss or gradient was not finite in {self._in_a_row} steps in a row")
        return finite or (scaled and math.isfinite(loss))

    def handle_bad_step(
        self, step: int, packs: Sequence[PackedBatch], model: Any, numbers: tuple[float, float], ranks: Any
    ) -> None:
        """A step is not taken: keep what it was made of, and stop or go on. All ranks call it.

        numbers: loss and gradient norm. ranks: the Accelerator. Raises ValueError with --nan_policy stop."""
        loss, grad_norm = numbers
        self.num_skipped += 1
        place = self.folder / f"step-{step:08}"
        weights = {name: gather(value, ranks.is_main_process) for name, value in trained_weights(model).items()}
        if self.num_skipped <= MAX_KEPT:
            place.mkdir(parents=True, exist_ok=True)
            about = {"step": step, "loss": loss, "grad_norm": grad_norm, "origins": [pack.origins for pack in packs]}
            torch.save(about | {"inputs": [_on_cpu(pack) for pack in packs]}, place / f"rank-{ranks.process_index}.pt")
            if ranks.is_main_process:
                save_file({name: value.contiguous() for name, value in weights.items()}, place / "trained.safetensors")
        origins = ", ".join(origin for pack in packs for origin in pack.origins)
        message = f"step {step}: loss {loss}, gradient norm {grad_norm}; its samples: {origins}; kept in {place}"
        ranks.wait_for_everyone()
        if self.nan_policy == "stop":
            raise ValueError(message + ". --nan_policy skip leaves such steps out")
        self.say(f"{message}. It is left out")

    def spikes_at(self, loss: float) -> bool:
        """Whether a loss stands out from those before it: six standard deviations, and half of the mean, above."""
        deviation = math.sqrt(max(self._square - self._mean**2, 0.0))
        spike = self._seen >= 20 and loss > self._mean + max(6 * deviation, 0.5 * abs(self._mean))
        self._seen += 1
        weight = max(0.02, 1 / self._seen)
        self._mean += weight * (loss - self._mean)
        self._square += weight * (loss**2 - self._square)
        self.spikes += spike
        return spike


def frozen_hashes(model: torch.nn.Module) -> dict[str, int]:
    """Of each frozen weight, or of this process' slice of it, by name. One changed element changes it."""
    trained = trained_weights(model)  # after which the slices of a sharded model are its own again
    return {
        name: torch.hash_tensor(local(value.detach())).item()
        for name, value in model.named_parameters()
        if name not in trained
    }


def check_frozen(before: dict[str, int], model: torch.nn.Module) -> None:
    """Raises ValueError if a frozen weight is not what it was."""
    moved = [name for name, found in frozen_hashes(model).items() if found != before[name]]
    if moved:
        raise ValueError(
            f"{len(moved)} frozen weights changed in training ({', '.join(moved[:3])}): the saved model, which is "
            "completed from the backbones as they were, is another than the one that was trained"
        )


@contextmanager
def stalled_data_warning(describe: Callable[[], str]) -> Iterator[None]:
    """Say what is waited for when it takes too long. Raises OSError that says so if a worker has died."""
    seconds = STALL_SECONDS
    # asked for only when it is told: it reads the index
    timer = threading.Timer(
        seconds, lambda: print(f"no data for {seconds} s: {describe()}", file=sys.stderr, flush=True)
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise OSError(
            f"a process that reads data has died: {describe()}. If memory ran out, lower --dataloader_num_workers; "
            f"--dataloader_num_workers 0 shows its error ({str(error).splitlines()[0]})"
        ) from error
    finally:
        timer.cancel()


@contextmanager
def oom_hint(step: int, packs: Sequence[PackedBatch], device: torch.device) -> Iterator[None]:
    """Turn running out of memory into a line that says how large a forward pass may be."""
    tokens = max(pack.inputs["input_ids"].numel() for pack in packs)
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    most = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's has no class of its own
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        limit = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
        fits = fitting_tokens(tokens, held, most, limit)
        raise OSError(
            f"step {step}: out of memory with {tokens:,} tokens in a forward pass. About {fits:,} would fit: "
            f"--max_tokens_per_batch {fits}, with more --gradient_accumulation_steps. "
            "'clip-phi plan' counts it beforehand; --gradient_checkpointing needs less"
        ) from error


def fitting_tokens(tokens: int, held: int, most: int, limit: int | None) -> int:
    """Tokens that would have fitted. held: bytes before the step. most: the peak of earlier steps, which were at most
    as large; without such, half of the tokens."""
    if limit is None or most <= held:
        return max(64, tokens // 2 // 64 * 64)
    per_token = (most - held) / tokens  # the earlier ones may have been smaller: too few bytes, hence the 0.85
    return max(64, min(int(0.85 * (limit - held) / per_token), int(0.9 * tokens)) // 64 * 64)


def check_room(folder: Path, needed: int = 0) -> None:
    """Raises OSError if the folder cannot be written or its disk has less room than the bytes needed."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write in {folder}: {error.strerror or error}; choose another --output_dir") from error
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder} has room for {free / 1e9:.2f} GB, and checkpoints and model need {needed / 1e9:.2f}: make room, "
            "lower --save_total_limit, or choose another --output_dir"
        )


def room_needed(trained: int, total: int, keep: int, merged: bool, bytes_per_weight: int, models: int = 1) -> int:
    """Bytes of --save_total_limit training checkpoints and one in the making (weight and two Adam states), and of the
    model, or of the newest and the best one."""
    return 12 * trained * (keep + 1) + models * (bytes_per_weight * total if merged else 4 * trained)


@contextmanager
def tolerate_write_errors(what: str, last: bool) -> Iterator[None]:
    """A disk that is full for a while costs a file, not the run; what is written at the last step is an error."""
    try:
        yield
    except WRITE_ERRORS as error:
        if last:
            raise OSError(f"{what} was not written: {error}") from error
        print(f"{what} was not written, and training goes on: {error}", file=sys.stderr, flush=True)


def write_run(path: Path, record: dict[str, Any]) -> None:
    """run.json: written aside and renamed, over what an earlier part of the same run wrote; without access tokens."""
    aside = path.with_suffix(".making")
    text = without_secrets(json.dumps(record, indent=2, ensure_ascii=False))
    aside.write_text(text + "\n", encoding="utf-8")
    os.replace(aside, path)


def _on_cpu(pack: PackedBatch) -> dict[str, Any]:
    return dict(pack.to(torch.device("cpu")).inputs)
