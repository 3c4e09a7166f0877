"""Exports give the same model, or are refused. Slow tests, and those that need gguf or onnx: make test-export."""

import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import TEXT, VISION, save_tokenizer
from helpers import ROOT, run_clean
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from clip_phi.cli import main
from clip_phi.export.rotation import WideTower
from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

SCALED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
LLAMA = {name: value for name, value in TEXT.items() if name != "resid_pdrop"}


def backbones(folder, text, tower=None, **vision):
    """A tower and this decoder, with biases and norms that are not at their beginnings."""
    torch.manual_seed(3)
    tower = tower or CLIPVisionModel(CLIPVisionConfig(**VISION | vision))
    for part in (tower, text):
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    tower.save_pretrained(folder / "vision")
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessorPil(**sizes).save_pretrained(folder / "vision")
    text.save_pretrained(folder / "text")
    save_tokenizer(folder / "text")
    return str(folder / "vision"), str(folder / "text")


def checkpoint(folder, text, projector_type="linear", projector_bias=True, **vision):
    parts = backbones(folder, text, **vision)
    options = {"projector_type": projector_type, "projector_bias": projector_bias}
    model = ClipPhiForCausalLM.from_backbones(*parts, **options)
    processor = ClipPhiProcessor.from_backbones(*parts)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return model, processor


def small_phi():
    return PhiForCausalLM(PhiConfig(**TEXT))


@pytest.mark.parametrize(("projector_type", "bias", "tied"), [("linear", True, False), ("mlp", False, True)])
def test_stock_llava_gives_equal_logits_and_tokens(projector_type, bias, tied, tmp_path, capsys):
    text = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=tied))
    model, processor = checkpoint(tmp_path, text, projector_type, bias)
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "llava"), "--to", "llava", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["largest_difference"] < 1e-5
    assert not list((tmp_path / "llava").glob("*.py")), "no remote code"
    assert str(tmp_path) not in (tmp_path / "llava/config.json").read_text()
    texts = [path.read_text(encoding="utf-8") for path in (tmp_path / "llava").rglob("*.json")]
    assert texts and not any("auto_map" in text or "clip_phi" in text.lower() for text in texts)  # no remote code
    assert not list((tmp_path / "llava").rglob("*.py"))
    llava = AutoModelForImageTextToText.from_pretrained(tmp_path / "llava")
    assert type(llava).__name__ == "LlavaForConditionalGeneration"
    image = Image.effect_noise((40, 30), 60).convert("RGB")
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "a?"}]}]
    asked = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(messages, **asked)
    theirs = AutoProcessor.from_pretrained(tmp_path / "llava").apply_chat_template(messages, **asked)
    assert torch.equal(theirs["input_ids"], inputs["input_ids"])
    assert torch.equal(theirs["pixel_values"], inputs["pixel_values"])
    with torch.no_grad():
        torch.testing.assert_close(llava(**theirs).logits, model(**inputs).logits)


def test_a_decoder_whose_head_has_a_bias_is_refused_where_heads_have_none(model, processor, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "llava"), "--to", "llava"]) == 2
    assert "Llava's head has no bias, and this decoder's head (phi) has one" in capsys.readouterr().err
    assert not (tmp_path / "llava").exists()
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "model"), "--to", "vllm"]) == 2
    assert "is not empty" in capsys.readouterr().err


HEADLESS = """
import torch
from transformers import AutoModel, AutoModelForImageTextToText
folder, expected = sys.argv[1:]
inputs, hidden_states = torch.load(expected)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert type(model).__name__ == "ClipPhiModel" and model._supports_attention_backend
with torch.no_grad():
    assert torch.equal(model(**inputs).last_hidden_state, hidden_states)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(model.model(**inputs).last_hidden_state, hidden_states)
"""


