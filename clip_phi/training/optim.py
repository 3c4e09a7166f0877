"""Optimizer and learning rate of the trained weights."""

from typing import Any

import torch
from transformers import get_scheduler

from .arguments import Stage2Arguments, TrainingArguments


def make_optimizer(model: torch.nn.Module, arguments: TrainingArguments, device: torch.device) -> torch.optim.Optimizer:
    """Adam over the trainable weights only, in up to four groups: projector and LoRA, with and without weight decay.

    Raises ImportError if adam8bit is wanted and bitsandbytes is not installed."""
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(("lora_" in name, parameter.dim() > 1), []).append(parameter)
    lora_learning_rate = arguments.lora_learning_rate if isinstance(arguments, Stage2Arguments) else None
    parameters = [
        {
            "params": group,
            "lr": lora_learning_rate if is_lora else arguments.learning_rate,
            "weight_decay": arguments.weight_decay if is_matrix else 0.0,
        }
        for (is_lora, is_matrix), group in groups.items()
    ]
    kind = arguments.optimizer
    if kind == "auto":
        kind = "adam8bit" if device.type == "cuda" else "adamw"
    if kind == "adamw":
        return torch.optim.AdamW(parameters, fused=True)
    try:
        from bitsandbytes.optim import Adam8bit
    except ImportError as error:
        raise ImportError("--optimizer adam8bit needs bitsandbytes: pip install 'clip-phi[cuda]'") from error
    return Adam8bit(parameters)


def make_scheduler(optimizer: torch.optim.Optimizer, arguments: TrainingArguments, num_steps: int) -> Any:
    """Warm-up over the first warmup_ratio of num_steps, then the chosen shape."""
    num_warmup_steps = int(arguments.warmup_ratio * num_steps)
    return get_scheduler(arguments.lr_scheduler, optimizer, num_warmup_steps, num_steps)
