"""Other programs' formats: written, read back and compared with the model before they count as done."""

import tempfile
from pathlib import Path
from typing import Any

from ..hub.retry import load_with_retries


def export(checkpoint: str, folder: Path, to: str, dtype: str = "float16") -> dict[str, Any]:
    """Write a checkpoint (folder or Hub id, delta or merged) as "gguf", "llava", "onnx" or "vllm" into a new folder.

    Raises ValueError if the format cannot hold the model, or what was written gives other outputs."""
    from transformers.utils import logging

    from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

    logging.disable_progress_bar()
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: choose another folder")
    # in full precision where outputs are compared, and as it is where the checkpoint itself is passed on
    options: dict[str, Any] = {"dtype": "float32" if to in ("gguf", "onnx") else "auto"}
    model = load_with_retries(ClipPhiForCausalLM.from_pretrained, checkpoint, **options)
    processor = load_with_retries(ClipPhiProcessor.from_pretrained, checkpoint)
    if model.config.adapter is not None:
        with tempfile.TemporaryDirectory() as whole:  # LoRA folded in
            model.save_pretrained(whole, merged=True)
            model = ClipPhiForCausalLM.from_pretrained(whole, **options)
    if to == "gguf":
        from .gguf import export_gguf

        return export_gguf(model, processor, folder, dtype)
    if to == "onnx":
        from .onnx import export_onnx

        return export_onnx(model, folder)
    from .llava import export_llava, export_vllm

    return {"llava": export_llava, "vllm": export_vllm}[to](model, processor, folder)