@pytest.mark.export  # for its process of its own
def test_checkpoint_for_vllm_has_an_automodel_without_head_in_a_clean_process(tmp_path, capsys):
    model, processor = checkpoint(tmp_path, LlamaForCausalLM(LlamaConfig(**LLAMA)))
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "vllm"), "--to", "vllm"]) == 0
    assert capsys.readouterr().out.endswith("largest difference from the model 0\n")
    image = Image.effect_noise((40, 30), 60).convert("RGB")
    inputs = dict(processor(images=[image], text=["<image>a?"], return_tensors="pt"))
    with torch.no_grad():
        torch.save((inputs, model.model(**inputs).last_hidden_state), tmp_path / "expected.pt")
    run_clean(HEADLESS, tmp_path, tmp_path / "vllm", tmp_path / "expected.pt")


# ------------------------------------------------------------------ notebooks


@pytest.mark.parametrize("prefix", ["", "proj."])
@pytest.mark.parametrize("bias", [True, False])
def test_projector_of_a_notebook_becomes_a_checkpoint(prefix, bias, vision_backbone, text_backbone, tmp_path, capsys):
    layer = torch.nn.Linear(16, 32, bias=bias)
    torch.save({f"{prefix}{name}": value for name, value in layer.state_dict().items()}, tmp_path / "proj.pth")
    words = ["import-projector", str(tmp_path / "proj.pth"), str(tmp_path / "out")]
    words += ["--vision_backbone", vision_backbone, "--text_backbone", text_backbone]
    assert main(words) == 0
    model = ClipPhiForCausalLM.from_pretrained(tmp_path / "out")
    ClipPhiProcessor.from_pretrained(tmp_path / "out")
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():  # what the notebooks do: the last hidden state, without CLS, through the layer
        expected = layer(model.model.vision_tower(pixels).last_hidden_state[0, 1:])
        torch.testing.assert_close(model.get_image_features(pixels).pooler_output[0], expected)


class SimpleResBlock(nn.Module):
    """As LLaVA and the course projects write it."""

    def __init__(self, width):
        super().__init__()
        self.pre_norm = nn.LayerNorm(width)
        self.proj = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x):
        x = self.pre_norm(x)
        return x + self.proj(x)


def made_elsewhere(kind):
    """A projector's module with weights that are not at their beginnings, and the hidden state that it reads."""
    torch.manual_seed(5)
    layers = {
        "linear": [nn.Linear(16, 32)],
        "mlp": [nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32)],
        "residual": [nn.Linear(16, 32), SimpleResBlock(32)],
    }[kind]
    module = nn.Sequential(*layers)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def under(prefix, module):
    return {f"{prefix}{name}": value for name, value in module.state_dict().items()}


def whole_model(module, vision, text):
    """The state dict of a LightningModule that holds both backbones and the projector."""
    tower, decoder = CLIPVisionModel.from_pretrained(vision), PhiForCausalLM.from_pretrained(text)
    return under("vision_model.", tower) | under("text_model.", decoder) | under("projection.", module)


