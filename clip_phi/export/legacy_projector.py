"""A model from a projector, and an adapter, that another project trained: course notebooks, LLaVA, Lightning."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

from ..hub.retry import load_with_retries

WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "projector")  # of Lightning, and of training loops
BLOCK = re.compile(r"(?:^|\.)(pre_norm|proj\.[02])\.(weight|bias)$")  # of LLaVA's SimpleResBlock
LLAVA = "mm_projector."
WAY_OUT = "save projector.state_dict() with torch.save"


def import_projector(
    path: str, vision: str, text: str, folder: Path, *, layer: int | None = None, block: str | None = None, adapter=None
) -> dict[str, Any]:
    """Write a delta of two backbones with the projector of a file, and optionally a LoRA adapter.

    Only tensors are read from files; a pickled module, which could run any code, is refused.

    Args:
        path: a state dict (torch.save or safetensors), or a checkpoint that contains one: of a linear layer, of LLaVA's
            mm_projector.bin (linear or mlp2x_gelu), or of a linear layer and a residual block.
        vision, text: the backbones that it was trained on, folders or Hub ids. folder: of the model to write.
        layer: the hidden state of the tower that it was trained on; None is -2, LLaVA's, for a file of LLaVA, and
            otherwise -1, the last.
        block, adapter: a second file with the residual block behind the linear layer; PEFT's folder of a LoRA adapter.

    Returns {"files", "parameters"}. Raises ValueError if the files hold no such layers, other widths, or weights that
    the model would lose."""
    state = _read(path)
    if block is not None:
        state |= {f"block.{name}": value for name, value in _read(block).items()}
    processor = load_with_retries(ClipPhiProcessor.from_backbones, vision, text)
    options: dict[str, Any] = {"image_token_id": processor.image_token_id}
    options["vision_feature_layer"] = layer or (-2 if any(LLAVA in name for name in state) else -1)
    frozen = load_with_retries(ClipPhiForCausalLM.from_backbones, vision, text, **options)
    kind, weights = _find_projector(path, _without_backbones(path, state, frozen))
    options |= {"projector_type": kind, "projector_bias": any(name in weights for name in ("bias", "0.bias"))}
    model: Any = frozen if kind == "linear" and options["projector_bias"] else None
    model = model or load_with_retries(ClipPhiForCausalLM.from_backbones, vision, text, **options)
    own = model.model.projector.state_dict()
    for name, value in weights.items():
        if name not in own or value.shape != own[name].shape:
            given, wanted = (" -> ".join(map(str, reversed(each.shape))) for each in (value, own.get(name, value)))
            raise ValueError(f"{path} maps {given}, and {vision} and {text} need {wanted}")
    if missing := sorted(own.keys() - weights.keys()):
        raise ValueError(f"{path} lacks {', '.join(missing)} of a projector of type {kind!r}")
    model.model.projector.load_state_dict(weights)
    if adapter is not None:
        _load_adapter(model, Path(adapter))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return {"files": [str(folder)], "parameters": sum(value.numel() for value in weights.values())}


def _read(path: str) -> dict[str, torch.Tensor]:
    """The state dict in a file, without what else a checkpoint contains. Raises ValueError if there is none."""
    try:
        read = load_file if path.endswith(".safetensors") else torch.load
        state: Any = read(path, **({} if read is load_file else {"map_location": "cpu", "weights_only": True}))
    except FileNotFoundError as error:
        raise ValueError(f"no such file: {path}") from error
    except Exception as error:  # pickle.UnpicklingError, RuntimeError, EOFError, by what is wrong with the file
        raise ValueError(f"{path} cannot be read safely ({str(error).splitlines()[0]}): {WAY_OUT}") from error
    while isinstance(state, dict) and not all(isinstance(value, torch.Tensor) for value in state.values()):
        state = next((state[name] for name in WRAPPERS if isinstance(state.get(name), dict)), None)
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} is not the state dict of a projector: {WAY_OUT}")
    return {str(name): value.float() for name, value in state.items()}


def _without_backbones(path: str, state: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """The weights of a whole model's state that are not its backbones'. Raises ValueError if those were tuned."""
    known = dict(model.model.vision_tower.named_parameters()) | dict(model.model.language_model.named_parameters())
    known |= dict(model.lm_head.named_parameters(prefix="lm_head"))
    rest = {}
    for name, value in state.items():
        words = name.split(".")
        ends = (".".join(words[first:]) for first in range(len(words) - 1))  # the longest first
        match = next((known[end] for end in ends if end in known and known[end].shape == value.shape), None)
        if match is None:
            rest[name] = value
        elif not any(torch.equal(match.to(dtype), value.to(dtype)) for dtype in (value.dtype, torch.bfloat16)):
            what = f"{path} has another {name} than the backbones"
            raise ValueError(f"{what}: this reads a projector, not tuned backbones")
    return rest


def _find_projector(path: str, state: dict[str, torch.Tensor]) -> tuple[str, dict[str, torch.Tensor]]:
    """The projector's type, and its weights under the names of make_projector's module."""
    block = {name: match for name in state if (match := BLOCK.search(name))}
    # A linear layer may be called "proj" itself: then there is no norm beside it.
    block = block if any("pre_norm" in name for name in block) else {}
    found = {f"{match[1]}.{match[2]}": state[name] for name, match in block.items()}
    rest = {name: value for name, value in state.items() if name not in block}
    prefixes = {name.rpartition(".")[0] for name in rest}
    if len(prefixes) == 1:
        layer = {name.rpartition(".")[2]: value for name, value in rest.items()}
        if layer.keys() <= {"weight", "bias"} and "weight" in layer and layer["weight"].dim() == 2:
            if not block:
                return "linear", layer
            return "norm_mlp", _as_norm_mlp(found) | {f"0.{name}": value for name, value in layer.items()}
    elif len(prefixes) == 2 and {prefix.rpartition(".")[2] for prefix in prefixes} == {"0", "2"} and not block:
        return "mlp", {".".join(name.split(".")[-2:]): value for name, value in rest.items()}
    names = ", ".join(list(state)[:4]) or "nothing"
    kinds = "one linear layer, LLaVA's mlp2x_gelu, or one linear layer and its residual block"
    raise ValueError(f"{path} must contain {kinds}, and contains {names}")


def _as_norm_mlp(block: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """LLaVA's residual block x + B(gelu(A(x))) after a norm, as two wider layers: gelu(x) - gelu(-x) = x."""
    names = ("pre_norm", "proj.0", "proj.2")
    if block.keys() != {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}:
        raise ValueError(f"a residual block has a norm and two layers with biases, and this one {', '.join(block)}")
    zeros = torch.zeros_like(block["proj.0.bias"])
    one = torch.diag(zeros + 1)
    return {
        "1.weight": block["pre_norm.weight"],
        "1.bias": block["pre_norm.bias"],
        "2.weight": torch.cat([block["proj.0.weight"], one, -one]),
        "2.bias": torch.cat([block["proj.0.bias"], zeros, zeros]),
        "4.weight": torch.cat([block["proj.2.weight"], one, -one], dim=1),
        "4.bias": block["proj.2.bias"],
    }


