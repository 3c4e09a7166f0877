"""Versions, machine and devices of a run; memory and peak FLOP/s of a device."""

import json
import math
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement

PACKAGES = (
    *("clip-phi", "torch", "transformers", "accelerate", "peft", "bitsandbytes", "datasets", "huggingface_hub"),
    *("safetensors", "tokenizers", "pyarrow", "numpy", "pillow", "simplejpeg"),
)
GB = 10**9
VARIABLES = ("CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "WANDB_MODE")
# What access tokens of the Hub look like; see without_secrets.
SECRET = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}\b")
# What the number of an option must be, on either command line.
BOUNDS: dict[str, Callable[[float], bool]] = {
    "at least 1": lambda value: value >= 1,
    "at least 0": lambda value: 0 <= value < math.inf,
    "more than 0": lambda value: 0 < value < math.inf,
    "more than 0 and at most 1": lambda value: 0 < value <= 1,
    "between 0 and 1": lambda value: 0 <= value <= 1,
    "at least 0 and less than 1": lambda value: 0 <= value < 1,
}


class Gpu(NamedTuple):
    """torch_name: a word, or several, of its name in torch. tflops: dense peak of dtype, sums in float32. memory: GiB.

    key: of `clip-phi plan`, or several, with the title there. has_varlen: attention with a kernel of variable length,
    not SDPA."""

    torch_name: str
    tflops: float
    key: str = ""
    title: str = ""
    memory: float = 0.0
    dtype: str = "bfloat16"
    has_varlen: bool = True


# The first whose name fits counts.
GPUS = tuple(Gpu(*row) for row in json.loads(Path(__file__).with_name("gpus.json").read_text(encoding="utf-8"))["gpus"])


def find_gpu(name: str) -> Gpu | None:
    """The first of GPUS that a device's name in torch names: an L40 is no L4."""
    return next((gpu for gpu in GPUS if re.search(rf"\b{gpu.torch_name}\b", name)), None)


class Check(NamedTuple):
    """status: ok, note (it works, with a limit) or problem. remedy: what to do; empty if ok."""

    status: str
    name: str
    found: str
    remedy: str = ""


def check(name: str, found: str, is_ok: bool, remedy: str, status: str = "note") -> Check:
    """A Check that is ok, or else of this status with this remedy."""
    return Check("ok", name, found) if is_ok else Check(status, name, found, remedy)


def check_device() -> Iterator[Check]:
    """The CUDA devices, or why there is none."""
    import torch

    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(number)
        free, total = torch.cuda.mem_get_info(number)
        found = f"{torch.cuda.get_device_name(number)}, {free / GB:.1f} of {total / GB:.1f} GB free"
        if torch.version.hip is None and not has_kernels(major, minor, torch.cuda.get_arch_list()):
            found += f"; torch {torch.__version__} has no kernels for its capability {major}.{minor}"
            remedy = "install a torch build for an older CUDA: https://pytorch.org/get-started/previous-versions"
            yield Check("problem", f"cuda:{number}", found, remedy)
            continue
        if major < 8:
            found += f"; capability {major}.{minor} emulates bf16, and has no attention kernel for packs"
        yield check(f"cuda:{number}", found, major >= 8, "accelerate launch --mixed_precision fp16")
    if torch.cuda.is_available():
        return
    other = next((name for name in ("xpu", "mps") if getattr(torch, name).is_available()), None)
    if other is not None:
        yield Check("note", "device", f"{other}: training needs CUDA or the CPU", "export ACCELERATE_USE_CPU=true")
    elif shutil.which("nvidia-smi") is None:
        remedy = "enough for the demo; 'clip-phi plan' gives the needs of the real model"
        yield Check("note", "device", "the CPU: there is no NVIDIA driver", remedy)
    elif os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        yield Check("note", "device", "the CPU: CUDA_VISIBLE_DEVICES hides the GPU", "unset CUDA_VISIBLE_DEVICES")
    elif torch.version.cuda is None:
        found = f"nvidia-smi is installed, but torch {torch.__version__} is built without CUDA"
        yield Check("problem", "device", found, "install a CUDA build: https://pytorch.org/get-started/locally")
    else:
        found = f"nvidia-smi is installed, but torch, built for CUDA {torch.version.cuda}, finds no GPU"
        yield Check("problem", "device", found, "update the NVIDIA driver; a container needs docker run --gpus all")