LAYOUTS = {
    "mm_projector.bin, linear": ("linear", -2, lambda m, v, t: under("model.mm_projector.", m[0])),
    "mm_projector.bin, mlp2x_gelu": ("mlp", -2, lambda m, v, t: under("model.mm_projector.", m)),
    "a training loop's checkpoint": (
        "linear",
        -1,
        lambda m, v, t: {"epoch": 3, "model_state_dict": under("", m[0]), "optimizer_state_dict": {"state": {}}},
    ),
    "Lightning": (
        "linear",
        -1,
        lambda m, v, t: {"pytorch-lightning_version": "2.4.0", "global_step": 7, "state_dict": whole_model(m[0], v, t)},
    ),
    "linear and block in one file": (
        "residual",
        -1,
        lambda m, v, t: under("projection.", m[0]) | under("block.", m[1]),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_projectors_of_other_projects_give_their_own_features(layout, vision_backbone, text_backbone, tmp_path, capsys):
    kind, layer, content = LAYOUTS[layout]
    module = made_elsewhere(kind)
    torch.save(content(module, vision_backbone, text_backbone), tmp_path / "theirs.bin")
    words = ["import-projector", str(tmp_path / "theirs.bin"), str(tmp_path / "out")]
    assert main([*words, "--vision_backbone", vision_backbone, "--text_backbone", text_backbone]) == 0
    assert_same_logits(tmp_path / "out", module, layer, text_backbone)


def assert_same_logits(folder, module, layer, decoder):
    """The logits of the written model are those of the other project's modules, called one after the other."""
    model = ClipPhiForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = PhiForCausalLM.from_pretrained(decoder, dtype=torch.float32) if isinstance(decoder, str) else decoder
    pixels, ids = torch.randn(1, 3, 32, 32), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        image = module(states[layer][:, 1:])
        text = plain.get_input_embeddings()(ids)
        expected = plain(inputs_embeds=torch.cat([image, text], dim=1)).logits
        row = torch.cat([torch.full((1, image.shape[1]), model.config.image_token_id), ids], dim=1)
        found = model(input_ids=row, pixel_values=pixels).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_residual_block_in_a_second_file_and_a_lora_folder(vision_backbone, text_backbone, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model

    module = made_elsewhere("residual")
    torch.save(module[0].state_dict(), tmp_path / "linear.pth")
    torch.save(module[1].state_dict(), tmp_path / "block.pth")
    tuned = get_peft_model(
        PhiForCausalLM.from_pretrained(text_backbone, dtype=torch.float32),
        LoraConfig(r=4, target_modules=["q_proj", "fc2"]),
    )
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    tuned.save_pretrained(tmp_path / "lora")
    words = ["import-projector", str(tmp_path / "linear.pth"), str(tmp_path / "out")]
    words += ["--block", str(tmp_path / "block.pth"), "--adapter", str(tmp_path / "lora")]
    words += ["--vision_backbone", vision_backbone, "--text_backbone", text_backbone]
    assert main(words) == 0
    assert_same_logits(tmp_path / "out", module, -1, tuned.eval())

    weights = load_file(tmp_path / "lora/adapter_model.safetensors")
    halves = {name: value for name, value in weights.items() if "lora_B" not in name or "q_proj" not in name}
    save_file(halves, tmp_path / "lora/adapter_model.safetensors")
    assert main([*words[:2], str(tmp_path / "half"), *words[3:]]) == 2
    assert "lacks 2 of the weights" in capsys.readouterr().err and not (tmp_path / "half").exists()


def tuned_decoder(module, vision, text):
    state = whole_model(module[0], vision, text)
    return {
        name: value + 0.5 if name.endswith("text_model.model.layers.1.mlp.fc1.weight") else value
        for name, value in state.items()
    }


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda m, v, t: under("projection.", m[0]) | {"resblock.other.weight": torch.zeros(2, 2)}, "must contain"),
        (lambda m, v, t: under("projection.", m[0]) | under("block.", m[1].proj), "must contain"),
        (lambda m, v, t: under("p.", m[0]) | under("b.", SimpleResBlock(31)), "maps 31, .*need 32"),
        (tuned_decoder, "another text_model.model.layers.1.mlp.fc1.weight than the backbones"),
    ],
    ids=["unknown block", "half a block", "another width", "tuned decoder"],
)
def test_a_projector_that_would_lose_a_part_is_refused(
    content, words, vision_backbone, text_backbone, tmp_path, capsys
):
    torch.save(content(made_elsewhere("residual"), vision_backbone, text_backbone), tmp_path / "theirs.pth")
    command = ["import-projector", str(tmp_path / "theirs.pth"), str(tmp_path / "out")]
    assert main([*command, "--vision_backbone", vision_backbone, "--text_backbone", text_backbone]) == 2
    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


