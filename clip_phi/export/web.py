"""The model for a browser: graphs, configuration and tokenizer as transformers.js loads them, and a page that asks it.

transformers.js takes the layout of a Llava (its src/models/modeling_utils.js). vision_encoder gives image features,
which take the places of <image> among the embeddings of embed_tokens. decoder_model_merged runs a prompt with an empty
cache, and then each token with the cache of those before it."""

import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn
from torch.export import Dim
from transformers import DynamicCache

from ..templates import ENVIRONMENT, render
from . import random_pixels
from .onnx import FEATURES, TOLERANCE, image_features, write_graph

DTYPES = {"float32": "fp32", "int8": "int8", "int4": "q4"}  # as transformers.js calls them
BYTES = {"float32": 4.0, "int8": 1.2, "int4": 0.7}  # of a weight, with the scales of blocks of 32
MAX_BYTES, MAX_ROUNDING = 2e9, 0.2  # of a model in a browser; of the logits, relative to their range
PACKAGES = ["@huggingface/transformers/dist/transformers.min.js"]
PACKAGES += [f"onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.{end}" for end in ("mjs", "wasm")]
PROCESSORS = ("CLIPImageProcessor", "SiglipImageProcessor", "ViTImageProcessor", "BitImageProcessor")  # as the page's
ROWS = {0: Dim("batch_size"), 1: Dim("sequence_length")}


def export_web(model: Any, processor: Any, folder: Path, dtype: str, packages: str | None) -> dict[str, Any]:
    """Write the model in the layout of a Llava for transformers.js, and index.html, which asks it.

    dtype: of the weights, "float32", "int8" or "int4" (of the decoder; tower and embedding have 8 bits then). Matrices
        are rounded in blocks of 32 weights; activations stay float32.
    packages: a node_modules folder with @huggingface/transformers, of which three files are copied to lib/.

    Returns {"files", "largest_difference"}: of the logits after a prompt and after two more tokens, by onnxruntime,
    relative to their range. Raises ValueError for a model that these graphs cannot hold; nothing is left then."""
    model, libraries = model.float().eval(), [Path(packages) / name for name in PACKAGES] if packages else []
    past = _refuse_unsupported(model, processor, dtype, libraries)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".clip-phi-") as temporary:
        site = Path(temporary) / "site"
        (site / "onnx").mkdir(parents=True)
        paths = _write_graphs(model, processor, site / "onnx", past)
        difference, most = _compare(model, processor, paths, past), TOLERANCE
        if dtype != "float32" and difference < most:
            paths, most = _round_weights(model, paths, dtype), MAX_ROUNDING
            difference = _compare(model, processor, paths, past)
        if not difference < most:
            raise ValueError(f"the {dtype} graphs give other logits than the model, by {difference:.1%} of their range")
        write_page(model, processor, site, dtype)
        for library in libraries:
            (site / "lib").mkdir(exist_ok=True)
            shutil.copy(library, site / "lib")
        site.replace(folder)
    return {"files": [str(folder)], "largest_difference": difference}


def write_page(model: Any, processor: Any, site: Path, dtype: str) -> None:
    """Write the page, and all that transformers.js reads but the graphs."""
    values = {"config": model.config, "processor": processor, "dtype": DTYPES[dtype]}
    values |= {"generation": model.generation_config.to_diff_dict(), "area": random_pixels(processor)[0, 0].numel()}
    for name in ENVIRONMENT.list_templates(filter_func=lambda name: name.startswith("web/")):
        (site / Path(name).name).write_text("".join(render(name, **values)), encoding="utf-8")
    # engines other than transformers' do not know the blocks that mark answers for training
    processor.tokenizer.chat_template = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", processor.chat_template)
    processor.tokenizer.save_pretrained(site, save_jinja_files=False)


def _refuse_unsupported(model: Any, processor: Any, dtype: str, libraries: list[Path]) -> list[torch.Tensor]:
    """Returns the cache of three positions in two sequences. Raises ValueError for what does not run in a browser."""
    config, kind = model.config.text_config, processor.image_processor.to_dict()["image_processor_type"]
    if lost := [path for path in libraries if not path.is_file()]:
        raise ValueError(f"no file {lost[0]}: 'npm install @huggingface/transformers' makes a folder node_modules")
    if kind not in PROCESSORS:
        raise ValueError(f"the page prepares images as {', '.join(PROCESSORS)} do, not as {kind}")
    if getattr(config, "sliding_window", None):
        raise ValueError("the decoder has sliding windows, and the cache of the graph has none")
    if (size := model.num_parameters() * BYTES[dtype]) > MAX_BYTES:
        raise ValueError(f"the model would take {size / 1e9:.1f} GB, and a browser loads 2: see --dtype")
    cache = DynamicCache()
    with torch.no_grad(), suppress(Exception):  # decoders with other caches fail in their own ways
        model(input_ids=torch.zeros(2, 3, dtype=torch.long), past_key_values=cache, use_cache=True)
    past = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    lengths = [tuple(getattr(part, "shape", ()))[2:-1] for part in past]  # (sequences, heads, positions, width)
    if lengths != [(3,)] * 2 * config.num_hidden_layers:
        raise ValueError(f"the cache of a {config.model_type} decoder is not one of keys and values in each layer")
    return past


