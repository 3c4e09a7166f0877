"""Which decoders and towers are right: each family, tiny and with random weights, against its own plain form.

    python tests/backbones.py --json OUT.json --page docs/backbones.md

Of a decoder: the loss of packed samples against each conversation alone in the decoder's own attention, the logits of
a delta and of a merged model after reloading, generation with the cache and in a batch (by transformers and by the
engine) against the whole sequence each time. Of a tower: the number of features of an image. A family that cannot be
right is refused, by the line in "refused". test_backbones.py holds all of them to their bounds.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import VISION, save_tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from clip_phi.batching.attention import PACKED_ATTENTION, refuse_other_attention
from clip_phi.batching.encode import Encoded
from clip_phi.batching.packing import build_shared_prefix, pack_samples
from clip_phi.serving.engine import Engine
from clip_phi.tools.plan import make_plan
from clip_phi.training.arguments import Stage1Arguments
from clip_phi.training.memory import CARDS
from modeling_clip_phi import ClipPhiConfig, ClipPhiForCausalLM, ClipPhiProcessor
from modeling_clip_phi.backbones import measure_tower
from modeling_clip_phi.configuration_clip_phi import PHI_2, TINYCLIP

# Fields of decoders' configs for a tiny one; a config gets those that it has.
TINY: dict[str, Any] = {"vocab_size": 320, "hidden_size": 32, "word_embed_proj_dim": 32, "intermediate_size": 64}
TINY |= {"ffn_dim": 64, "n_inner": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
TINY |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
TINY |= {"max_position_embeddings": 256, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
TINY |= {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16}
TINY |= {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12, "state_size": 8}
TINY |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
TINY |= {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "rotary_dim": 4}
TINY |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
WINDOW = {"sliding_window": 8}  # shorter than each sample
MIXED = WINDOW | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

# Family: its model type, and what differs from TINY.
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Phi": ("phi", {}),
    "Phi-3, sliding window": ("phi3", WINDOW),
    "Llama": ("llama", {}),
    "Llama without a spare row (SmolLM2)": ("llama", {"vocab_size": 300, "tie_word_embeddings": True}),
    "SmolLM3": ("smollm3", {}),
    "Qwen2": ("qwen2", {}),
    "Qwen2, mixed windows": ("qwen2", MIXED | {"use_sliding_window": True}),
    "Qwen2-MoE": ("qwen2_moe", {}),
    "Qwen3": ("qwen3", {}),
    "Qwen3-MoE": ("qwen3_moe", {}),
    "Mistral, sliding window": ("mistral", WINDOW),
    "Ministral, mixed windows": ("ministral", MIXED),
    "Mixtral": ("mixtral", {}),
    "Gemma": ("gemma", {}),
    "Gemma 3, mixed windows": ("gemma3_text", MIXED),
    "OLMo": ("olmo", {}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3, mixed windows": ("olmo3", MIXED),
    "OLMoE": ("olmoe", {}),
    "GPT-2": ("gpt2", {}),
    "GPT-BigCode": ("gpt_bigcode", {}),
    "GPT-NeoX (Pythia)": ("gpt_neox", {}),
    "OPT": ("opt", {}),
    "OPT-350m's kind": ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "StarCoder2, sliding window": ("starcoder2", WINDOW),
    "Granite without scaled logits": ("granite", {}),
    "Granite-MoE without scaled logits": ("granitemoe", {}),
    "GLM-4": ("glm4", {}),
    "EXAONE 4, mixed windows": ("exaone4", MIXED),
    "ERNIE 4.5": ("ernie4_5", {}),
    "Helium": ("helium", {}),
    "Arcee": ("arcee", {}),
    "Apertus": ("apertus", {}),
    "Seed-OSS": ("seed_oss", {}),
    "Persimmon": ("persimmon", {}),
    "BioGPT": ("biogpt", {}),
    "DeepSeek-V3": ("deepseek_v3", {"num_key_value_heads": 4}),
    "Mamba": ("mamba", {}),
    "LFM2": ("lfm2", {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 8}),
    "Qwen3-Next": ("qwen3_next", {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}),
    "RWKV": ("rwkv", {"attention_hidden_size": 32}),
    "gpt-oss (attention sinks)": ("gpt_oss", MIXED),
    "Gemma 2 (capped scores and logits)": ("gemma2", MIXED),
    "Cohere (scaled logits)": ("cohere", {}),
    "Llama 4 (chunks)": ("llama4_text", {}),
    "Bloom": ("bloom", {}),
    "MPT": ("mpt", {"d_model": 32}),
    "Falcon": ("falcon", {}),
    "GPT-J": ("gptj", {}),
    "CodeGen": ("codegen", {}),
    "StableLM": ("stablelm", {}),
    "BERT": ("bert", {}),
    "RoBERTa, as a decoder": ("roberta", {"is_decoder": True}),
    "BART's decoder": ("bart", {"is_decoder": True, "d_model": 32}),
}
REFUSED = set(list(DECODERS)[list(DECODERS).index("Mamba") :])
# Decoders that do other things than the first ones: what the quick tests run.
QUICK = ["Phi", "Phi-3, sliding window", "Llama without a spare row (SmolLM2)", "Qwen2, mixed windows"]
QUICK += ["Qwen2-MoE", "Mistral, sliding window", "Gemma 3, mixed windows", "GPT-2", "OPT-350m's kind", "DeepSeek-V3"]
QUICK += ["Mamba", "LFM2", "gpt-oss (attention sinks)", "Bloom", "Falcon", "BERT"]

SIDE = 32
BASE = {name: VISION[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
PATCHES = BASE | {"image_size": SIDE, "patch_size": 8}
STAGES = {"image_size": SIDE, "patch_size": 4, "embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 2, 2]}
STAGES |= {"window_size": 2}
MAPS: dict[str, Any] = {"depths": [1, 1, 1], "hidden_sizes": [8, 12, 16]}

# Family: model type, config, image processor with its settings, features of the last but one hidden state.
Tower = tuple[str, dict[str, Any], str, dict[str, Any], int]
CROP = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
EXACT = {"size": {"height": SIDE, "width": SIDE}}
NARROW = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
TOWERS: dict[str, Tower] = {
    "CLIP": ("clip_vision_model", PATCHES, "CLIPImageProcessor", CROP, 16),
    "SigLIP and SigLIP 2, fixed size": ("siglip_vision_model", PATCHES, "SiglipImageProcessor", EXACT, 16),
    "SigLIP 2, NaFlex": ("siglip2_vision_model", BASE | {"patch_size": 8}, "Siglip2ImageProcessor", {}, 0),
    "AIMv2": ("aimv2_vision_model", PATCHES, "CLIPImageProcessor", CROP, 16),
    "ViT": ("vit", PATCHES, "ViTImageProcessor", EXACT, 16),
    "DeiT (CLS and distillation)": ("deit", PATCHES, "DeiTImageProcessor", CROP, 16),
    "BEiT": ("beit", PATCHES, "BeitImageProcessor", EXACT, 16),
    "DINOv2, pixels as in its config": ("dinov2", PATCHES, "BitImageProcessor", CROP, 16),
    "DINOv2, fewer pixels than its config": ("dinov2", PATCHES, "BitImageProcessor", NARROW, 4),
    "DINOv2 with registers": ("dinov2_with_registers", PATCHES, "BitImageProcessor", CROP, 16),
    "DINOv3": ("dinov3_vit", PATCHES | {"num_register_tokens": 4}, "CLIPImageProcessor", CROP, 16),
    "DINOv3 ConvNeXt": ("dinov3_convnext", MAPS, "CLIPImageProcessor", CROP, 16),
    "I-JEPA": ("ijepa", PATCHES, "ViTImageProcessor", EXACT, 16),
    "ConvNeXt": (
        "convnext",
        MAPS | {"num_stages": 3},
        "ConvNextImageProcessor",
        {"size": {"shortest_edge": 384}},
        48**2,
    ),
    "EfficientNet": (
        "efficientnet",
        {"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128},
        "ViTImageProcessor",
        EXACT,
        1,
    ),
    "ResNet": ("resnet", MAPS | {"embedding_size": 8}, "CLIPImageProcessor", CROP, 16),
    "Swin": ("swin", STAGES, "ViTImageProcessor", EXACT, 4),
    "Swin V2": ("swinv2", STAGES, "ViTImageProcessor", EXACT, 4),
    "Pixtral": ("pixtral", PATCHES | {"head_dim": 8}, "PixtralImageProcessor", {"patch_size": 8}, 0),
    "ViT-MAE (masks patches)": ("vit_mae", PATCHES, "ViTImageProcessor", EXACT, 0),
    "YOLOS (detection tokens)": ("yolos", PATCHES | {"image_size": [SIDE, SIDE]}, "ViTImageProcessor", EXACT, 0),
    "CLIP whose image processor gives other pixels": ("clip_vision_model", PATCHES, "CLIPImageProcessor", NARROW, 0),
}


def shape(hidden: int, layers: int, heads: int, kv_heads: int | None, intermediate: int, vocabulary: int) -> dict:
    """A decoder's config in the order of a model's description."""
    fields = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
    }
    return fields | {"intermediate_size": intermediate} | ({"num_key_value_heads": kv_heads} if kv_heads else {})


# Family: a model of it, and where its config differs from the defaults; of a tower also the pixels of its processor.
EXAMPLES: dict[str, Any] = {
    "Phi": ("microsoft/phi-2", {**PHI_2, "vocab_size": 51200}),
    "Phi-3, sliding window": ("microsoft/Phi-3-mini-4k-instruct", {"sliding_window": 2047}),
    "Llama": ("TinyLlama/TinyLlama-1.1B", shape(2048, 22, 32, 4, 5632, 32000)),
    "Llama without a spare row (SmolLM2)": (
        "HuggingFaceTB/SmolLM2-1.7B",
        shape(2048, 24, 32, 32, 8192, 49152) | {"tie_word_embeddings": True},
    ),
    "SmolLM3": ("HuggingFaceTB/SmolLM3-3B", shape(2048, 36, 16, 4, 11008, 128256) | {"tie_word_embeddings": True}),
    "Qwen2": ("Qwen/Qwen2.5-1.5B", shape(1536, 28, 12, 2, 8960, 151936) | {"tie_word_embeddings": True}),
    "Qwen3": (
        "Qwen/Qwen3-1.7B",
        shape(2048, 28, 16, 8, 6144, 151936) | {"tie_word_embeddings": True, "head_dim": 128},
    ),
    "Mistral, sliding window": ("mistralai/Mistral-7B-v0.1", shape(4096, 32, 32, 8, 14336, 32000)),
    "Gemma 3, mixed windows": (
        "google/gemma-3-1b-pt",
        shape(1152, 26, 4, 1, 6912, 262144) | {"head_dim": 256, "sliding_window": 512},
    ),
    "OLMo 2": ("allenai/OLMo-2-0425-1B", shape(2048, 16, 16, 16, 8192, 100352)),
    "GPT-2": ("openai-community/gpt2", {}),
    "GPT-NeoX (Pythia)": ("EleutherAI/pythia-1b", shape(2048, 16, 8, None, 8192, 50304)),
    "OPT": ("facebook/opt-125m", {}),
    "StarCoder2, sliding window": (
        "bigcode/starcoder2-3b",
        shape(3072, 30, 24, 2, 12288, 49152) | {"sliding_window": 4096},
    ),
    "CLIP": ("wkcn/TinyCLIP-ViT-61M-32-Text-29M-LAION400M", TINYCLIP, 224),
    "SigLIP and SigLIP 2, fixed size": ("google/siglip-base-patch16-224", {}, 224),
    "AIMv2": ("apple/aimv2-large-patch14-224", {}, 224),
    "ViT": ("google/vit-base-patch16-224", {}, 224),
    "DeiT (CLS and distillation)": ("facebook/deit-base-distilled-patch16-224", {}, 224),
    "BEiT": ("microsoft/beit-base-patch16-224", {}, 224),
    "DINOv2, fewer pixels than its config": ("facebook/dinov2-base", {"patch_size": 14, "image_size": 518}, 224),
    "DINOv2 with registers": ("facebook/dinov2-with-registers-base", {"patch_size": 14, "image_size": 518}, 224),
    "DINOv3": ("facebook/dinov3-vits16-pretrain-lvd1689m", {"num_register_tokens": 4}, 224),
    "ConvNeXt": ("facebook/convnext-tiny-224", {}, 224),
    "ResNet": ("microsoft/resnet-50", {}, 224),
    "Swin": ("microsoft/swin-tiny-patch4-window7-224", {}, 224),
}
PLANNED = ("t4-16", "l4-24", "a100-40")
PAGE = """# Backbones