class Evil:
    def __reduce__(self):
        return (open, ("/nowhere/evil", "w"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.nn.Linear(16, 32), "cannot be read safely"),
        (Evil(), "cannot be read safely"),
        (b"not a pickle", "cannot be read safely"),
        (torch.nn.Linear(17, 32).state_dict(), "maps 17 -> 32, and .* need 16 -> 32"),
        (torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).state_dict(), "one linear layer"),
        (torch.nn.LayerNorm(4).state_dict(), "one linear layer"),
        (torch.zeros(2), "is not the state dict"),
        (None, "no such file"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_other_files_are_refused_in_one_line(content, words, vision_backbone, text_backbone, tmp_path, capsys):
    if isinstance(content, bytes):
        (tmp_path / "proj.pth").write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / "proj.pth")
    command = ["import-projector", str(tmp_path / "proj.pth"), str(tmp_path / "out")]
    assert main([*command, "--vision_backbone", vision_backbone, "--text_backbone", text_backbone]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(words, said)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------ llama.cpp's order of rows

BLOCK = {f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"} | {"mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"}
BLOCK |= {"layer_norm1": "ln1", "layer_norm2": "ln2", "self_attn.out_proj": "attn_out"}


def tower_tensors(tower, layers):
    """The weights of a CLIPVisionModel's first layers under llama.cpp's names."""
    state = {name.removeprefix("vision_model."): value for name, value in tower.state_dict().items()}
    tensors = {f"v.{part}_embd.weight": state[f"embeddings.{part}_embedding.weight"] for part in ("patch", "position")}
    tensors["v.class_embd"] = state["embeddings.class_embedding"]
    for kind in ("weight", "bias"):
        tensors[f"v.pre_ln.{kind}"] = state[f"pre_layrnorm.{kind}"]
        for number in range(layers):
            for ours, theirs in BLOCK.items():
                tensors[f"v.blk.{number}.{theirs}.{kind}"] = state[f"encoder.layers.{number}.{ours}.{kind}"]
    return tensors


def llama_cpp_rows(tensors, heads, epsilon, pixels, activation):
    """Rows 1 to N of llama.cpp's llava graph: CLS behind the patches, positions in the order of rows."""
    patch = tensors["v.patch_embd.weight"]
    rows = nn.functional.conv2d(pixels, patch, stride=patch.shape[-1]).flatten(2).transpose(1, 2)[0]
    rows = torch.cat([rows, tensors["v.class_embd"][None]]) + tensors["v.position_embd.weight"]

    def norm(x, name):
        return nn.functional.layer_norm(x, x.shape[1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], epsilon)

    def linear(x, name):
        return nn.functional.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    rows = norm(rows, "v.pre_ln")
    for number in range(sum(name.endswith("ln1.weight") for name in tensors)):
        block = f"v.blk.{number}"
        inside = norm(rows, f"{block}.ln1")
        parts = [linear(inside, f"{block}.attn_{part}").view(len(rows), heads, -1).transpose(0, 1) for part in "qkv"]
        mixed = nn.functional.scaled_dot_product_attention(*parts).transpose(0, 1).flatten(1)
        rows = rows + linear(mixed, f"{block}.attn_out")
        rows = rows + linear(activation(linear(norm(rows, f"{block}.ln2"), f"{block}.ffn_up")), f"{block}.ffn_down")
    return rows[1:]


@pytest.mark.parametrize(
    ("sizes", "layer"),
    [
        ({"hidden_size": 64, "num_attention_heads": 2}, -2),
        ({"hidden_size": 96, "num_attention_heads": 3, "hidden_act": "gelu"}, -1),
        ({"hidden_size": 640, "num_attention_heads": 10, "image_size": 224}, -2),  # TinyCLIP's 50 rows
    ],
)
def test_a_wide_tower_gives_the_features_in_llama_cpps_order_of_rows(sizes, layer):
    torch.manual_seed(4)
    shape = {"num_hidden_layers": 3, "intermediate_size": 4 * sizes["hidden_size"], "patch_size": 32, "image_size": 96}
    config = CLIPVisionConfig(**shape | sizes)
    tower = CLIPVisionModel(config).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.03)
        pixels = torch.randn(1, 3, config.image_size, config.image_size)
        pixels[..., : config.image_size // 2] *= 0.01  # patches of other sizes: their codes are of other sizes, too
        expected = tower(pixels, output_hidden_states=True).hidden_states[layer][0, 1:]
        wide = WideTower(tower_tensors(tower, layer % 4), config.num_attention_heads)
        activation = nn.functional.gelu if sizes.get("hidden_act") == "gelu" else lambda x: x * torch.sigmoid(1.702 * x)
        epsilon = config.layer_norm_eps * config.hidden_size / wide.wide
        rows = llama_cpp_rows(wide.convert(), config.num_attention_heads, epsilon, pixels, activation)
        weight = torch.randn(32, config.hidden_size)
        found, wanted = rows @ wide.projector(weight).T, expected @ weight.T
    assert (found - wanted).abs().max() < 2e-3 * wanted.abs().max()


@pytest.mark.parametrize("sizes", [{"num_attention_heads": 1}, {"num_attention_heads": 8}])
def test_a_tower_whose_rows_cannot_be_told_apart_is_refused(sizes):
    config = CLIPVisionConfig(hidden_size=64, num_hidden_layers=1, patch_size=32, image_size=96, **sizes)
    with pytest.raises(
        ValueError, match="llama.cpp needs a tower with two attention heads, and heads at least as wide"
    ):
        WideTower(tower_tensors(CLIPVisionModel(config), 1), config.num_attention_heads)


# ------------------------------------------------------------------ make test-export


@pytest.mark.export
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("projector_type", "bias", "activation"),
    [("linear", True, "quick_gelu"), ("linear", False, "gelu"), ("mlp", True, "quick_gelu")],
)
def test_gguf_has_every_weight(dtype, projector_type, bias, activation, tmp_path, capsys):
    """What llama.cpp computes from them: make test-llamacpp."""
    from clip_phi.export.gguf import read_tensors

    model, processor = checkpoint(tmp_path, small_phi(), projector_type, bias, hidden_act=activation)
    words = ["export", str(tmp_path / "model"), str(tmp_path / "gguf"), "--to", "gguf", "--dtype", dtype, "--json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    text, mmproj = (read_tensors(tmp_path / "gguf" / name) for name in ("text.gguf", "mmproj.gguf"))
    assert len(text) + len(mmproj) == told["tensors"]
    decoder = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    assert sum(value.size for value in text.values()) == sum(value.numel() for value in decoder)
    hidden, width = TEXT["hidden_size"], VISION["hidden_size"]
    weight = model.lm_head.weight.detach().numpy()
    assert (text["output.weight"] == weight.astype(dtype)).all() and text["output.bias"].dtype == "float32"
    if projector_type == "linear":
        ours = model.model.projector.weight.detach().numpy().astype(dtype)
        columns = mmproj["mm.0.weight"][:, :width]  # those of the features; the others' are of their mean and codes
        assert (columns[:hidden] == ours).all() and (columns[hidden:] == -ours).all()


@pytest.mark.export
def test_gguf_has_the_weights_of_a_siglip_tower_as_they_are(tmp_path):
    from clip_phi.export import export
    from clip_phi.export.gguf import read_tensors

    tower = SiglipVisionModel(SiglipVisionConfig(**VISION))
    checkpoint(tmp_path, small_phi(), tower=tower)
    export(str(tmp_path / "model"), tmp_path / "gguf", "gguf", "float32")
    found = read_tensors(tmp_path / "gguf/mmproj.gguf")
    state = {name.removeprefix("vision_model."): value for name, value in tower.state_dict().items()}
    expected = {f"v.{part}_embd.weight": f"embeddings.{part}_embedding.weight" for part in ("patch", "position")}
    expected["v.patch_embd.bias"] = "embeddings.patch_embedding.bias"
    for kind in ("weight", "bias"):
        for number in range(2):  # of three layers, without the norm and the pooling behind them
            expected |= {
                f"v.blk.{number}.{theirs}.{kind}": f"encoder.layers.{number}.{ours}.{kind}"
                for ours, theirs in BLOCK.items()
            }
    assert expected.keys() == {name for name in found if name.startswith("v.")}
    for theirs, ours in expected.items():
        assert (found[theirs] == state[ours].numpy()).all(), theirs


@pytest.mark.export
def test_gguf_refuses_other_towers(tmp_path, capsys):
    checkpoint(tmp_path, small_phi(), tower=ViTModel(ViTConfig(**VISION)))
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "gguf"), "--to", "gguf"]) == 2
    assert "the tower is a 'vit'; llama.cpp's llava graph is a CLIP or SigLIP tower" in capsys.readouterr().err