def _embed(rows: Any, input_ids: torch.Tensor) -> torch.Tensor:
    ids = input_ids.masked_fill(input_ids >= len(rows.weight), 0)  # <image> and padding need no row
    return rows.weight[ids] * rows.scale[ids]


def _decode(model: Any, inputs_embeds: Any, attention_mask: Any, position_ids: Any, past: list[torch.Tensor]) -> Any:
    """The last position's logits, then each layer's keys and values."""
    cache = DynamicCache()
    for layer in range(len(past) // 2):
        cache.update(past[2 * layer], past[2 * layer + 1], layer)
    inputs = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "position_ids": position_ids}
    logits = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return (logits, *(part for layer in cache.layers for part in (layer.keys, layer.values)))


def _write_embedding(path: Path, model: Any, rounded: bool) -> None:
    """The embedding of each token; rounded, a row is int8 with a scale."""
    embed, rows = model.get_input_embeddings(), nn.Module()
    weight = embed(torch.arange(embed.num_embeddings)).detach()  # some decoders scale it
    scale = torch.ones(len(weight), 1)
    if rounded:
        scale = weight.abs().amax(1, keepdim=True).clamp(1e-9) / 127
        weight = (weight / scale).round().to(torch.int8)
    rows.weight, rows.scale = nn.Buffer(weight), nn.Buffer(scale)
    write_graph(path, _embed, rows, (torch.zeros(2, 4).long(),), ["input_ids"], ["inputs_embeds"], [ROWS])


def _write_graphs(model: Any, processor: Any, folder: Path, past: list[torch.Tensor]) -> list[Path]:
    names = [f"{layer}.{kind}" for layer in range(len(past) // 2) for kind in ("key", "value")]
    inputs = ["inputs_embeds", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in names)]
    outputs, mask = ["logits", *(f"present.{name}" for name in names)], torch.ones(2, 7).long()
    given = (torch.zeros(2, 4, model.lm_head.in_features), mask, mask[:, 3:].cumsum(1) + 2, past)
    shapes = [ROWS, {0: ROWS[0], 1: Dim.AUTO}, ROWS, [{0: ROWS[0], 2: Dim("past_length")}] * len(past)]
    paths = [folder / f"{name}.onnx" for name in ("vision_encoder", "embed_tokens", "decoder_model_merged")]
    try:
        write_graph(paths[0], image_features, model, (random_pixels(processor, 2),), *FEATURES)
        _write_embedding(paths[1], model, rounded=False)
        write_graph(paths[2], _decode, model, given, inputs, outputs, shapes)
    except Exception as error:  # of any kind: torch runs the code of the tower and the decoder
        raise ValueError(f"torch cannot write the model as a graph: {' '.join(str(error).split())[:200]}") from error
    return paths


def _compare(model: Any, processor: Any, paths: list[Path], past: list[torch.Tensor]) -> float:
    vision, embed, decoder = (onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in paths)
    question = processor.tokenizer("What is it?", add_special_tokens=False)["input_ids"]
    prefix = processor.bos_ids + [processor.image_token_id] * processor.num_image_tokens
    ids, pixels = torch.tensor([prefix + question * 2]), random_pixels(processor)
    with torch.no_grad():
        wanted = model(input_ids=ids, pixel_values=pixels, logits_to_keep=3).logits[0].numpy()
    embeds = embed.run(None, {"input_ids": ids.numpy()})[0]
    embeds[ids.numpy() == processor.image_token_id] = vision.run(None, {"pixel_values": pixels.numpy()})[0][0]
    names, cache = [each.name for each in decoder.get_inputs()], [part[:1, :, :0].numpy() for part in past]
    start, difference = 0, 0.0
    for logits, stop in zip(wanted, range(ids.shape[1] - 2, ids.shape[1] + 1), strict=True):
        given = (embeds[:, start:stop], np.ones((1, stop), np.int64), np.arange(start, stop)[None], *cache)
        found, *cache = decoder.run(None, dict(zip(names, given, strict=True)))
        difference, start = max(difference, float(np.abs(found[0, -1] - logits).max() / np.ptp(logits))), stop
    return difference


def _round_weights(model: Any, paths: list[Path], dtype: str) -> list[Path]:
    _write_embedding(paths[1], model, rounded=True)
    # this import has logging report at level INFO
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer, logger

    logger.setLevel("ERROR")
    rounded = [path.with_stem(f"{path.stem}_{DTYPES[dtype]}") for path in paths]
    for path, target, bits in zip(paths, rounded, (8, 8, 4 if dtype == "int4" else 8), strict=True):
        quantizer = MatMulNBitsQuantizer(str(path), bits=bits, block_size=32)
        quantizer.process()
        quantizer.model.save_model_to_file(str(target), False)
        for old in path.parent.glob(f"{path.name}*"):  # its weights may be in a second file
            old.unlink()
    return rounded
