"""GGUF for llama.cpp: the decoder as a text model (phi2, llama, qwen2, qwen3), tower and projector as an mmproj file.

Names and metadata are those of llama.cpp's loader (src/models/*.cpp, tools/mtmd/clip.cpp and models/llava.cpp). Its
projector graph is mm.0 -> GELU -> mm.2. One linear layer (W, b) passes unchanged, since gelu(x) - gelu(-x) = x for the
exact GELU and for its tanh form: mm.0 = [W; -W], [b; -b] and mm.2 = [I, -I]. A CLIP tower is that of rotation.py; one
without CLS (SigLIP) is written as it is, for there the graph takes all rows, in their order.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

from . import random_pixels
from .rotation import WideTower

# llama.cpp gives a message as a text, with a marker <__media...__> for each image, into which a server puts letters.
CHAT_TEMPLATE = Path(__file__).with_name("llama_cpp.jinja").read_text(encoding="utf-8")
# What llama.cpp and transformers call the fields of a decoder.
FIELDS = {"embedding_length": "hidden_size", "feed_forward_length": "intermediate_size"}
FIELDS |= {"block_count": "num_hidden_layers", "head_count": "num_attention_heads"}
FIELDS |= {"context_length": "max_position_embeddings", "head_count_kv": "num_key_value_heads"}
TYPES = {"float16": "F16", "float32": "F32", "q8_0": "Q8_0", "q4_0": "Q4_0"}  # as gguf calls them
# A decoder's model type: its architecture in llama.cpp, and the types of rotary embedding.
DECODERS = {
    "phi": ("phi2", ["default"]),
    "llama": ("llama", ["default", "linear", "llama3"]),
    "qwen2": ("qwen2", ["default"]),
    "qwen3": ("qwen3", ["default"]),
}
# llama.cpp's name of a pre-tokenizer: its parts in tokenizer.json, and whether whole words skip the merges. llama.cpp
# itself has no NFC, which Qwen has, and which changes few texts.
PRE_TOKENIZERS = json.loads(Path(__file__).with_name("pre_tokenizers.json").read_text(encoding="utf-8"))


def export_gguf(model: ClipPhiForCausalLM, processor: ClipPhiProcessor, folder: Path, dtype: str) -> dict[str, Any]:
    """Write text.gguf and mmproj.gguf. dtype: of matrices, a key of TYPES; vectors are float32.

    Only the decoder's matrices are quantised: in 4 bits, embedding and head still have 8, and the tower has float16.
    Returns {"files", "tensors"}: their number, each read back and compared; if quantised also "largest_difference", of
    the logits, relative to their range. Raises ValueError if llama.cpp's graphs cannot represent the model."""
    refuse_unsupported(model, processor)
    mmproj_tensors = _mmproj_tensors(model)
    rounding = _quantise(model, processor, dtype) if dtype.startswith("q") else {}
    folder.mkdir(parents=True, exist_ok=True)
    text, mmproj = folder / "text.gguf", folder / "mmproj.gguf"
    num_tensors = _write_text(model, processor, text, dtype)
    num_tensors += _write_mmproj(model, processor, mmproj_tensors, mmproj, "float16" if rounding else dtype)
    return {"files": [str(text), str(mmproj)], "tensors": num_tensors} | rounding


def _type_of(name: str, value: torch.Tensor, dtype: str) -> gguf.GGMLQuantizationType:
    # vectors stay in float32, and so does what llama.cpp adds to activations
    if value.dim() < 2 or name == "v.position_embd.weight":
        dtype = "float32"
    elif dtype == "q4_0" and name in ("token_embd.weight", "output.weight"):
        dtype = "q8_0"
    return gguf.GGMLQuantizationType[TYPES[dtype]]


@torch.no_grad()
def _quantise(model: Any, processor: Any, dtype: str) -> dict[str, float]:
    """Round the decoder's matrices to what the file will hold: rounding them again gives the same numbers."""
    ids = processor.bos_ids + [processor.image_token_id] * processor.num_image_tokens
    ids += processor.tokenizer("What is it?", add_special_tokens=False)["input_ids"]
    inputs = {"input_ids": torch.tensor([ids]), "pixel_values": random_pixels(processor)}
    before = model(**inputs).logits
    named = {"token_embd.weight": model.get_input_embeddings().weight, "output.weight": model.lm_head.weight}
    others = {name: value for name, value in model.model.language_model.named_parameters() if "layers." in name}
    for name, value in (named | others).items():
        kind = _type_of(name, value, dtype)
        if value.dim() > 1:
            if value.shape[1] % 32:
                raise ValueError(f"{dtype} has blocks of 32 columns, and {name} has {value.shape[1]} columns")
            rounded = gguf.quants.dequantize(gguf.quants.quantize(value.numpy(), kind), kind)
            value.copy_(torch.from_numpy(rounded))
    difference = (model(**inputs).logits - before).abs().max() / (before.max() - before.min())
    return {"largest_difference": difference.item()}


