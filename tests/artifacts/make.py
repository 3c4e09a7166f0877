"""Keep what this version saves, so that every later one is tested to load it: run it once before each release.

    python tests/artifacts/make.py

Writes tests/artifacts/VERSION/{delta,merged} and what they answer. The delta, with LoRA, stands on backbones/, which
are the demo's of 0.1.0 and never change; the merged one is tiny and in bfloat16.
"""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, PhiConfig

import modeling_clip_phi
from modeling_clip_phi import ClipPhiConfig, ClipPhiForCausalLM, ClipPhiProcessor

HERE = Path(__file__).resolve().parent
BACKBONES = [str(HERE / "backbones" / part) for part in ("vision", "text")]


def inputs(config: ClipPhiConfig, num_image_tokens: int) -> dict[str, torch.Tensor]:
    size = config.vision_config.image_size
    pixels = torch.linspace(-2, 2, 3 * size * size).reshape(1, 3, size, size)
    ids = [config.image_token_id] * num_image_tokens + list(range(1, 9))
    return {"input_ids": torch.tensor([ids]), "pixel_values": pixels}


def keep(model: ClipPhiForCausalLM, folder: Path, num_image_tokens: int, **options) -> None:
    model.eval().save_pretrained(folder, **options)
    for code in folder.glob("*.py"):
        code.unlink()  # the test loads with the code of its own version
    with torch.no_grad():
        logits = model(**inputs(model.config, num_image_tokens)).logits[0, -1].float()
    save_file({"logits": logits}, folder / "expected.safetensors")


def main() -> None:
    out = HERE / modeling_clip_phi.__version__
    if out.exists():
        sys.exit(f"{out} is there: what was released does not change")
    torch.manual_seed(0)
    processor = ClipPhiProcessor.from_backbones(*BACKBONES)
    model = ClipPhiForCausalLM.from_backbones(*BACKBONES, image_token_id=processor.image_token_id)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    keep(model, out / "delta", processor.num_image_tokens, merged=False)
    processor.save_pretrained(out / "delta")
    for code in (out / "delta").glob("*.py"):
        code.unlink()
    for path in (out / "delta").rglob("*config.json"):  # the test says where the backbones are
        text = path.read_text(encoding="utf-8")
        for backbone in BACKBONES:
            text = text.replace(json.dumps(backbone), '"elsewhere"')
        path.write_text(text, encoding="utf-8")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**small, image_size=32, patch_size=16)
    text = PhiConfig(**small, vocab_size=64, max_position_embeddings=64)
    config = ClipPhiConfig(vision_config=vision, text_config=text, image_token_id=60)
    keep(ClipPhiForCausalLM(config).to(torch.bfloat16), out / "merged", 4, merged=True)


if __name__ == "__main__":
    main()
