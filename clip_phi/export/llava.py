"""The model as a stock Llava, which needs no remote code, and for vLLM's transformers backend."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.utils import logging

from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiModel, ClipPhiProcessor
from modeling_clip_phi.backbones import measure_tower

from . import random_pixels


def export_llava(model: ClipPhiForCausalLM, processor: ClipPhiProcessor, folder: Path) -> dict[str, Any]:
    """Write the weights as a stock LlavaForConditionalGeneration, with its processor: no remote code.

    A single linear layer W becomes linear_1 = W and linear_2 = identity, without an activation. Returns
    {"files", "largest_difference"}: of the logits for a random image, after reading back. Raises ValueError if the
    decoder's head has a bias, as in phi-2; Llava's head has none."""
    config: Any = model.config
    _refuse_no_row(model, "Llava")
    if model.lm_head.bias is not None:
        problem = f"Llava's head has no bias, and this decoder's head ({config.text_config.model_type}) has one"
        raise ValueError(f"{problem}, so the logits would be wrong: use --to vllm or --to gguf, which have it")
    if config.projector_type == "norm_mlp":
        raise ValueError("Llava has no projector with a norm: use the model as it is, or --to vllm")
    # Llava's "default" drops one feature before the patches, whatever it is.
    default, full, size = copy.copy(config), copy.copy(config), config.vision_config.image_size
    default.vision_feature_select_strategy, full.vision_feature_select_strategy = "default", "full"
    extra = measure_tower(full, size, size)[0] - measure_tower(default, size, size)[0]
    strategy = config.vision_feature_select_strategy if extra else "full"
    if extra > 1 and strategy == "default":
        raise ValueError(f"Llava drops one feature before the patches, and this tower has {extra} there")
    linear = config.projector_type == "linear"
    same = ("vision_config", "text_config", "vision_feature_layer", "tie_word_embeddings")
    options = {name: getattr(config, name) for name in same} | {"image_token_index": config.image_token_id}
    options |= {"projector_hidden_act": "linear" if linear else "gelu", "vision_feature_select_strategy": strategy}
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(LlavaConfig(**options))
    kept = ("model.vision_tower.", "model.language_model.")
    state = {name: value for name, value in model.state_dict().items() if name.startswith(kept)}
    state["lm_head.weight"] = model.lm_head.weight.detach()
    projector = model.model.projector.state_dict()
    zeros = model.lm_head.weight.new_zeros(config.text_config.hidden_size)
    if linear:
        projector = {f"0.{name}": value for name, value in projector.items()} | {"2.weight": torch.diag(zeros + 1)}
    for number, own in ((1, 0), (2, 2)):
        for name in ("weight", "bias"):  # clones: two zeros, not one
            state[f"model.multi_modal_projector.linear_{number}.{name}"] = projector.get(f"{own}.{name}", zeros).clone()
    llava.load_state_dict(state, assign=True)
    llava.tie_weights()
    llava.generation_config = model.generation_config
    for part in (llava.config, llava.config.vision_config, llava.config.text_config):
        part.name_or_path = ""  # a local folder
    llava.save_pretrained(folder)
    for saved in (processor.image_processor.__dict__, processor.tokenizer.init_kwargs):
        saved.pop("auto_map", None)  # the remote code that they were loaded with
    same = ("image_processor", "tokenizer", "image_token", "chat_template")
    options = {name: getattr(processor, name) for name in same} | {"vision_feature_select_strategy": strategy}
    options |= {"patch_size": config.vision_config.patch_size, "num_additional_image_tokens": extra}  # CLS
    LlavaProcessor(**options).save_pretrained(folder)
    read_back = LlavaForConditionalGeneration.from_pretrained(folder, dtype=model.dtype).eval()
    return _compare(model, read_back, processor, folder, "logits")


def export_vllm(model: ClipPhiForCausalLM, processor: ClipPhiProcessor, folder: Path) -> dict[str, Any]:
    """Write a merged model whose AutoModel has no head, as vLLM's backend needs it; elsewhere it is the class with
    generate.

    Returns {"files", "largest_difference"}: of the hidden states for a random image, after reading back."""
    _refuse_no_row(model, "vLLM")
    model.save_pretrained(folder, merged=True)
    processor.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"]["AutoModel"] = "modeling_clip_phi.ClipPhiModel"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers reports that the head is not used
    read_back = ClipPhiModel.from_pretrained(folder, dtype=model.dtype)
    logging.set_verbosity(verbosity)
    return _compare(model.model, read_back, processor, folder, "last_hidden_state")


def _refuse_no_row(model: Any, where: str) -> None:
    if model.config.image_token_id >= (rows := model.config.text_config.vocab_size):
        way_out = f"load the model, resize_token_embeddings({rows + 8}), and save_pretrained(FOLDER, merged=True)"
        raise ValueError(f"{where} looks up <image>, which has no row of the embedding: {way_out}")


def _compare(model: Any, read_back: Any, processor: ClipPhiProcessor, folder: Path, what: str) -> dict[str, Any]:
    """Compare an output of two models for a question about a random image."""
    ids = [processor.image_token_id] * processor.num_image_tokens + processor.tokenizer("What is it?")["input_ids"]
    inputs = {"input_ids": torch.tensor([ids]), "pixel_values": random_pixels(processor).to(model.dtype)}
    with torch.no_grad():
        difference = (read_back(**inputs)[what] - model(**inputs)[what]).abs().max().item()
    if not difference <= 1e-4:
        raise ValueError(f"the model in {folder} gives other {what} (by {difference:g})")
    return {"files": [str(folder)], "largest_difference": difference}
