"""Text to image with any diffusers pipeline."""

from typing import Any

import torch
from PIL import Image

from ..data.files import is_missing_folder


class TextToImage:
    """A text-to-image model, as it is shipped, with its safety checker. CUDA in half precision, or the CPU.

    model: Hub id or folder of a pipeline for AutoPipelineForText2Image.
    Raises ValueError or OSError if the model cannot be loaded, ImportError without diffusers."""

    def __init__(self, model: str, device: str | None = None):
        try:
            from diffusers import AutoPipelineForText2Image
        except ImportError as error:
            raise ImportError("image output needs diffusers: pip install 'clip-phi[draw]'") from error
        if is_missing_folder(model):
            raise ValueError(f"no text-to-image model {model}: there is no such folder, and a Hub id is user/name")
        self.model = model
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.float32 if device.startswith("cpu") else torch.float16
        self._pipeline: Any = AutoPipelineForText2Image.from_pretrained(model, dtype=dtype).to(device)

    def generate(self, text: str, seed: int = 0, size: int | None = None) -> Image.Image:
        """An image of the text; the same text, seed and size give the same image.

        size: pixels of both sides; None for the model's default.
        Raises ValueError if the text is empty, the model refuses the size, or its safety checker the image."""
        if not text.strip():
            raise ValueError("no image of an empty text")
        generator = torch.Generator("cpu").manual_seed(seed)  # on the CPU: the same noise for all devices
        output = self._pipeline(text, generator=generator, width=size, height=size)
        if any(getattr(output, "nsfw_content_detected", None) or []):
            raise ValueError(f"the safety checker of {self.model} refuses the image of {text[:60]!r}")
        return output.images[0]
