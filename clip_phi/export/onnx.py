"""ONNX of the vision tower and the projector: from pixels to image features of the decoder's width."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import onnxscript  # noqa: F401  # torch's exporter needs it
import torch
from torch import nn
from torch.export import Dim

from . import random_pixels

TOLERANCE = 1e-3  # of the largest feature
FEATURES = (["pixel_values"], ["image_features"], [{0: Dim("images")}])


class _Graph(nn.Module):
    def __init__(self, function: Callable, module: nn.Module):
        super().__init__()
        self.function, self.module = function, module

    def forward(self, *inputs: Any) -> Any:
        return self.function(self.module, *inputs)


def write_graph(
    path: Path, function: Callable, module: nn.Module, inputs: tuple, names: list, outputs: list, shapes: list
) -> None:
    """Write function(module, *inputs) as ONNX, in float32. shapes: for each input, which dimensions vary.

    The weights of a module of more than 2 GB, which a protobuf cannot hold, are in a second file beside it."""
    # it warns that torchvision is missing, which nothing here needs
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    large = sum(each.nbytes for each in (*module.parameters(), *module.buffers())) > 2e9
    options: dict[str, Any] = {"input_names": names, "output_names": outputs, "dynamic_shapes": (tuple(shapes),)}
    options |= {"dynamo": True, "external_data": large, "opset_version": 21, "verbose": False}
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        torch.onnx.export(_Graph(function, module).eval(), inputs, str(path), **options)


def image_features(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    return model.model._project(model.model.get_vision_features(pixel_values))


def export_onnx(model: Any, processor: Any, folder: Path) -> dict[str, Any]:
    """Write vision.onnx, from pixel_values to image_features, both float32. The decoder is in the export "web".

    pixel_values are (images, 3, height, width), normalised; image_features are (images, patches, text hidden). Returns
    {"files", "largest_difference"}: of onnxruntime's features for two random images and for one, relative to the
    model's largest. Raises ValueError if the features differ."""
    folder.mkdir(parents=True, exist_ok=True)
    path, model, pixels = folder / "vision.onnx", model.float().eval(), random_pixels(processor, 2)
    write_graph(path, image_features, model, (pixels,), *FEATURES)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    difference = 0.0
    with torch.no_grad():
        for images in (pixels, pixels[:1]):
            wanted = image_features(model, images)
            found = torch.from_numpy(session.run(None, {"pixel_values": images.numpy()})[0])
            difference = max(difference, ((found - wanted).abs().max() / wanted.abs().max()).item())
    if not difference < TOLERANCE:
        raise ValueError(f"{path} gives other image features (by {difference:.1%} of the largest)")
    return {"files": [str(path)], "largest_difference": difference}
