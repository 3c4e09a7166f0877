"""ONNX of the vision tower and the projector: from pixels to image features of the decoder's width."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modeling_clip_phi import ClipPhiForCausalLM

TOLERANCE = 1e-3  # of the largest feature


class _Features(nn.Module):
    def __init__(self, model: ClipPhiForCausalLM):
        super().__init__()
        self.model = model.model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model._project(self.model.get_vision_features(pixel_values))


def export_onnx(model: ClipPhiForCausalLM, folder: Path) -> dict[str, Any]:
    """Write vision.onnx, from pixel_values to image_features, both float32. The decoder is not exported.

    pixel_values are (images, 3, height, width), normalised; image_features are (images, patches, text hidden). Returns
    {"files", "largest_difference"}: of onnxruntime's features for two random images and for one, relative to the
    model's largest. Raises ImportError without the packages, ValueError if the features differ."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # torch's exporter needs it
    except ImportError as error:
        raise ImportError("ONNX needs onnx, onnxscript and onnxruntime: pip install 'clip-phi[onnx]'") from error
    logging.getLogger("torch.onnx").setLevel(
        logging.ERROR
    )  # it warns that torchvision is missing, which nothing here needs
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "vision.onnx"
    module = _Features(model.float()).eval()
    config: Any = model.config
    size = config.vision_config.image_size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    torch.onnx.export(
        module,
        (pixels,),
        str(path),
        input_names=["pixel_values"],
        output_names=["image_features"],
        dynamic_shapes={"pixel_values": {0: torch.export.Dim("images")}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )
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
