"""Where a run trains: its device and precision, the process that launched it, and other processes.

Of several processes each has all weights (DDP), or FSDP2 shards the frozen ones over the GPUs. There a weight is a
DTensor, of which each process holds a slice. Gathering one is a collective operation: all ranks must call it."""

import ctypes
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, parse_flag_from_env, recursively_apply
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from ..environment import check_bitsandbytes, check_device, installed_version
from .arguments import Stage2Arguments, TrainingArguments

YAML = "accelerate_config.yaml"  # beside the script
TIMEOUT_VARIABLE = "CLIP_PHI_TIMEOUT_SECONDS"
TIMEOUT_SECONDS = 1800  # the first process reads and tokenises all data while the others wait
INSTEAD = "use DDP (examples/configs/ddp_8gpu.yaml) or FSDP2 (examples/configs/fsdp2_8gpu.yaml)"
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed steps inside backward() and keeps weights and optimizer to itself, so "
    "neither accumulation by tokens nor exact resuming would work",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM does not have this model",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "this loop does not support tensor, context and sequence parallelism",
}


def launcher_command(pid: int | None = None) -> list[str]:
    """The command line of `accelerate launch`, if this process is its child; else nothing."""
    import psutil  # type: ignore[import-untyped]  # accelerate needs it

    try:
        command: list[str] = psutil.Process(pid or os.getppid()).cmdline()
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


def choose_optimizer(optim: str, device: torch.device, sharded: bool = False) -> str:
    """What --optim auto means on this device; any other value is returned unchanged.

    sharded: under FSDP2, whose DTensors bitsandbytes cannot step."""
    if optim != "auto":
        return optim
    return "adam8bit" if device.type == "cuda" and not sharded else "adamw_torch_fused"


def stop_with_launcher() -> None:
    """Get SIGTERM when `accelerate launch` ends: it passes none on, and this process would train on without it."""
    if sys.platform == "linux" and launcher_command():
        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended before
            os.kill(os.getpid(), signal.SIGTERM)


def process_group_kwargs() -> list[InitProcessGroupKwargs]:
    """The timeout for Accelerator after which a process that blocks on the others ends the run.

    Raises ValueError if another engine than DDP or FSDP2 is configured."""
    for name, reason in REFUSED.items():
        if parse_flag_from_env(name):
            raise ValueError(f"{reason}: {INSTEAD}")
    text = os.environ.get(TIMEOUT_VARIABLE, str(TIMEOUT_SECONDS))
    if not text.isdigit() or int(text) == 0:
        raise ValueError(f"{TIMEOUT_VARIABLE} must be a number of seconds, not {text!r}")
    return [InitProcessGroupKwargs(timeout=timedelta(seconds=int(text)))]


def is_sharded(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.FSDP


def check_fsdp_config(accelerator: Accelerator, arguments: TrainingArguments) -> None:
    """Check what FSDP2 is configured to do, before the model is loaded.

    Accelerate turns FSDP into DDP, or one process, where it has no GPU: a line says so. Raises ValueError, with all
    problems, for what is not supported."""
    if not is_sharded(accelerator):
        if parse_flag_from_env("ACCELERATE_USE_FSDP"):
            instead = "DDP, with all weights in each process" if accelerator.num_processes > 1 else "one process"
            accelerator.print(f"FSDP was asked for, but Accelerate has it on several GPUs only: this run is {instead}")
        return
    plugin, version = accelerator.state.fsdp_plugin, accelerator.state.fsdp_plugin.fsdp_version
    quantized = isinstance(arguments, Stage2Arguments) and arguments.quantization != "none"
    is_adamw = arguments.optim in ("auto", "adamw_torch_fused")
    needs = {
        f"fsdp_version: 2, not {version}: version 1 cannot mix frozen and trained weights": version == 2,
        "fsdp_cpu_ram_efficient_loading: false: it would lose the vision tower": not plugin.cpu_ram_efficient_loading,
        "fsdp_activation_checkpointing: false (--gradient_checkpointing instead)": not plugin.activation_checkpointing,
        "fsdp_offload_params: false: it is not supported": not isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "mixed_precision: bf16 or 'no': fp16 is not supported under FSDP": accelerator.mixed_precision != "fp16",
        f"--optim adamw_torch_fused: {arguments.optim} (bitsandbytes) cannot step sharded weights": is_adamw,
        "--quantization none: quantised weights are not sharded; a GPU would hold the whole model": not quantized,
    }
    if problems := [need for need, is_met in needs.items() if not is_met]:
        raise ValueError("\n       ".join([f"FSDP needs {problems[0]}", *problems[1:], f"Or {INSTEAD}"]))


def prepare(accelerator: Accelerator, model: Any, optimizer: Any) -> tuple[Any, Any]:
    """accelerator.prepare, where FSDP2 shards all but the vision tower, decoder block by decoder block.

    The tower is small, and runs only in the processes whose samples have images: a collective in it would block for
    ever. Gradients are reduced in float32, and the loss is not rounded to bfloat16."""
    if not is_sharded(accelerator):
        return accelerator.prepare(model, optimizer)
    decoder, plugin = model.model.language_model, accelerator.state.fsdp_plugin
    plugin.ignored_modules = r"model\.vision_tower"
    # Accelerate's default is every class that some part names, and it fails for the absent ones.
    present = {type(module).__name__ for module in decoder.modules()}
    plugin.transformer_cls_names_to_wrap = sorted(present & set(decoder._no_split_modules))
    if accelerator.mixed_precision == "bf16":
        plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    # Accelerate would gather the head at each call, but the loss calls it once for each chunk of this process' tokens.
    # Hidden from Accelerate, it is gathered with the root's weights, once in a step.
    model.get_input_embeddings = model.get_output_embeddings = lambda: None
    prepared = accelerator.prepare(model, optimizer)
    del model.get_input_embeddings, model.get_output_embeddings
    model._is_fsdp_managed_module = True  # generate() continues until all processes are done
    return prepared


def trained_weights(model: Any) -> dict[str, torch.Tensor]:
    """By name, sharing memory with the model; slices if it is sharded."""
    # After an evaluation the root's weights are still unsharded, and rounded to the precision of the forward pass.
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def gather(tensor: Any, keep: bool) -> Any:
    """All of a sharded tensor on the CPU, or an empty one if this process does not keep it; all ranks call it.

    Anything else is returned unchanged."""
    if not isinstance(tensor, DTensor):
        return tensor
    found = tensor.full_tensor()
    return found.cpu() if keep else found.new_empty(0)


def shard_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process' slice of a full tensor, sharded like another one, or the tensor itself if that one is not."""
    if not isinstance(like, DTensor):
        return tensor
    # Every process has read the same file, so nothing is sent.
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def full_state_dict(accelerator: Accelerator, model: Any, merged: bool) -> dict[str, torch.Tensor] | None:
    """The weights for save_pretrained of a sharded model: the trained ones, or all; None if it is not sharded.

    All ranks call it; only the main process gets the weights."""
    if not is_sharded(accelerator):
        return None
    weights = trained_weights(model)  # also before state_dict(), since it makes the weights slices again
    return recursively_apply(gather, dict(model.state_dict()) if merged else weights, accelerator.is_main_process)
