"""Where a run trains: the device that it needs, the precision of its products, and the process that launched it."""

import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import parse_flag_from_env

from ..environment import check_bitsandbytes, check_device, installed_version
from .arguments import Stage2Arguments, TrainingArguments
from .optim import choose_optimizer

YAML = "accelerate_config.yaml"  # beside the script


def launcher_command() -> list[str]:
    """The command line of `accelerate launch`, if this process is its child; else nothing."""
    import psutil  # type: ignore[import-untyped]  # accelerate needs it

    try:
        command: list[str] = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return []
    is_launcher = any("accelerate" in Path(word).name for word in command[:4]) and "launch" in " ".join(command)
    return command if is_launcher else []


def asked_precision(command: list[str], folder: Path) -> tuple[str | None, str]:
    """The precision that a launcher's option, its yaml file or the script's own one really gave, and which of them.

    command: of accelerate launch, which passes "no" on if nobody asked. folder: of the script.
    Raises ValueError if the script's own yaml asks for processes that nobody has launched."""
    from accelerate.commands.config.config_args import default_config_file

    passed = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if passed is not None and (passed != "no" or not command):
        return passed, "accelerate launch" if command else "ACCELERATE_MIXED_PRECISION"
    if any(word.split("=")[0] == "--mixed_precision" for word in command):
        return passed, "accelerate launch"
    words = [part for word in command for part in word.split("=", 1)]
    given = words[words.index("--config_file") + 1] if "--config_file" in words[:-1] else None
    path = Path(given or default_config_file) if command else folder / YAML
    if command and not path.is_file():
        path = folder / YAML
    config = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}
    if path == folder / YAML and not given:
        several = config.get("num_processes", 1) > 1 or config.get("distributed_type", "NO") not in ("NO", "MULTI_GPU")
        if several and "WORLD_SIZE" not in os.environ:
            raise ValueError(f"{path} asks for several processes: accelerate launch --config_file {path} {sys.argv[0]}")
        if config.get("use_cpu"):
            os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    return config.get("mixed_precision"), path.name


def choose_precision(arguments: TrainingArguments, folder: Path) -> tuple[str, str]:
    """What --mixed_precision means here: no, fp16 or bf16, and the line that says why. folder: of the script."""
    value: str | None = arguments.mixed_precision
    source = "--mixed_precision"
    if value == "auto":
        value, source = asked_precision(launcher_command(), folder)
    if value is None:
        if not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"):
            return "no", "mixed precision no: there is no GPU to train on"
        name = torch.cuda.get_device_name()
        if has_bf16():
            return "bf16", f"mixed precision bf16: {name} computes in it"
        return "fp16", f"mixed precision fp16: {name} only emulates bf16"
    note = ""
    if value == "bf16" and torch.cuda.is_available() and not has_bf16():
        note = f"; {torch.cuda.get_device_name()} only emulates it: --mixed_precision fp16 is several times as fast"
    return value, f"mixed precision {value}: by {source}{note}"


def has_bf16() -> bool:
    """torch's own is_bf16_supported counts emulation."""
    return torch.version.hip is not None or torch.cuda.get_device_capability() >= (8, 0)


def check_machine(arguments: TrainingArguments, accelerator: Any) -> None:
    """Refuse before any weight is loaded what would fail later; say why a run without a GPU has none.

    Raises ValueError for a device that cannot train, ImportError if bitsandbytes is needed and absent."""
    device, is_sharded = accelerator.device, parse_flag_from_env("ACCELERATE_USE_FSDP")
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"training on {device.type} is not supported: ACCELERATE_USE_CPU=true trains on the CPU")
    found = [*check_device()]
    if device.type == "cpu":
        if not parse_flag_from_env("ACCELERATE_USE_CPU") and not torch.cuda.is_available():
            for each in found:
                accelerator.print(f"no GPU is used: {each.found} -> {each.remedy}")
    elif problems := [each for each in found if each.status == "problem" and each.name == f"cuda:{device.index or 0}"]:
        raise ValueError(f"{problems[0].found} -> {problems[0].remedy}")
    elif torch.version.hip is not None:
        accelerator.print("ROCm is not tested: attention in packs is SDPA, and bitsandbytes needs its ROCm build")
    optim = choose_optimizer(arguments.optim, device, is_sharded and device.type == "cuda")
    quantization = arguments.quantization if isinstance(arguments, Stage2Arguments) else "none"
    if optim == "adamw_torch_fused" and quantization == "none":
        return
    what = f"--optim {optim}" if quantization == "none" else f"--quantization {quantization}"
    way = "--optim adamw_torch_fused" + ("" if quantization == "none" else " without --quantization")
    if installed_version("bitsandbytes") is None:
        raise ImportError(f"{what} needs bitsandbytes: pip install 'clip-phi[cuda]', or {way}")
    if device.type == "cuda" and (problems := [each for each in check_bitsandbytes() if each.status == "problem"]):
        raise ImportError(f"{what}: {problems[0].found}: pip install --upgrade bitsandbytes, or {way}")


def stop_with_launcher() -> None:
    """Get SIGTERM when `accelerate launch` ends: it passes none on, and this process would train on without it."""
    if sys.platform == "linux" and launcher_command():
        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended before
            os.kill(os.getpid(), signal.SIGTERM)