`python tests/backbones.py --json OUT.json --page docs/backbones.md` makes this page from the results of the tests.

Each family is tested with a tiny model of random weights. The fields of the examples' configs were typed in: those
models were not downloaded.

## Decoders

"Right" means four things. The loss of packed samples equals that of each conversation alone in the decoder's own
attention (a relative difference below 1e-5), with sliding windows shorter than a sample. A delta and a merged model
give equal logits after reloading. Generation with the cache and in a batch gives the tokens of the whole sequence each
time. So does the serving engine. A family that is not right is refused by one line, before training, at evaluation and
by the engine.

The last three columns are the largest `--max_tokens_per_batch` of stage 1 with TinyCLIP on a T4, an L4 and an A100, by
`clip-phi plan`. It counts decoders with layers like Phi's and Llama's.

DECODERS

## Towers

A tower is right if an image gives one feature for each patch, or for each place of the last but one feature map, with
the pixels that its image processor really gives. CLS and registers are left out;
`--vision_feature_select_strategy full` keeps them, and `--vision_feature_layer` chooses another hidden state.

TOWERS
"""


def make_config(kind: str, changes: dict[str, Any], tiny: dict[str, Any] | None = None) -> Any:
    """The config with the changes, and with those fields of `tiny` that it has and that can be set."""
    default = AutoConfig.for_model(kind)
    known = {name for name in tiny or () if hasattr(default, name)}
    known -= {name for name in known if isinstance(getattr(type(default), name, None), property)}
    return AutoConfig.for_model(kind, **{name: tiny[name] for name in known if tiny} | changes)


def save_decoder(family: str, folder: Path) -> str:
    """A tiny decoder with weights that are large enough for all its parts to count, and a tokenizer."""
    kind, changes = DECODERS[family]
    config = make_config(kind, changes, TINY)
    size = save_tokenizer(folder).vocab_size
    if "spare row" in family:
        config.vocab_size = size
    torch.manual_seed(0)
    decoder = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in decoder.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.2)
    decoder.save_pretrained(folder)
    return str(folder)


def save_tower(family: str, folder: Path) -> str:
    kind, changes, image_processor, settings, _ = TOWERS[family]
    torch.manual_seed(0)
    AutoModel.from_config(make_config(kind, changes)).save_pretrained(folder)
    content = {"image_processor_type": image_processor, **settings}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    return str(folder)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def check_decoder(family: str, vision: str, folder: Path) -> dict[str, Any]:
    """The differences of a family, each of its own plain form; or the line that refuses it.

    packed_vs_alone: of the loss, relative. reload: of logits. cached: 0 if all tokens are equal, else 1."""
    text = save_decoder(family, folder / "text")
    try:
        processor = ClipPhiProcessor.from_backbones(vision, text)
        model = ClipPhiForCausalLM.from_backbones(vision, text)
        own = model.config.get_text_config()._attn_implementation
        refuse_other_attention(model)
        packed = packed_difference(model, processor, own)
        return {"packed_vs_alone": packed, "reload": reload_difference(model, folder), "refused": None} | {
            "cached": float(not all(same_tokens(model, processor)))
        }
    except ValueError as error:
        return {"packed_vs_alone": None, "reload": None, "cached": None, "refused": one_line(error)}


def pixels_of(model: Any, images: int) -> torch.Tensor:
    return torch.randn(images, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)).to(model.dtype)


@torch.no_grad()
def packed_difference(model: Any, processor: Any, own: str) -> float:
    """Relative difference of the loss of a pack, as it is trained, from each conversation alone."""
    image = [processor.image_token_id] * processor.num_image_tokens
    words = torch.randint(5, 250, (200,), generator=torch.Generator().manual_seed(2)).tolist()
    shapes = [(image, [(0, 12), (12, 45), (45, 50)]), (image, [(50, 80)]), ([], [(80, 100), (100, 113)])]
    samples, alone, count = [], 0.0, 0
    pixels = pixels_of(model, 2)
    for number, (prefix, places) in enumerate(shapes):
        encoded = [Encoded(words[start:stop], [-100] * 2 + words[start + 2 : stop]) for start, stop in places]
        samples.append(build_shared_prefix(encoded, prefix, "x"))
        for ids, labels in encoded:
            inputs = {"pixel_values": pixels[number : number + 1]} if prefix else {}
            labels = torch.tensor([[-100] * len(prefix) + labels])
            loss = model(input_ids=torch.tensor([prefix + ids]), labels=labels, use_cache=False, **inputs).loss
            alone, count = alone + loss.item() * (len(ids) - 2), count + len(ids) - 2
    model.set_attn_implementation({"text_config": PACKED_ATTENTION})
    inputs = pack_samples(samples, pixels, processor.tokenizer.pad_token_id).inputs
    found = model(**inputs, use_cache=False, num_items_in_batch=count, skip_logits=True).loss.item()
    model.set_attn_implementation({"text_config": own})
    return abs(found * count - alone) / alone


@torch.no_grad()
def reload_difference(model: Any, folder: Path) -> float:
    """Largest difference of a logit, of a delta and of a merged model, after reloading."""
    ids = torch.tensor([[model.config.image_token_id] * 16 + list(range(5, 25))])
    inputs = {"input_ids": ids, "pixel_values": pixels_of(model, 1)}
    expected, found = model(**inputs).logits, []
    for merged in (False, True):
        model.save_pretrained(folder / f"merged={merged}", merged=merged)
        found.append(ClipPhiForCausalLM.from_pretrained(folder / f"merged={merged}")(**inputs).logits)
    return max((each - expected).abs().max().item() for each in found)


@torch.no_grad()
def same_tokens(model: Any, processor: Any, count: int = 12) -> list[bool]:
    """Whether generation with a cache, in a batch and in the engine gives the tokens without any of these."""
    from PIL import Image

    questions = ["a red circle and a blue square and a star?", "a?"]
    picture = Image.frombytes("RGB", (40, 33), bytes(range(256)) * 15 + bytes(120))
    content = [[{"type": "image"}, {"type": "text", "text": question}] for question in questions]
    prompts = [[{"role": "user", "content": each}] for each in content]
    pixels = processor.image_processor([picture], return_tensors="pt")["pixel_values"]
    model.generation_config.eos_token_id = None  # so that all have the same number of tokens
    ids, expected = [], []
    for prompt in prompts:
        ids.append(processor.encode(prompt)[0])
        sequence = list(ids[-1])
        for _ in range(count):
            logits = model(input_ids=torch.tensor([sequence]), pixel_values=pixels, use_cache=False).logits
            sequence.append(int(logits[0, -1].argmax()))
        expected.append(sequence[len(ids[-1]) :])
    options: dict[str, Any] = {"max_new_tokens": count, "do_sample": False}
    alone = [
        model.generate(input_ids=torch.tensor([each]), pixel_values=pixels, **options)[0, len(each) :].tolist()
        for each in ids
    ]
    batch = processor.tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    together = model.generate(**batch, pixel_values=pixels.repeat(2, 1, 1, 1), **options)
    together = together[:, batch["input_ids"].shape[1] :].tolist()
    with Engine(model, processor) as engine:
        engine.ends = set()
        served = [engine.submit(prompt, [picture], max_new_tokens=count) for prompt in prompts]
        texts = [each.result() for each in served]
    written = [processor.tokenizer.decode(each, skip_special_tokens=True) for each in expected]
    return [alone == expected, together == expected, texts == written]


def check_tower(family: str, text: str, folder: Path) -> dict[str, Any]:
    """The features of an image by the processor, and by the model's own forward pass with its pixels."""
    *_, expected = TOWERS[family]
    try:
        vision = save_tower(family, folder / "vision")
        processor = ClipPhiProcessor.from_backbones(vision, text)
        model = ClipPhiForCausalLM.from_backbones(vision, text)
    except (ValueError, OSError, ImportError) as error:
        return {"tokens": None, "expected": None, "refused": one_line(error)}
    pixels = processor.image_processor(torch.zeros((3, 50, 40), dtype=torch.uint8), return_tensors="pt")["pixel_values"]
    (features,) = model.get_image_features(pixels, return_dict=True).pooler_output
    assert len(features) == processor.num_image_tokens, family
    return {"tokens": processor.num_image_tokens, "expected": expected, "refused": None}