def _load_adapter(model: Any, folder: Path) -> None:
    """Add the LoRA adapter of a decoder alone, as PEFT saved it."""
    from peft import PeftConfig

    from modeling_clip_phi.backbones import copy_weights, refuse_missing

    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        config: Any = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{folder} has no adapter_config.json of PEFT that can be read: {error}") from error
    files = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
    path = next((each for each in files if each.is_file()), files[0])
    weights = {}
    for name, value in _read(str(path)).items():
        name = re.sub(r"^(base_model\.)?(model\.)+", "", name)
        weights[name if name.startswith("lm_head.") else f"model.language_model.{name}"] = value
    modules = {name for name, part in model.model.language_model.named_modules() if isinstance(part, torch.nn.Linear)}
    adapted = sorted({re.sub(r"\.lora_[AB].*", "", name).removeprefix("model.language_model.") for name in weights})
    if unknown := [name for name in adapted if name not in modules]:
        kind = model.config.text_config.model_type
        raise ValueError(f"{path} adapts {unknown[0]}, which a {kind!r} decoder of transformers does not have")
    # Only these layers: the tower's have the same last names.
    config.target_modules = "model.language_model.(?:" + "|".join(map(re.escape, adapted)) + ")"
    config.layers_to_transform, config.inference_mode = None, True
    if settings.get("modules_to_save"):
        raise ValueError(f"{folder} also holds whole layers ({', '.join(settings['modules_to_save'])}), not LoRA alone")
    model.add_adapter(config)
    refuse_missing(path, copy_weights(path, weights, model.adapter_weights()))
