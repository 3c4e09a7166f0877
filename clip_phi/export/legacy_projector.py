"""A model from one saved linear layer, as the course notebooks of 2024 have it."""

from pathlib import Path
from typing import Any

import torch

from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor


def import_projector(path: str, vision: str, text: str, vision_feature_layer: int, folder: Path) -> dict[str, Any]:
    """Write a delta of two backbones with the linear layer of a .pth file (clipphi_proj.pth: 640 -> 2560).

    vision_feature_layer: -1, the last hidden state, in those notebooks; the default of training is -2. Only tensors are
    read from the file; a pickled module, which could run any code, is refused. Returns {"files", "parameters"}. Raises
    ValueError if the file has no such layer, or one of other widths."""
    state = _read(path)
    prefix = next((name.removesuffix("weight") for name, value in state.items() if value.dim() == 2), "")
    layer = {name.removeprefix(prefix): value.float() for name, value in state.items()}
    if not {"weight"} <= layer.keys() <= {"weight", "bias"} or layer["weight"].dim() != 2:
        raise ValueError(f"{path} must contain one linear layer, and contains {', '.join(state) or 'nothing'}")
    processor = ClipPhiProcessor.from_backbones(vision, text)
    model: Any = ClipPhiForCausalLM.from_backbones(
        vision,
        text,
        image_token_id=processor.image_token_id,
        vision_feature_layer=vision_feature_layer,
        projector_bias="bias" in layer,
    )
    wanted = tuple(model.model.projector.weight.shape)
    if tuple(layer["weight"].shape) != wanted:
        given = " -> ".join(map(str, reversed(layer["weight"].shape)))
        raise ValueError(f"{path} maps {given}, and {vision} and {text} need {wanted[1]} -> {wanted[0]}")
    model.model.projector.load_state_dict(layer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return {"files": [str(folder)], "parameters": sum(value.numel() for value in layer.values())}


def _read(path: str) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"no such file: {path}") from error
    except Exception as error:  # pickle.UnpicklingError, RuntimeError, EOFError, by what is wrong with the file
        raise ValueError(
            f"{path} cannot be read safely ({str(error).splitlines()[0]}): save projector.state_dict() with torch.save"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} is not the state dict of a linear layer: save projector.state_dict() with torch.save")
    return state
