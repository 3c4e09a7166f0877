"""Optimizer and learning rate of the trained weights."""

from typing import Any

import torch
from transformers import get_scheduler

from .arguments import Stage2Arguments, TrainingArguments


def make_optimizer(model: torch.nn.Module, arguments: TrainingArguments, device: torch.device) -> torch.optim.Optimizer:
    """Adam over the trainable weights only, in up to four groups: projector and LoRA, with and without weight decay.

    A group's "name" is projector, lora or decoder. Raises ImportError if --optim needs bitsandbytes and
    that is not installed."""
    rates = {"lora": arguments.lora_learning_rate} if isinstance(arguments, Stage2Arguments) else {}
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "lora" if "lora_" in name else "projector" if ".projector." in name else "decoder"
            rate, decay = rates.get(part, arguments.learning_rate), arguments.weight_decay * (parameter.dim() > 1)
            group = {"name": part, "params": [], "lr": rate, "weight_decay": decay}
            groups.setdefault((part, parameter.dim() > 1), group)["params"].append(parameter)
    parameters, kind = list(groups.values()), choose_optimizer(arguments.optim, device)
    if kind == "adamw_torch_fused":
        return torch.optim.AdamW(parameters, fused=True)
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise ImportError(f"--optim {kind} needs bitsandbytes: pip install 'clip-phi[cuda]'") from error
    return _in_one_stream({"adam8bit": optim.Adam8bit, "paged_adam8bit": optim.PagedAdam8bit}[kind])(parameters)


def _in_one_stream(base: Any) -> Any:
    """An optimizer of bitsandbytes without its synchronisation with the device after each parameter.

    Its kernels run in the stream of those before and after them. Only paged states may move meanwhile: then the device
    is synchronised once, at the end. And paged states that are loaded stay paged."""
    from bitsandbytes.optim import optimizer

    class InOneStream(base):
        def step(self, closure: Any = None) -> Any:
            synchronize, optimizer.sync_gpu = optimizer.sync_gpu, lambda tensor: None
            try:
                loss = super().step(closure)
            finally:
                optimizer.sync_gpu = synchronize
            if self.is_paged:
                synchronize(self.param_groups[0]["params"][0])
            return loss

        def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
            super().load_state_dict(state_dict, move_to_device)
            for parameter, state in self.state.items():
                for name in ("state1", "state2") if self.is_paged else ():
                    state[name] = self.get_state_buffer(parameter, dtype=state[name].dtype).copy_(state[name])

    InOneStream.__name__ = base.__name__
    return InOneStream


def choose_optimizer(optim: str, device: torch.device, sharded: bool = False) -> str:
    """What --optim auto means on this device; any other value is returned unchanged.

    sharded: under FSDP2, whose DTensors bitsandbytes cannot step."""
    if optim != "auto":
        return optim
    return "adam8bit" if device.type == "cuda" and not sharded else "adamw_torch_fused"


def make_scheduler(optimizer: torch.optim.Optimizer, arguments: TrainingArguments, num_steps: int) -> Any:
    """Warm-up over the first warmup_ratio of num_steps, then the chosen shape."""
    return get_scheduler(arguments.lr_scheduler_type, optimizer, int(arguments.warmup_ratio * num_steps), num_steps)
