"""Training in many processes with Accelerate: DDP, and FSDP2, which shards the frozen weights over the GPUs.

Under FSDP2 a weight is a DTensor, of which each process holds a slice. Gathering one is a collective operation: all
ranks must call it."""

import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, parse_flag_from_env, recursively_apply
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from .arguments import Stage2Arguments, TrainingArguments

TIMEOUT_VARIABLE = "CLIP_PHI_TIMEOUT_SECONDS"
TIMEOUT_SECONDS = 1800  # the first process reads and tokenises all data while the others wait
INSTEAD = "use DDP (examples/configs/ddp_8gpu.yaml) or FSDP2 (examples/configs/fsdp2_8gpu.yaml)"
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed steps inside backward() and keeps weights and optimizer to itself, so "
    "neither accumulation by tokens nor exact resuming would work",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM does not have this model",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "this loop does not support tensor, context and sequence parallelism",
}


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
