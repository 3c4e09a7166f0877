"""Formats of other programs. Each export is read back and compared with the model."""

import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..hub.retry import load_with_retries


def export(name: str, folder: Path, to: str, dtype: str = "float16") -> dict[str, Any]:
    """Write a model in another program's format, read it back, and compare it with the model.

    name: folder or Hub id of the model, delta or merged. folder: new or empty. to: "gguf", "llava", "onnx" or "vllm".
    dtype: of gguf's matrices, "float16" or "float32".

    Returns {"files", "largest_difference"}, of gguf {"files", "tensors"}. Raises ValueError if the format cannot
    represent the model, or the written one gives other outputs; ImportError without the extra gguf or onnx."""
    from transformers.utils import logging

    from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

    logging.disable_progress_bar()
    try:
        module = import_module(f".{'llava' if to == 'vllm' else to}", __name__)
    except ImportError as error:
        raise ImportError(f"--to {to} needs more packages: pip install 'clip-phi[{to}]' ({error})") from error
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: choose another folder")
    # float32 where outputs are compared; the model's own dtype where its weights are passed on
    options: dict[str, Any] = {"dtype": "float32" if to in ("gguf", "onnx") else "auto"}
    model = load_with_retries(ClipPhiForCausalLM.from_pretrained, name, **options)
    processor = load_with_retries(ClipPhiProcessor.from_pretrained, name)
    if model.config.adapter is not None:
        with tempfile.TemporaryDirectory() as whole:  # LoRA folded in
            model.save_pretrained(whole, merged=True)
            model = ClipPhiForCausalLM.from_pretrained(whole, **options)
    return getattr(module, f"export_{to}")(model, processor, folder, **({"dtype": dtype} if to == "gguf" else {}))


def random_pixels(model: Any, images: int = 1) -> torch.Tensor:
    """float32 (images, 3, height, width), the same in each call."""
    size = model.config.vision_config.image_size
    return torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(0))