@pytest.mark.export
def test_gguf_metadata_and_tokens_are_those_of_the_decoder(tmp_path):
    import gguf

    from clip_phi.export import export

    model, processor = checkpoint(tmp_path, small_phi())
    export(str(tmp_path / "model"), tmp_path / "gguf", "gguf", "float32")
    fields = gguf.GGUFReader(tmp_path / "gguf/text.gguf").fields
    read = {name: field.contents() for name, field in fields.items()}
    expected = {"general.architecture": "phi2", "phi2.block_count": 2, "phi2.rope.dimension_count": 8}
    expected |= {"phi2.attention.head_count": 2, "phi2.feed_forward_length": 64, "phi2.context_length": 256}
    assert {name: read[name] for name in expected} == expected
    tokens, kinds = read["tokenizer.ggml.tokens"], read["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == TEXT["vocab_size"]
    for token, number in processor.tokenizer.get_vocab().items():
        assert tokens[number] == token
    special = {processor.image_token_id, processor.tokenizer.pad_token_id, processor.tokenizer.eos_token_id}
    assert {number for number, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL} == special
    assert kinds.count(gguf.TokenType.UNUSED) == TEXT["vocab_size"] - len(processor.tokenizer)
    assert read["tokenizer.ggml.eos_token_id"] == processor.tokenizer.eos_token_id
    vision = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "gguf/mmproj.gguf").fields.items()}
    layers = vision["clip.vision.block_count"]
    assert vision["clip.vision.feature_layer"] == [layers] and layers >= 2 + 2, "two of three, and those around them"
    assert vision["clip.projector_type"] == "mlp" and vision["clip.vision.projection_dim"] == 32