def refuse_unsupported(model: ClipPhiForCausalLM, processor: ClipPhiProcessor) -> None:
    config: Any = model.config
    text, vision = config.text_config, config.vision_config
    found = []
    is_phi = text.model_type == "phi"
    if text.model_type not in DECODERS:
        found.append(f"the decoder is a {text.model_type!r}; this writes {', '.join(DECODERS)}")
    elif is_phi and (text.hidden_act not in ("gelu_new", "gelu_pytorch_tanh") or text.qk_layernorm):
        found.append("PHI2 has the tanh form of GELU and no norms of queries and keys")
    elif (kind := text.rope_parameters["rope_type"]) not in DECODERS[text.model_type][1]:
        found.append(f"the decoder's rotary embedding is of type {kind!r}")
    elif not is_phi and (text.hidden_act != "silu" or model.lm_head.bias is not None):
        found.append("llama.cpp's graphs of llama and qwen have silu and a head without bias")
    elif getattr(text, "mlp_bias", False) or (text.model_type != "qwen2" and getattr(text, "attention_bias", False)):
        found.append("the decoder has more biases than its kind has in llama.cpp")
    elif "sliding_attention" in (getattr(text, "layer_types", None) or []):
        found.append("the decoder has sliding windows")
    if vision.model_type not in ("clip_vision_model", "siglip_vision_model"):
        found.append(f"the tower is a {vision.model_type!r}; llama.cpp's llava graph is a CLIP or SigLIP tower")
    elif vision.hidden_act not in ("quick_gelu", "gelu", "gelu_pytorch_tanh"):
        found.append(f"the tower's activation is {vision.hidden_act!r}; llama.cpp's are quick_gelu and gelu")
    elif config.vision_feature_layer in (0, -vision.num_hidden_layers - 1):
        found.append("the projector reads the tower's embedding, and llama.cpp's llava graph a layer's output")
    if config.projector_type == "norm_mlp":
        found.append("llama.cpp's llava projector has no norm")
    if config.vision_feature_select_strategy != "default" and vision.model_type == "clip_vision_model":
        found.append("the projector uses the CLS feature too, which llama.cpp's llava graph drops")
    if _pre_tokenizer(processor.tokenizer) is None:
        found.append(f"the tokenizer is not a byte-level BPE like that of {', '.join(PRE_TOKENIZERS)}")
    if processor.bos_ids not in ([], [processor.tokenizer.bos_token_id]):
        found.append("the tokenizer puts other tokens than BOS before a text")
    if found:
        raise ValueError(f"GGUF cannot represent this model: {'; '.join(found)}")


def _pre_tokenizer(tokenizer: Any) -> str | None:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = backend["pre_tokenizer"] or {}
    parts = [part | {"trim_offsets": None} for part in parts.get("pretokenizers", [parts])]
    found = {"parts": parts, "ignore_merges": backend["model"].get("ignore_merges", False)}
    found |= {"model": backend["model"]["type"], "normalizer": backend["normalizer"]}
    return next((name for name, each in PRE_TOKENIZERS.items() if each == found), None)


def _new_writer(path: Path, architecture: str, prefix: str, dtype: str, fields: dict[str, Any]) -> Any:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Clip-Phi")
    writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if dtype == 'float32' else 'MOSTLY'}_{TYPES[dtype]}"])
    for name, value in fields.items():
        getattr(writer, f"add_{prefix}{name}")(value)
    return writer


def _write_text(model: ClipPhiForCausalLM, processor: ClipPhiProcessor, path: Path, dtype: str) -> int:
    config: Any = model.config.text_config
    architecture, _ = DECODERS[config.model_type]
    heads, rope, is_phi = config.num_attention_heads, config.rope_parameters, config.model_type == "phi"
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    fields = {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()}
    fields |= {"rope_freq_base": rope["rope_theta"], "key_length": width, "value_length": width}
    fields["rope_dimension_count"] = int(width * rope.get("partial_rotary_factor", 1.0))
    fields |= {"layer_norm_eps": config.layer_norm_eps} if is_phi else {"layer_norm_rms_eps": config.rms_norm_eps}
    writer = _new_writer(path, architecture, "", dtype, fields)
    _add_tokenizer(writer, processor, config.vocab_size)

    decoder = model.model.language_model.state_dict()
    tensors = _renamed(decoder, architecture, config.num_hidden_layers, "model.", ignore=("rotary_emb",))
    if is_phi or not model.config.tie_word_embeddings:
        tensors |= {f"output.{part}": value for part, value in model.lm_head.state_dict().items()}
    if is_phi:
        tensors.setdefault("output.bias", torch.zeros(config.vocab_size))
    if architecture == "llama":
        for name, value in tensors.items():
            if name.endswith(("attn_q.weight", "attn_k.weight")):  # it rotates neighbours, transformers the two halves
                tensors[name] = value.view(-1, 2, width // 2, value.shape[1]).transpose(1, 2).reshape(value.shape)
    if rope["rope_type"] != "default":
        plain = rope["rope_theta"] ** -(torch.arange(0, width, 2) / width)
        tensors["rope_freqs.weight"] = plain / model.model.language_model.rotary_emb.inv_freq
    return _write(writer, path, tensors, dtype)


def _add_tokenizer(writer: Any, processor: Any, vocab_size: int) -> None:
    """A token for every row of the embedding; those that the tokenizer lacks are marked as unused."""
    tokenizer = processor.tokenizer
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    kinds = [gguf.TokenType.NORMAL if number in by_id else gguf.TokenType.UNUSED for number in range(vocab_size)]
    for number, token in tokenizer.added_tokens_decoder.items():
        if number < vocab_size:
            kinds[number] = gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(tokenizer))
    writer.add_token_list([by_id.get(number, f"[PAD{number}]") for number in range(vocab_size)])
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_bos_token_id(tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id)
    if tokenizer.pad_token_id < vocab_size:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(bool(processor.bos_ids))
    writer.add_chat_template(CHAT_TEMPLATE)


