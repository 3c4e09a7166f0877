"""Many processes, by Accelerate's own engines: DDP, and FSDP2, which spreads the frozen weights over the GPUs.

Under FSDP2 a weight is a DTensor, of which each process holds a slice. To put one together is collective: all ranks
do it, or all wait.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, KwargsHandler
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from .arguments import Stage2Arguments, TrainingArguments

TIMEOUT_VARIABLE = "CLIP_PHI_TIMEOUT_SECONDS"
TIMEOUT_SECONDS = 1800  # the first process reads and tokenises all data while the others wait
INSTEAD = "use DDP (examples/configs/ddp_8gpu.yaml) or FSDP2 (examples/configs/fsdp2_8gpu.yaml)"
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed steps inside backward() and keeps weights and optimizer to itself, so "
    "neither accumulation by tokens nor exact resuming would hold",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM has no such model",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context and sequence parallelism are not made for this loop",
}


def process_group_kwargs() -> list[KwargsHandler]:
    """For Accelerator: a process that waits longer than the timeout for the others ends, and so do all.

    Raises ValueError if another engine than DDP or FSDP2 is asked for."""
    for name, reason in REFUSED.items():
        if _is_set(name):
            raise ValueError(f"{reason}: {INSTEAD}")
    text = os.environ.get(TIMEOUT_VARIABLE, str(TIMEOUT_SECONDS))
    if not text.isdigit() or int(text) == 0:
        raise ValueError(f"{TIMEOUT_VARIABLE} must be a number of seconds, not {text!r}")
    return [InitProcessGroupKwargs(timeout=timedelta(seconds=int(text)))]


def is_sharded(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.FSDP


def check_fsdp_config(accelerator: Accelerator, arguments: TrainingArguments, say: Callable[[str], Any]) -> None:
    """To be called before the model is loaded: check what FSDP2 is asked to do, and choose the optimizer for it.

    Accelerate makes DDP, or nothing, of FSDP where it has no GPU: that is said. Raises ValueError, with all problems,
    for what cannot be done."""
    if not is_sharded(accelerator):
        if _is_set("ACCELERATE_USE_FSDP"):
            instead = "DDP, with all weights in each process" if accelerator.num_processes > 1 else "one process"
            say(f"FSDP was asked for, but Accelerate has it on several GPUs only: this run is {instead}")
        return
    plugin = accelerator.state.fsdp_plugin
    problems = []
    if plugin.fsdp_version != 2:
        problems.append(f"fsdp_version: 2, not {plugin.fsdp_version}: version 1 cannot mix frozen and trained weights")
    if plugin.cpu_ram_efficient_loading:
        problems.append("fsdp_cpu_ram_efficient_loading: false: it would lose the vision tower")
    if plugin.activation_checkpointing:
        problems.append("fsdp_activation_checkpointing: false: it renames weights; --gradient_checkpointing does not")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        problems.append("fsdp_offload_params: false: it is not supported")
    if accelerator.mixed_precision == "fp16":
        problems.append("mixed_precision: bf16 or 'no': fp16 is not supported under FSDP")
    if arguments.optim not in ("auto", "adamw_torch_fused"):
        problems.append(f"--optim adamw_torch_fused: {arguments.optim} (bitsandbytes) cannot step sharded weights")
    if isinstance(arguments, Stage2Arguments) and arguments.quantization != "none":
        problems.append("--quantization none: quantised weights are not sharded; with them a GPU holds the whole model")
    if problems:
        raise ValueError("FSDP needs " + "\n       ".join(problems) + f"\n       Or {INSTEAD}")
    if arguments.optim == "auto":
        if accelerator.device.type == "cuda":
            say("--optim auto is adamw_torch_fused: bitsandbytes cannot step sharded weights")
        arguments.optim = "adamw_torch_fused"


def prepare(accelerator: Accelerator, model: Any, optimizer: Any) -> tuple[Any, Any]:
    """accelerator.prepare, after which FSDP2 has sharded all but the vision tower, decoder block by decoder block.

    The tower is small, and runs in the processes whose samples have images: a collective in it would wait for the
    others for ever. Gradients are reduced in float32, and the loss is not rounded to bfloat16."""
    if not is_sharded(accelerator):
        return accelerator.prepare(model, optimizer)
    decoder, plugin = model.model.language_model, accelerator.state.fsdp_plugin
    plugin.ignored_modules = r"model\.vision_tower"
    # Accelerate's default is every class that some part names, and it fails for those that are not there.
    present = {type(module).__name__ for module in decoder.modules()}
    plugin.transformer_cls_names_to_wrap = sorted(present & set(decoder._no_split_modules))
    if accelerator.mixed_precision == "bf16":
        plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    # Accelerate would gather the head at each call, but the loss calls it as often as this process has chunks of
    # tokens. Not known as such, it is gathered with the root's weights, once in a step.
    model.get_input_embeddings = model.get_output_embeddings = lambda: None
    prepared = accelerator.prepare(model, optimizer)
    del model.get_input_embeddings, model.get_output_embeddings
    model._is_fsdp_managed_module = True  # generate() goes on until all processes are done
    return prepared


def trained_weights(model: Any) -> dict[str, torch.Tensor]:
    """By name, sharing memory with the model; slices if it is sharded."""
    _reshard(model)
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be sharded, on its device; all ranks call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather(tensor: Any, keep: bool) -> Any:
    """All of a tensor that is sharded, on the CPU, or nothing if this process is not to keep it; all ranks call it.

    Anything else is given back as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    found = tensor.full_tensor()
    return found.cpu() if keep else found.new_empty(0)


def shard_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor, sharded as another one, or the tensor itself if that one is whole."""
    if not isinstance(like, DTensor):
        return tensor
    # Every process has read the same file: nothing is sent.
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def full_state_dict(accelerator: Accelerator, model: Any, merged: bool) -> dict[str, torch.Tensor] | None:
    """What save_pretrained needs of a sharded model: the trained weights, or all; None if it is not sharded.

    All ranks call it, and the main process gets it."""
    if not is_sharded(accelerator):
        return None
    _reshard(model)
    weights = model.state_dict() if merged else trained_weights(model)
    return {name: gather(value, accelerator.is_main_process) for name, value in weights.items()}


def _reshard(model: Any) -> None:
    # After an evaluation the root's weights are still whole, and rounded to the precision of the forward pass.
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes", "on")