@pytest.mark.export
@pytest.mark.parametrize(("dtype", "kind", "head"), [("q8_0", "Q8_0", "Q8_0"), ("q4_0", "Q4_0", "Q8_0")])
def test_gguf_quantises_the_decoder_and_keeps_the_tower(dtype, kind, head, tmp_path, capsys):
    import gguf

    model, _ = checkpoint(tmp_path, LlamaForCausalLM(LlamaConfig(**LLAMA)))
    words = ["export", str(tmp_path / "model"), str(tmp_path / "gguf"), "--to", "gguf", "--dtype", dtype]
    assert main(words) == 0
    assert re.search(r"tensors read back, largest difference from the model 0\.\d+", capsys.readouterr().out)
    text, tower = (gguf.GGUFReader(tmp_path / "gguf" / name).tensors for name in ("text.gguf", "mmproj.gguf"))
    kinds = {each.name: each.tensor_type.name for each in text}
    assert kinds.pop("token_embd.weight") == kinds.pop("output.weight") == head
    assert {found for name, found in kinds.items() if "norm" not in name} == {kind}
    assert {found for name, found in kinds.items() if "norm" in name} == {"F32"}
    assert {each.tensor_type.name for each in tower} == {"F16", "F32"}
    (found,) = (each for each in text if each.name == "blk.1.ffn_up.weight")
    ours = model.model.language_model.layers[1].mlp.up_proj.weight.detach()
    theirs = torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type))
    steps = ours.view(-1, 32).abs().amax(1, keepdim=True) / (127 if dtype == "q8_0" else 8)
    assert ((ours - theirs).view(-1, 32).abs() <= steps * 1.01).all()