def _mmproj_tensors(model: ClipPhiForCausalLM) -> dict[str, torch.Tensor]:
    """Tower and projector under llama.cpp's names. Raises ValueError for a CLIP tower that WideTower refuses."""
    whole: Any = model.config
    config, layer = whole.vision_config, whole.vision_feature_layer
    layers = config.num_hidden_layers
    used = layer if layer >= 0 else layers + 1 + layer
    state = {name.removeprefix("vision_model."): value for name, value in model.model.vision_tower.state_dict().items()}
    unused = ("post_layernorm", "position_ids", "head.", *(f"encoder.layers.{index}." for index in range(used, layers)))
    tensors = _renamed(state, "mmproj", used, "vision_tower.vision_model.", ignore=unused)

    state = {name: value.float() for name, value in model.model.projector.state_dict().items()}
    first = "weight" if "weight" in state else "0.weight"
    if "v.class_embd" in tensors:
        tower = WideTower(tensors, config.num_attention_heads)
        tensors, state[first] = tower.convert(), tower.projector(state[first])
    if "weight" in state:  # a single linear layer
        one = torch.eye(len(state["weight"]))
        state = {f"0.{name}": torch.cat([value, -value]) for name, value in state.items()}
        state["2.weight"] = torch.cat([one, -one], dim=1)
    biases = {f"{number}.bias": torch.zeros(len(state[f"{number}.weight"])) for number in (0, 2)}
    return tensors | {f"mm.{name}": value for name, value in (biases | state).items()}


def _write_mmproj(model: Any, processor: Any, tensors: dict[str, torch.Tensor], path: Path, dtype: str) -> int:
    config, width = model.config.vision_config, len(tensors["v.patch_embd.weight"])
    layers = sum(name.endswith("ln1.weight") for name in tensors)
    fields: dict[str, Any] = {"embedding_length": width, "feed_forward_length": len(tensors["v.blk.0.ffn_up.weight"])}
    fields |= {"block_count": layers, "head_count": config.num_attention_heads}
    fields["attention_layernorm_eps"] = config.layer_norm_eps * config.hidden_size / width
    fields |= {name: getattr(config, name) for name in ("image_size", "patch_size")}
    fields |= {name: list(getattr(processor.image_processor, name)) for name in ("image_mean", "image_std")}
    fields |= {"projection_dim": model.config.text_config.hidden_size, "use_gelu": config.hidden_act != "quick_gelu"}
    writer = _new_writer(path, "clip", "vision_", dtype, fields)
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    # llama.cpp's default is the second-to-last layer, whichever one the model uses
    writer.add_array("clip.vision.feature_layer", [layers])
    return _write(writer, path, tensors, dtype)


def _renamed(
    state: dict[str, torch.Tensor], architecture: str, layers: int, prefix: str, ignore: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    """The tensors under llama.cpp's names. Raises ValueError for a weight that the format lacks: none is left out
    silently. prefix: of the names in the models that gguf knows."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], layers)
    renamed = {}
    for name, value in state.items():
        if any(word in name for word in ignore):
            continue
        if (theirs := names.get_name(prefix + name, (".weight", ".bias"))) is None:
            raise ValueError(f"GGUF cannot represent this model: its format lacks {name}")
        renamed[theirs] = value
    return renamed


def _write(writer: Any, path: Path, tensors: dict[str, torch.Tensor], dtype: str) -> int:
    """Write the tensors and compare the file with them. Returns their number."""
    arrays = {}
    for name, value in tensors.items():
        kind, array = _type_of(name, value, dtype), value.detach().float().cpu().numpy()
        arrays[name] = gguf.quants.quantize(np.ascontiguousarray(array), kind)
        writer.add_tensor(name, arrays[name], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_tensors(path)
    for name in found.keys() | arrays.keys():
        if not np.array_equal(found.get(name, np.nan), arrays.get(name, np.nan)):
            raise ValueError(f"{path} has another {name} than was written")
    return len(arrays)


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a GGUF file by name, in numpy's order of dimensions; quantised ones as their bytes."""
    return {each.name: np.array(each.data) for each in gguf.GGUFReader(path).tensors}
