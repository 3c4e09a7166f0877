"""Formats of other programs. Each export is read back and compared with the model."""

import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..hub.retry import load_with_retries

# Of weights; the first is the default.
DTYPES = {"gguf": ["float16", "float32", "q8_0", "q4_0"], "web": ["int8", "float32", "int4"]}


def export(name: str, folder: Path, to: str, dtype: str | None = None, packages: str | None = None) -> dict[str, Any]:
    """Write a model in another program's format, read it back, and compare it with the model.

    name: folder or Hub id of the model, delta or merged. folder: new or empty. to: "gguf", "llava", "onnx", "vllm" or
    "web". dtype: of weights, see DTYPES. packages: for "web", a node_modules folder.

    Returns {"files", "largest_difference"}; of gguf {"files", "tensors"}, and the difference if quantised. Raises
    ValueError if the format cannot represent the model, or the written one gives other outputs; ImportError without the
    extra gguf or onnx."""
    from transformers.utils import logging

    from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

    logging.disable_progress_bar()
    known = DTYPES.get(to, [])
    if dtype and dtype not in known:
        raise ValueError(f"--to {to} takes no --dtype {dtype}" + (f", but {' or '.join(known)}" if known else ""))
    if packages and to != "web":
        raise ValueError("--packages requires --to web")
    extra = "onnx" if to == "web" else to
    try:
        module = import_module(f".{'llava' if to == 'vllm' else to}", __name__)
    except ImportError as error:
        raise ImportError(f"--to {to} needs more packages: pip install 'clip-phi[{extra}]' ({error})") from error
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: choose another folder")
    # float32 where outputs are compared; the model's own dtype where its weights are passed on
    options: dict[str, Any] = {"dtype": "float32" if to in ("gguf", "onnx", "web") else "auto"}
    model = load_with_retries(ClipPhiForCausalLM.from_pretrained, name, **options)
    processor = load_with_retries(ClipPhiProcessor.from_pretrained, name)
    if model.config.adapter is not None:
        with tempfile.TemporaryDirectory() as whole:  # LoRA folded in
            model.save_pretrained(whole, merged=True)
            model = ClipPhiForCausalLM.from_pretrained(whole, **options)
    more: dict[str, Any] = {"dtype": dtype or known[0]} if known else {}
    more |= {"packages": packages} if to == "web" else {}
    return getattr(module, f"export_{to}")(model, processor, folder, **more)


def random_pixels(processor: Any, images: int = 1) -> torch.Tensor:
    """Pixel values of noise, float32 (images, 3, height, width), the same in each call."""
    noise = torch.randint(256, (images, 3, 90, 120), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return processor.image_processor([*noise], return_tensors="pt")["pixel_values"]