def run(families: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """All families, or those named."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found: dict[str, dict[str, Any]] = {"decoders": {}, "towers": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vision, text = save_tower("CLIP", folder / "vision"), save_decoder("Phi", folder / "text")
        for number, family in enumerate([*DECODERS, *TOWERS]):
            if families is None or family in families:
                kind, check, other = (
                    ("decoders", check_decoder, vision) if family in DECODERS else ("towers", check_tower, text)
                )
                found[kind][family] = result = check(family, other, folder / str(number))
                print(f"{family}: {json.dumps(result)}", file=sys.stderr, flush=True)
    return found


def find_plan(config: ClipPhiConfig, card: str) -> str:
    """The largest stage 1 step on a card, as `clip-phi plan` counts it."""
    try:
        plan = make_plan(Stage1Arguments(stage=1), CARDS[card], 0.4, config)
    except ValueError:  # plan knows decoders like Phi and Llama
        return "not counted"
    return f"{plan['max_tokens_per_batch']:,}" if plan["fits"] else "does not fit"


def decoder_row(family: str, result: dict[str, Any]) -> list[str]:
    if result["refused"]:
        return [family, "refused: " + result["refused"].partition(": ")[2].partition("; choose")[0], *[""] * 5]
    name, fields = EXAMPLES.get(family, ("", None))
    if fields is None:
        return [family, "right", *[""] * 5]
    text = AutoConfig.for_model(DECODERS[family][0], **fields)
    with torch.device("meta"):
        decoder: Any = AutoModelForCausalLM.from_config(text)
    count = sum(weight.numel() for weight in {id(each): each for each in decoder.parameters()}.values())
    config = ClipPhiConfig(text_config=text, image_token_id=text.vocab_size)
    return [family, "right", name, f"{count / 1e9:.2f} B", *(find_plan(config, card) for card in PLANNED)]


def tower_row(family: str, result: dict[str, Any]) -> list[str]:
    if result["refused"]:
        return [family, "refused: " + result["refused"].rpartition(": ")[2], *[""] * 4]
    name, fields, side = EXAMPLES.get(family, ("", None, 0))
    if fields is None:
        return [family, "right", *[""] * 4]
    vision = AutoConfig.for_model(TOWERS[family][0], **fields)
    with torch.device("meta"):
        count = sum(weight.numel() for weight in AutoModel.from_config(vision).parameters())
    tokens, width = measure_tower(ClipPhiConfig(vision_config=vision), side, side)
    return [family, "right", name, f"{count / 1e6:.0f} M", f"{side} x {side}", f"{tokens} of {width}"]


def as_table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_page(found: dict[str, dict[str, Any]], path: Path) -> None:
    """docs/backbones.md, from the results of all families."""
    decoders = [decoder_row(family, result) for family, result in found["decoders"].items()]
    towers = [tower_row(family, result) for family, result in found["towers"].items()]
    largest = [f"{GB} GB" for GB in (16, 24, 40)]
    titles = ["family", "result", "for example", "parameters", *largest]
    page = PAGE.replace("DECODERS\n", as_table(titles, decoders))
    titles = ["family", "result", "for example", "parameters", "pixels", "tokens an image, and their width"]
    path.write_text(page.replace("TOWERS\n", as_table(titles, towers)), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", metavar="FILE", required=True, help="file for the results")
    parser.add_argument("--families", nargs="*", metavar="NAME", help="these families only")
    parser.add_argument("--page", metavar="FILE", help="page of documentation to write from the results")
    parser.add_argument("--keep", action="store_true", help="do not run again: the results are in the file already")
    options = parser.parse_args(argv)
    path = Path(options.json)
    if not options.keep:
        path.write_text(json.dumps(run(options.families), indent=1) + "\n")
    if options.page:
        write_page(json.loads(path.read_text()), Path(options.page))


if __name__ == "__main__":
    main()
