"""Batched captions: this project compared with transformers' generate and with its own 8-bit decoder.

    python benchmarks/generation.py [--json FILE]

ClipPhiForCausalLM and Hugging Face's LlavaForConditionalGeneration get the same random weights: a CLIP tower, and a
phi decoder with phi-2's vocabulary. Both generate greedily with a cache and without an end token, so both write the
same number of tokens. The tokens are compared before anything is timed. The figures are the least CPU time of several
alternating runs on one thread. FLOPs do not include 8-bit products.
"""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from training import CPU_ATTENTION, IMAGE, PATCHES, QUICK_SIZE, Size, cpu_seconds, make_models

from clip_phi.serving.int8 import quantize_decoder


def compare(size: Size, batch: int, new_tokens: int, repeats: int) -> dict[str, Any]:
    models = make_models(size, lora_r=0)
    ours: Any = models.ours.eval()
    theirs: Any = models.llava.eval()
    ours.set_attn_implementation({"text_config": "sdpa"})
    small = copy.deepcopy(ours)
    quantize_decoder(small)
    prompt = torch.tensor([[IMAGE] * PATCHES + [17, 23, 42]]).expand(batch, -1).contiguous()
    pixels = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "pixel_values": pixels}
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None}
    contenders = {"transformers": theirs, "ours": ours, "ours, int8": small}

    @torch.no_grad()
    def write(model: Any) -> torch.Tensor:
        return model.generate(**inputs, **options, pad_token_id=0)[:, prompt.shape[1] :]

    written, flops = {}, {}
    for name, model in contenders.items():
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            written[name] = write(model)
        flops[name] = counter.get_total_flops()
    if not torch.equal(written["ours"], written["transformers"]):
        raise SystemExit("the generated tokens differ")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, model in contenders.items():
            seconds[name].append(cpu_seconds(lambda model=model: write(model)))  # type: ignore[misc]
    least = {name: min(each) for name, each in seconds.items()}
    print(f"{batch} captions of {new_tokens} tokens\n{'':14}{'CPU seconds':>12}{'tokens/s':>10}{'GFLOP':>10}")
    for name, value in least.items():
        print(f"{name:14}{value:12.3f}{batch * new_tokens / value:10.1f}{flops[name] / 1e9:10.1f}")
    with torch.no_grad():
        logits, rough = (model(**inputs, logits_to_keep=1).logits[:, -1] for model in (ours, small))
    return {
        "generation_ratio": least["ours"] / least["transformers"],
        "tokens_identical": True,
        "flops_ratio": flops["ours"] / flops["transformers"],
        "int8_speed_ratio": least["ours"] / least["ours, int8"],
        "int8_logit_error": ((rough - logits).norm() / logits.norm()).item(),
        "seconds": least,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batch", type=int, default=8, help="captions in a batch (default: %(default)s)")
    parser.add_argument("--new_tokens", type=int, default=32, help="tokens of each caption (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each (default: %(default)s)")
    parser.add_argument("--hidden", type=int, help=f"width of the decoder (default: {QUICK_SIZE.hidden})")
    parser.add_argument("--layers", type=int, help=f"layers of the decoder (default: {QUICK_SIZE.layers})")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = QUICK_SIZE.with_hidden(options.hidden) if options.hidden else QUICK_SIZE
    size = size._replace(layers=options.layers) if options.layers else size
    result = compare(size, options.batch, options.new_tokens, options.repeats)
    for name, value in result.items():
        if isinstance(value, int | float):
            print(f"{name:20} {value:.4g}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
