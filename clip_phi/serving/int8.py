"""8-bit linear layers for inference on a CPU: one scale for each output channel of the weights and each input token."""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from modeling_clip_phi.backbones import fold_adapter


class Int8Linear(torch.nn.Module):
    """An nn.Linear for inference with int8 weights, one scale for each output channel; input float (..., in_features).

    Each input token is quantized with its own scale (LLM.int8(), arXiv 2208.07339, without its outliers)."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        weight, scale = _quantize(linear.weight.detach().float())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.flatten())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        tokens, scale = _quantize(states.flatten(0, -2).float())
        sums = torch._int_mm(tokens, self.weight.t()) * scale * self.scale
        output = sums if self.bias is None else sums + self.bias
        return output.unflatten(0, states.shape[:-1]).to(states.dtype)


def _quantize(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 (vectors, width) and float32 (vectors, 1) whose product approximates the vectors."""
    scale = vectors.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 127
    return torch.round(vectors / scale).to(torch.int8), scale


def quantize_decoder(model: Any) -> None:
    """Quantize decoder blocks and head of a ClipPhiForCausalLM on the CPU in place, LoRA merged in, for inference."""
    fold_lora(model)
    decoder = model.model.language_model
    for name, module in list(decoder.named_modules()):
        if isinstance(module, torch.nn.Linear):
            decoder.set_submodule(name, Int8Linear(module))
    model.lm_head = Int8Linear(model.lm_head)


def fold_lora(model: Any) -> None:
    """Fold LoRA into the weights in place: each adapted layer becomes the layer that it adapts."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            folded = fold_adapter(layer, dict(layer.named_parameters(prefix=path)), prefix=path)
            base = layer.get_base_layer()
            base.weight.data = folded[f"{path}.weight"].detach()
            model.set_submodule(path, base)