def has_kernels(major: int, minor: int, architectures: list[str]) -> bool:
    """Whether a build for these, such as sm_80 or compute_90, runs on a device of this capability.

    Machine code runs on later devices of the same generation, PTX on all later ones."""
    built = [(kind, divmod(int(x), 10)) for kind, x in re.findall(r"(sm|compute)_(\d+)", " ".join(architectures))]
    fits = ((kind == "compute" or at[0] == major) and at <= (major, minor) for kind, at in built)
    return not architectures or any(fits)


def check_bitsandbytes() -> Iterator[Check]:
    """Nothing if it is absent: check_packages reports that."""
    if installed_version("bitsandbytes") is None:
        return
    import torch
    from bitsandbytes import cextension

    is_ok = cextension.lib.compiled_with_cuda or not torch.cuda.is_available()
    found = "on CUDA" if torch.cuda.is_available() else "on the CPU, for tests"
    found = found if is_ok else f"bitsandbytes has no library for CUDA {torch.version.cuda}"
    remedy = "pip install --upgrade bitsandbytes; until then --optim adamw_torch_fused without --quantization"
    yield check("8-bit optimizer", found, is_ok, remedy, "problem")


def cpu_cores() -> int:
    """Cores that this process may use: fewer than the machine has in many containers and Slurm jobs."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def describe_environment() -> dict[str, Any]:
    """For a json file: installed versions, machine, git commit, devices. No secrets."""
    import torch

    return {
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := installed_version(name))},
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": cpu_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "devices": [
            {"name": found.name, "memory_bytes": found.total_memory, "capability": f"{found.major}.{found.minor}"}
            for found in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ],
        "cuda": torch.version.cuda,
        "git_commit": git_commit(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def quantization_config(kind: str, compute_dtype: Any) -> Any:
    """transformers' configuration of bitsandbytes weights. Source of nf4, quantised twice: QLoRA, arXiv 2305.14314.

    kind: nf4 (4 bits) or int8. compute_dtype: torch dtype in which 4-bit weights are multiplied. Raises ImportError if
    bitsandbytes is not installed."""
    from transformers import BitsAndBytesConfig

    if not find_spec("bitsandbytes"):
        raise ImportError(f"--quantization {kind} needs bitsandbytes: pip install 'clip-phi[cuda]'")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": compute_dtype}
    return BitsAndBytesConfig(load_in_4bit=True, **nf4)


def without_secrets(text: str) -> str:
    """The text without access tokens, which a path or an option may contain."""
    return SECRET.sub("(a token)", text)


def requirements() -> dict[str, str]:
    """What the package needs without extras, as pip writes it, by name: {"peft": "peft>=0.20"}."""
    needed = [each for each in map(Requirement, requires("clip-phi") or []) if each.marker is None]
    return {each.name: each.name + ",".join(sorted(map(str, each.specifier), reverse=True)) for each in needed}


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit of the checkout with this file, and "+changes" if it has any; None outside of a checkout."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    how: Any = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "check": True, "timeout": 10}
    try:
        return str(subprocess.run(command, **how).stdout.strip())
    except (OSError, subprocess.SubprocessError):
        return None


def find_device(name: Any) -> Any:
    """The torch device of this name. Raises ValueError if it is not on this machine."""
    import torch

    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error


def peak_memory_bytes(device: Any) -> int:
    """Peak memory of this process: allocated on a CUDA device, or resident on the CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_flops(device: Any) -> float | None:
    """Peak FLOP/s of the device in half precision; None if unknown."""
    import torch

    gpu = find_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return gpu.tflops * 1e12 if gpu is not None else None


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)", path.read_text(encoding="utf-8"), re.M) if path.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()
