"""ONNX of the vision tower and the projector: from pixels to image features of the decoder's width."""

import logging
from pathlib import Path
from typing import Any

import onnxruntime
import onnxscript  # noqa: F401  # torch's exporter needs it
import torch
from torch import nn

from modeling_clip_phi import ClipPhiForCausalLM

from . import random_pixels

TOLERANCE = 1e-3  # of the largest feature


class _Features(nn.Module):
    def __init__(self, model: ClipPhiForCausalLM):
        super().__init__()
        self.model = model.model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model._project(self.model.get_vision_features(pixel_values))


def export_onnx(model: ClipPhiForCausalLM, _: Any, folder: Path) -> dict[str, Any]:
    """Write vision.onnx, from pixel_values to image_features, both float32. The decoder is not exported.

    pixel_values are (images, 3, height, width), normalised; image_features are (images, patches, text hidden). Returns
    {"files", "largest_difference"}: of onnxruntime's features for two random images and for one, relative to the
    model's largest. Raises ValueError if the features differ."""
    # it warns that torchvision is missing, which nothing here needs
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "vision.onnx"
    module = _Features(model.float()).eval()
    pixels = random_pixels(model, 2)
    names: dict[str, Any] = {"input_names": ["pixel_values"], "output_names": ["image_features"]}
    names["dynamic_shapes"] = {"pixel_values": {0: torch.export.Dim("images")}}
    torch.onnx.export(module, (pixels,), str(path), **names, dynamo=True, external_data=False, verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    difference = 0.0
    with torch.no_grad():
        for images in (pixels, pixels[:1]):
            wanted = module(images)
            found = torch.from_numpy(session.run(None, {"pixel_values": images.numpy()})[0])
            difference = max(difference, ((found - wanted).abs().max() / wanted.abs().max()).item())
    if not difference < TOLERANCE:
        raise ValueError(f"{path} gives other image features (by {difference:.1%} of the largest)")
    return {"files": [str(path)], "largest_difference": difference}
