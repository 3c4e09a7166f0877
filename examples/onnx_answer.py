"""An answer by onnxruntime alone, from `clip-phi export MODEL DIR --to web`: onnx_answer.py DIR IMAGE [QUESTION]"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from jinja2 import Environment
from PIL import Image
from tokenizers import Tokenizer

folder, path, *question = Path(sys.argv[1]), *sys.argv[2:]
kinds = ("config", "preprocessor_config", "processor_config", "generation_config", "tokenizer_config")
config, pixels, processor, generation, texts = (json.loads((folder / f"{kind}.json").read_text()) for kind in kinds)
parts = [next(folder.glob(f"onnx/{name}*.onnx")) for name in ("vision_encoder", "embed_tokens", "decoder_model")]
vision, embed, decoder = (onnxruntime.InferenceSession(part, providers=["CPUExecutionProvider"]) for part in parts)
image, size, crop = Image.open(path).convert("RGB"), pixels["size"], pixels["crop_size"]
edges = [size.get("shortest_edge", 0) * side // min(image.size) for side in image.size]
image = image.resize(edges if edges[0] else (size["width"], size["height"]), pixels["resample"])
if pixels["do_center_crop"]:
    left, top = (image.width - crop["width"]) // 2, (image.height - crop["height"]) // 2
    image = image.crop((left, top, left + crop["width"], top + crop["height"]))
values = (np.asarray(image) * pixels["rescale_factor"] - pixels["image_mean"]) / pixels["image_std"]
features = vision.run(None, {"pixel_values": values.transpose(2, 0, 1)[None].astype(np.float32)})[0]
asked = question or [config["caption_instruction"]]  # null after stage 1, where an image alone asks for a caption
message = {"role": "user", "content": [{"type": "image"}, *({"type": "text", "text": each} for each in asked if each)]}
prompt = Environment().from_string(texts["chat_template"]).render(messages=[message], eos_token=texts["eos_token"])
prompt = prompt.replace(processor["image_token"], processor["image_token"] * features.shape[1])
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
ids = np.array([tokenizer.encode(prompt, add_special_tokens=processor["add_special_tokens"]).ids])
embeds, answer, length = embed.run(None, {"input_ids": ids})[0], list[int](), ids.shape[1]
embeds[ids == config["image_token_index"]] = features[0]
cache = [np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32) for each in decoder.get_inputs()[3:]]
while len(answer) < 256 and not set(answer) & set(generation["eos_token_id"]):
    given = (embeds, np.ones((1, length), np.int64), np.arange(length)[None, -embeds.shape[1] :], *cache)
    logits, *cache = decoder.run(None, dict(zip((each.name for each in decoder.get_inputs()), given, strict=True)))
    answer.append(int(logits[0, -1].argmax()))
    embeds, length = embed.run(None, {"input_ids": np.array([answer[-1:]])})[0], length + 1
print(tokenizer.decode(answer).strip())
