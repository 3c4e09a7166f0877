"""What training is set up with: LoRA's targets in any decoder, counted FLOPs, groups, schedules."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import CLIPVisionConfig, GPT2Config, LlamaConfig, PhiConfig

from clip_phi.batching.attention import PACKED_ATTENTION
from clip_phi.batching.encode import Encoded
from clip_phi.batching.packing import build_shared_prefix, pack_samples
from clip_phi.environment import peak_flops
from clip_phi.training.arguments import Stage1Arguments, Stage2Arguments
from clip_phi.training.logger import FlopsPerToken
from clip_phi.training.model import SharedDropout, add_lora
from clip_phi.training.optim import make_optimizer, make_scheduler
from modeling_clip_phi import ClipPhiConfig, ClipPhiForCausalLM

SHAPE = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
DECODERS = {
    "phi": (PhiConfig(**SHAPE, num_attention_heads=2), {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}),
    "llama": (
        LlamaConfig(**SHAPE, num_attention_heads=2),
        {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    ),
    "gpt2": (GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2), {"c_attn", "c_proj", "c_fc"}),
}


def make_model(text):
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=16
    )
    torch.manual_seed(0)
    model = ClipPhiForCausalLM(ClipPhiConfig(vision_config=vision, text_config=text, image_token_id=319))
    model.freeze_backbones()
    return model


@pytest.mark.parametrize("kind", DECODERS)
def test_lora_finds_every_linear_layer_of_a_decoders_blocks_and_none_elsewhere(kind):
    text, expected = DECODERS[kind]
    model = make_model(text)
    add_lora(model, Stage2Arguments(stage=2, lora_r=2))
    end = ".lora_A.default"
    adapted = [name.removesuffix(end) for name, _ in model.named_modules() if name.endswith(end)]
    assert {name.rpartition(".")[2] for name in adapted} == expected
    assert all(name.startswith("model.language_model.") for name in adapted)
    assert len(adapted) == 2 * (len(expected) + (kind == "gpt2"))  # two blocks; GPT-2's have two c_proj


def test_unknown_lora_targets_are_named_beside_those_that_there_are():
    model = make_model(DECODERS["llama"][0])
    with pytest.raises(ValueError, match="no linear layer dense, fc1; it has down_proj, gate_proj"):
        add_lora(model, Stage2Arguments(stage=2, lora_targets="q_proj, fc1,dense"))


@pytest.mark.parametrize("kind", ["phi", "llama"])
def test_layers_with_one_input_share_their_lora_dropout_and_others_have_their_own(kind):
    text, _ = DECODERS[kind]
    model = make_model(text)
    add_lora(model, Stage2Arguments(stage=2, lora_r=2, lora_dropout=0.3))
    masks = {}
    for name, module in model.named_modules():
        if name.endswith(".lora_A.default"):
            layer = name.removesuffix(".lora_A.default").removeprefix("model.language_model.layers.")
            seen = masks.setdefault(layer, [])
            module.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0] != 0))
    ids = torch.arange(12).unsqueeze(0)
    for _ in range(2):
        model.train()(input_ids=ids)
    model.eval()(input_ids=ids)
    groups = {"phi": ["self_attn.v_proj", "mlp.fc1"], "llama": ["self_attn.v_proj"]}[kind]
    for layer in ("0", "1"):
        first, second, evaluated = masks[f"{layer}.self_attn.q_proj"]
        assert all(torch.equal(masks[f"{layer}.{name}"][0], first) for name in groups)
        assert not first.all() and not torch.equal(first, second) and evaluated.all()
    assert not torch.equal(masks["0.self_attn.q_proj"][0], masks["1.self_attn.q_proj"][0])
    other = {"phi": "self_attn.dense", "llama": "self_attn.o_proj"}[kind]
    assert not torch.equal(masks[f"0.{other}"][0], masks["0.self_attn.q_proj"][0])
    (dropped,) = {
        id(module.dropped): module.dropped for module in model.modules() if hasattr(module, "dropped")
    }.values()
    assert len(dropped) == 0  # nothing is held after a forward pass


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_shared_dropout_has_the_statistics_of_dropout(p):
    torch.manual_seed(0)
    drop, ones = SharedDropout(p, WeakTensorKeyDictionary()), torch.ones(1_000_001, requires_grad=True)
    dropped = drop(2 * ones)
    kept = dropped != 0
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=5 * (p * (1 - p) / 1e6) ** 0.5)
    torch.testing.assert_close(dropped[kept], torch.full_like(dropped[kept], 2 / (1 - p)), rtol=1e-4, atol=0)
    for lag in (1, 2, 3, 4, 5):  # values are independent, also those whose bits are from one number
        assert (kept[lag:] & kept[:-lag]).float().mean().item() == pytest.approx((1 - p) ** 2, abs=2e-3)
    (gradient,) = torch.autograd.grad(dropped.sum(), ones)
    torch.testing.assert_close(gradient, dropped.detach())
    assert drop.eval()(ones) is ones


def test_lora_dropout_is_the_same_when_a_layer_is_computed_again():
    model = make_model(DECODERS["phi"][0])
    add_lora(model, Stage2Arguments(stage=2, lora_r=2, lora_dropout=0.3))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(3)
        ids = torch.arange(12).unsqueeze(0)
        loss = model.train()(input_ids=ids, labels=ids).loss
        trained = [parameter for name, parameter in model.named_parameters() if "lora_A" in name]
        gradients.append(torch.autograd.grad(loss, trained))
    torch.testing.assert_close(*gradients)


def test_the_flops_of_the_log_are_those_that_torch_counts_but_for_attention_and_the_towers_class_token():
    model = make_model(DECODERS["phi"][0])
    model.set_attn_implementation({"text_config": PACKED_ATTENTION})
    tree = build_shared_prefix([Encoded([5, 6, 7, 8], [5, 6, 7, 8]), Encoded([9, 10], [9, 10])], [319] * 4, "drawn")
    pack = pack_samples([tree], torch.randn(1, 3, 32, 32), pad_token_id=0)
    with FlopCounterMode(display=False) as counter:
        model(**pack.inputs, use_cache=False).loss.backward()
    with FlopCounterMode(display=False) as tower, torch.no_grad():
        model.model.vision_tower(pack.inputs["pixel_values"])
    projector = 4 * sum(weight.numel() for weight in model.model.projector.parameters() if weight.dim() == 2)
    costs = FlopsPerToken.of(model, 4)
    tokens = pack.inputs["input_ids"].numel()
    expected = costs.token * tokens + costs.supervised * pack.num_supervised + projector * 4
    attention = counter.get_total_flops() - tower.get_total_flops() - expected
    assert attention == 0  # torch counts it on CUDA alone
    work = costs.counts_of(pack)
    assert (work.samples, work.supervised, work.tokens) == (2, pack.num_supervised, tokens)
    assert work.flops == costs.token * tokens + costs.supervised * work.supervised + costs.image


def test_projector_and_lora_have_learning_rates_of_their_own_and_biases_no_decay():
    model = make_model(DECODERS["phi"][0])
    arguments = Stage2Arguments(stage=2, lora_r=2, weight_decay=0.1, learning_rate=1e-3, lora_learning_rate=2e-3)
    add_lora(model, arguments)
    model.model.projector.requires_grad_(True)
    optimizer = make_optimizer(model, arguments, torch.device("cpu"))
    found = {
        (group["name"], group["lr"], group["weight_decay"], len(group["params"])) for group in optimizer.param_groups
    }
    assert found == {("projector", 1e-3, 0.1, 1), ("projector", 1e-3, 0.0, 1), ("lora", 2e-3, 0.1, 24)}


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("constant_with_warmup", [0, 0.5, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0, 0.5, 1, *((1 + math.cos(math.pi * share)) / 2 for share in (0.25, 0.5, 0.75))]),
    ],
)
def test_learning_rates_rise_and_fall_as_asked(shape, expected):
    model = make_model(DECODERS["phi"][0])
    arguments = Stage1Arguments(stage=1, learning_rate=2.0, lr_scheduler_type=shape, warmup_ratio=0.34)
    optimizer = make_optimizer(model, arguments, torch.device("cpu"))
    scheduler = make_scheduler(optimizer, arguments, 6)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"] / 2)
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 80GB HBM3", 989.4), ("Tesla T4", 65)],
)
def test_the_peak_of_a_gpu_is_found_by_its_name(name, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == tflops * 1e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Something new")
    assert peak_flops(torch.device("cuda")) is None and peak_flops(torch.device("cpu")) is None