@pytest.mark.export
@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        (
            lambda: MistralForCausalLM(MistralConfig(**LLAMA)),
            [],
            "is a 'mistral'; this writes phi, llama, qwen2, qwen3",
        ),
        (lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, hidden_act="gelu")), [], "have silu and a head without bias"),
        (lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, attention_bias=True)), [], "has more biases"),
        (lambda: PhiForCausalLM(PhiConfig(**TEXT, rope_parameters=SCALED)), [], "rotary embedding is of type 'linear'"),
        (lambda: LlamaForCausalLM(LlamaConfig(**LLAMA | {"hidden_size": 48})), ["--dtype", "q8_0"], "has 48 columns"),
    ],
    ids=["kind", "activation", "biases", "positions", "blocks"],
)
def test_what_gguf_cannot_represent_is_refused(text, words, message, tmp_path, capsys):
    checkpoint(tmp_path, text())
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "gguf"), "--to", "gguf", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "gguf").exists()


@pytest.mark.export
def test_onnx_of_tower_and_projector_gives_equal_features(tmp_path, capsys):
    checkpoint(tmp_path, small_phi())
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "onnx"), "--to", "onnx", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["largest_difference"] < 1e-5 and told["files"] == [str(tmp_path / "onnx/vision.onnx")]


# ------------------------------------------------------------------ graphs of the whole model


def decoder_with_bos(**config):
    sizes = {"tie_word_embeddings": True, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**LLAMA | sizes, **config))


@pytest.mark.export
@pytest.mark.parametrize(("text", "dtype"), [(small_phi, "int8"), (decoder_with_bos, "float32")])
def test_graphs_give_the_answer_of_generate_by_onnxruntime_alone(text, dtype, tmp_path, capsys):
    model, processor = checkpoint(tmp_path, text(), "mlp")
    words = ["export", str(tmp_path / "model"), str(tmp_path / "site"), "--to", "web", "--dtype", dtype]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["largest_difference"] < (1e-5 if dtype == "float32" else 0.05)
    assert {path.name for path in (tmp_path / "site").glob("*.js")} == {"app.js", "pixels.js", "worker.js"}
    image = Image.effect_noise((40, 30), 60).convert("RGB")
    image.save(tmp_path / "image.png")
    question = [{"type": "image", "image": image}, {"type": "text", "text": "a?"}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([{"role": "user", "content": question}], **options)
    ids = model.generate(**inputs, max_new_tokens=256, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    command = [sys.executable, ROOT / "examples/onnx_answer.py", tmp_path / "site", tmp_path / "image.png", "a?"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if dtype == "float32":
        assert done.stdout.strip() == processor.decode(ids, skip_special_tokens=True).strip() != ""


SLIDING, CONVOLUTION = {"sliding_window": 8}, {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 2}


@pytest.mark.export
@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        ({"text": lambda: MistralForCausalLM(MistralConfig(**LLAMA, **SLIDING))}, [], "sliding windows"),
        ({"text": lambda: Lfm2ForCausalLM(Lfm2Config(**LLAMA, **CONVOLUTION))}, [], "is not one of keys and values"),
        ({"MAX_BYTES": 1000}, [], "a browser loads 2: see --dtype"),
        ({"PROCESSORS": ()}, [], "not as CLIPImageProcessor"),
        ({"TOLERANCE": 0.0}, [], "graphs give other logits than the model"),
        ({}, ["--packages", "nowhere"], "no file nowhere/@huggingface/transformers/dist/transformers.min.js"),
        ({}, ["--dtype", "float16"], "--to web takes no --dtype float16, but int8 or float32 or int4"),
        ({}, ["--to", "llava", "--dtype", "int8"], "--to llava takes no --dtype int8"),
        ({}, ["--to", "gguf", "--packages", "a"], "--packages requires --to web"),
    ],
    ids=["sliding", "convolution", "large", "processor", "logits", "packages", "dtype", "llava", "gguf"],
)
def test_what_a_browser_cannot_run_is_refused_and_nothing_is_left(
    change, words, message, tmp_path, monkeypatch, capsys
):
    from clip_phi.export import web

    checkpoint(tmp_path, change.get("text", small_phi)())
    for name in change.keys() - {"text"}:
        monkeypatch.setattr(web, name, change[name])
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out/site"), "--to", "web", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert list(tmp_path.glob("out/*")) == list(tmp_path.glob("out/.*")) == []
