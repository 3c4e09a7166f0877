"""Text to image, through any pipeline of diffusers."""

from pathlib import Path
from typing import Any

from PIL import Image


class Drawer:
    """A text-to-image model on one device: CUDA if there is one (in its half precision), else the CPU.

    model: Hub id or folder of a pipeline that AutoPipelineForText2Image knows. Its safety checker, and all its other
    settings, are left as the model ships them. Raises ValueError or OSError if it cannot be loaded, and ImportError
    without diffusers."""

    def __init__(self, model: str, device: str | None = None):
        try:
            from diffusers import AutoPipelineForText2Image
        except ImportError as error:
            raise ImportError("drawing needs diffusers: pip install 'clip-phi[draw]'") from error
        import torch

        if not Path(model).is_dir() and (model.count("/") != 1 or model.startswith((".", "/", "~"))):
            raise ValueError(f"no drawing model {model}: there is no such folder, and a Hub id is user/name")
        self.model = model
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = torch.float32 if self.device.type == "cpu" else torch.float16
        self._pipeline: Any = AutoPipelineForText2Image.from_pretrained(model, dtype=dtype).to(self.device)

    def draw(self, text: str, seed: int = 0, size: int | None = None) -> Image.Image:
        """The same picture for the same text, seed and size. size: pixels of both sides; None for the model's own.

        Raises ValueError if the text is empty, the size is none of this model, or its safety checker refuses."""
        import torch

        if not text.strip():
            raise ValueError("there is nothing to draw: the text is empty")
        generator = torch.Generator("cpu").manual_seed(
            seed
        )  # on the CPU, so that all devices begin with the same noise
        drawn = self._pipeline(text, generator=generator, width=size, height=size)
        if any(getattr(drawn, "nsfw_content_detected", None) or []):
            raise ValueError(f"the safety checker of {self.model} refuses the picture of {text[:60]!r}")
        return drawn.images[0]
