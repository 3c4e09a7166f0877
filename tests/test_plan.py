"""The plan: what can be counted is counted rightly, and the largest step is really the largest."""

import json
from functools import cache

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from full_size import count_activations, count_host_syncs
from plan_counting import Ledger, LikeCuda, QuantizedLinear, build_model, count_step
from torch.nn.functional import gelu
from transformers import GPT2Config, LlamaConfig, PhiConfig, PhiForCausalLM

from clip_phi.cli import main
from clip_phi.environment import Gpu, find_gpu
from clip_phi.tools.plan import format_plan, make_plan
from clip_phi.training.arguments import Stage1Arguments, Stage2Arguments
from clip_phi.training.memory import CARDS, Formula
from modeling_clip_phi import ClipPhiConfig, ClipPhiForCausalLM


def small_config():
    """phi-2's width, four of its layers."""
    config = ClipPhiConfig()
    config.text_config.num_hidden_layers = 4
    return config


@cache
def plan(gpu, stage=1, **options):
    kind = {1: Stage1Arguments, 2: Stage2Arguments}[stage]
    return make_plan(kind(stage=stage, **options), CARDS[gpu], 0.4, small_config())


@pytest.fixture(scope="module")
def a100():
    return make_plan(Stage1Arguments(stage=1), CARDS["a100-40"], 0.4, ClipPhiConfig())


def test_parameters_are_those_of_tinyclip_one_layer_and_phi_2(a100):
    assert a100["trainable_parameters"] == 640 * 2560 + 2560
    assert a100["parameters"] == 61_083_520 + 1_640_960 + 2_779_683_840
    assert a100["bill_bytes"]["frozen weights"] == 2 * (a100["parameters"] - a100["trainable_parameters"])
    assert a100["bill_bytes"]["trained weights"] == a100["bill_bytes"]["gradients"] == 4 * 1_640_960


def kept_by_plain_blocks(activation: str) -> float:
    """Bytes a token of phi-2's 32 blocks as transformers has them, frozen, behind two padded rows of 107 tokens."""
    config = ClipPhiConfig().text_config
    config.hidden_act = activation
    with torch.device("meta"):
        decoder = PhiForCausalLM(config).to(torch.bfloat16).requires_grad_(False).train().model
        states = torch.empty(2, 107, 2560, dtype=torch.bfloat16, requires_grad=True)
        positions = torch.empty(1, 107, dtype=torch.long)
    ledger = Ledger()
    with ledger, LikeCuda(torch.bfloat16):
        rotary = decoder.rotary_emb(states, positions)
        for layer in decoder.layers:
            states = layer(states, attention_mask=None, position_embeddings=rotary)
        return ledger.now / (2 * 107)


def test_a_token_keeps_at_most_2_5_megabytes_and_six_tenths_of_what_plain_blocks_keep(a100):
    ours = a100["activation_bytes_per_token"]
    assert 1.4e6 < ours <= 1.7e6
    plain = kept_by_plain_blocks("gelu_new")  # phi-2's own, one kernel for each of its operations: 5.6 MB
    assert ours <= 0.6 * plain
    assert kept_by_plain_blocks("gelu_pytorch_tanh") < 0.6 * plain


def test_the_largest_step_fits_and_one_image_more_does_not(a100):
    assert sum(a100["bill_bytes"].values()) <= a100["memory_bytes"]
    assert a100["max_tokens_per_batch"] == a100["images_per_step"] * (49 + 58)
    usual = plan("l4-24")
    needed = sum(usual["bill_bytes"].values()) / 2**30
    exact, less = (
        make_plan(Stage1Arguments(stage=1), Gpu("", 1.0, "a-card", "a card", gib), 0.4, small_config())
        for gib in (needed + 1e-6, needed - 0.01)
    )
    assert exact["images_per_step"] == usual["images_per_step"] == less["images_per_step"] + 1


def test_more_memory_or_checkpointing_is_a_larger_step_and_adamw_a_smaller():
    usual = plan("l4-24", 2)
    assert usual["max_tokens_per_batch"] < plan("a100-40", 2)["max_tokens_per_batch"]
    whole, checkpointed = (
        make_plan(Stage2Arguments(stage=2, gradient_checkpointing=each), CARDS["l4-24"], 0.4, ClipPhiConfig())
        for each in (False, True)
    )
    assert whole["max_tokens_per_batch"] < checkpointed["max_tokens_per_batch"]
    optimizer = plan("l4-24", 2, optim="adamw_torch_fused")["bill_bytes"]["optimizer"]
    assert optimizer == 8 * usual["trainable_parameters"] > 3.5 * usual["bill_bytes"]["optimizer"]


def test_a_sample_is_a_caption_and_sharing_its_image_makes_it_cheaper():
    five, one = (plan("h100-80", captions_per_image=count) for count in (5, 1))
    assert one["flops_per_sample"] / five["flops_per_sample"] > 2.2
    assert (five["samples_per_epoch"], one["samples_per_epoch"]) == (5 * 118_287, 118_287)
    expected = 0.4 * 989.4e12 / five["flops_per_sample"]
    assert five["samples_per_second"] == pytest.approx(expected)
    assert five["hours_per_epoch"] == pytest.approx(five["samples_per_epoch"] / expected / 3600)


def test_a_frozen_decoder_costs_four_flops_per_parameter_and_token(a100):
    decoder = 2_779_683_840 - 51200 * 2560  # the embedding is looked up, not multiplied with
    expected = 4 * decoder * (49 + 58) / 5
    assert a100["flops_per_sample"] == pytest.approx(expected, rel=0.03)


def test_what_is_counted_without_tensors_is_what_tensors_take():
    """The same step on the CPU, booked by torch itself: all that is saved for the backward pass."""
    from clip_phi.batching.attention import PACKED_ATTENTION, make_pack_layout

    arguments = Stage1Arguments(stage=1)
    # Text alone: beside an image the kernel of variable length keeps the image's keys once more for each branch.
    ids = [1] * 107
    config = small_config()
    config.text_config.num_hidden_layers = 2
    config.text_config.vocab_size = 50300
    counted = count_step(build_model(config, arguments, torch.float32), [ids], 60, None).activations
    torch.manual_seed(0)
    model = ClipPhiForCausalLM(config)
    model.freeze_backbones()
    model.set_attn_implementation({"text_config": PACKED_ATTENTION})
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    embeds = torch.randn(1, len(ids), 2560, requires_grad=True)
    mask = torch.ones((1, 1, 1, 1), dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=torch.arange(len(ids)).unsqueeze(0),
            use_cache=False,
            pack_layout=make_pack_layout([ids]),
        )
    measured = sum(size for size, _ in saved.values())
    assert counted == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gpu", "a200"], "unknown --gpu a200: it is one of a100-40, a100-80, h100-80"),
        (["--gpu", "l4-24", "--lora_r", "8"], "--lora_r requires --stage 2, not --stage 1"),
        (
            ["--gpu", "l4-24", "--stage", "2", "--tune_decoder", "full", "--quantization", "nf4"],
            "--quantization nf4: quantized weights cannot be trained",
        ),
        (["--gpu", "l4", "--stage", "2", "--tune_decoder", "full", "--lora_r", "8"], "--lora_r has no effect with"),
    ],
)
def test_a_bad_option_is_one_line_and_status_2(argv, message, capsys):
    assert main(["plan", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_what_does_not_fit_says_so_and_what_to_try(a100):
    none = make_plan(Stage1Arguments(stage=1), Gpu("", 30.0, "small", "a small card", 1.0), 0.4, small_config())
    assert not none["fits"] and none["max_tokens_per_batch"] == 0
    assert "Not even one image fits: try --gradient_checkpointing" in format_plan(none)
    assert "largest --max_tokens_per_batch" in format_plan(a100)


def test_stage_2_trains_lora_of_the_rank_asked_for():
    wide, narrow = (plan("h100-80", 2, lora_r=rank)["trainable_parameters"] for rank in (64, 8))
    projector = 640 * 2560 + 2560
    assert wide - projector == 8 * (narrow - projector)


def test_the_command_prints_json_for_a_checkpoint(tmp_path, capsys):
    small_config().save_pretrained(tmp_path)
    assert main(["plan", "--gpu", "rtx-8", "--model", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(plan("rtx-8")))


def test_the_sums_of_qlora_are_those_of_its_parts():
    """phi-2's width, four layers: each has 4 x 2560 x 2560 and 2 x 2560 x 10240 weights in linear layers."""
    plans = {kind: plan("l4-24", 2, quantization=kind) for kind in ("none", "nf4", "int8")}
    linear = 4 * 12 * 2560 * 2560
    bits = {kind: each["bill_bytes"]["frozen weights"] * 8 for kind, each in plans.items()}
    assert (bits["none"] - bits["nf4"]) / linear == pytest.approx(16 - 4 - 8 / 64 - 32 / 64 / 256, abs=1e-3)
    assert (bits["none"] - bits["int8"]) / 8 == linear - 4 * 4 * (5 * 2560 + 10240)  # a float32 for each row
    assert len({each["parameters"] for each in plans.values()}) == 1
    for name in ("trained weights", "gradients", "optimizer"):
        assert len({each["bill_bytes"][name] for each in plans.values()}) == 1
    kept = {kind: each["activation_bytes_per_token"] for kind, each in plans.items()}
    assert kept["none"] == kept["nf4"] < kept["int8"]  # which keeps its input, too


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_planned_quantised_layer_takes_and_keeps_what_a_real_one_does(kind):
    torch.manual_seed(0)
    if kind == "nf4":
        real = Linear4bit(512, 1100, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True)
        real.bias.data = real.bias.data.bfloat16()  # as it answers in, or a copy would be made of it
    else:
        real = Linear8bitLt(512, 1100, has_fp16_weights=False)
    real.requires_grad_(False).to("cpu")
    x = torch.randn(1, 64, 512, requires_grad=True)
    ledger = Ledger()
    with ledger:
        answer = real(gelu(x))  # gelu keeps its input
        kept = ledger.now - answer.nbytes
    if kind == "nf4":
        state = real.weight.quant_state
        parts = (real.weight.data, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
        weight_bytes = sum(part.nbytes for part in parts)
    else:
        weight_bytes = real.state.CB.nbytes + real.state.SCB.nbytes
    with torch.device("meta"):
        planned = QuantizedLinear(512, 1100, dtype=torch.bfloat16).requires_grad_(False)
    planned.kind = kind
    x = torch.empty(1, 64, 512, device="meta", requires_grad=True)
    ledger = Ledger()
    with ledger:
        planned_answer = planned(gelu(x))
        assert ledger.now - planned_answer.nbytes == kept == {"nf4": 0, "int8": x.nbytes}[kind]
    assert planned.weight_bytes == weight_bytes
    assert (planned_answer.shape, planned_answer.dtype) == (answer.shape, answer.dtype)


def test_full_tuning_trains_every_weight_of_the_decoder_in_float32():
    full, lora = (plan("l4-24", 2, tune_decoder=kind) for kind in ("full", "lora"))
    layer = 4 * (2560 * 2560 + 2560) + 2 * 2560 * 10240 + 10240 + 2560 + 2 * 2560
    decoder = 4 * layer + 2 * 51200 * 2560 + 51200 + 2 * 2560
    assert full["trainable_parameters"] == decoder + 640 * 2560 + 2560
    bill = full["bill_bytes"]
    assert bill["trained weights"] == bill["gradients"] == 4 * full["trainable_parameters"]
    assert bill["optimizer"] == pytest.approx((2 + 8 / 256) * full["trainable_parameters"], rel=1e-3)
    assert bill["frozen weights"] == 2 * (full["parameters"] - full["trainable_parameters"])
    # Autocast keeps a bfloat16 copy of each linear weight for the backward pass, however small the step is.
    tokens = full["images_per_step"] * full["tokens_per_image"]
    copies = bill["activations"] - tokens * full["activation_bytes_per_token"]
    assert copies == pytest.approx(2 * 4 * 12 * 2560 * 2560, rel=0.02)
    # A weight that is trained takes a third product.
    assert full["flops_per_sample"] / lora["flops_per_sample"] > 1.3


def test_a_paged_optimizer_is_as_large_and_leaves_its_room_to_the_step():
    usual, paged = (plan("l4-24", 2, tune_decoder="full", optim=kind) for kind in ("adam8bit", "paged_adam8bit"))
    assert paged["pageable_bytes"] == paged["bill_bytes"]["optimizer"] == usual["bill_bytes"]["optimizer"]
    assert usual["pageable_bytes"] == 0
    assert paged["images_per_step"] > usual["images_per_step"]
    taken = sum(paged["bill_bytes"].values())
    assert paged["memory_bytes"] < taken <= paged["memory_bytes"] + paged["pageable_bytes"]
    assert "the optimizer may leave the card" in format_plan(paged)
    assert "the optimizer may leave the card" not in format_plan(usual)


def test_on_a_cpu_all_is_in_float32_and_adamw_is_the_default():
    found = plan("cpu-16", 2)
    bill = found["bill_bytes"]
    assert bill["frozen weights"] == 4 * (found["parameters"] - found["trainable_parameters"])
    assert bill["optimizer"] == 8 * found["trainable_parameters"]
    assert found["activation_bytes_per_token"] > 1.3 * plan("l4-24", 2)["activation_bytes_per_token"]


# The formula and the counting


def tiny_config(kind, layers=2):
    shape = {"hidden_size": 256, "num_hidden_layers": layers, "num_attention_heads": 4, "vocab_size": 4000}
    text = {
        "phi": lambda: PhiConfig(**shape, intermediate_size=1024),
        "llama": lambda: LlamaConfig(**shape, intermediate_size=704, num_key_value_heads=2),
    }[kind]()
    return ClipPhiConfig(text_config=text, image_token_id=3999)


def sample(*lengths, prefix=49):
    return [0] * prefix + [number for number, length in enumerate(lengths, 1) for _ in range(length)]


def counted(config, arguments, card, conversation_ids, supervised):  # card: as of Formula
    """What Formula.step and the sizes of the trained tensors should be."""
    dtype = getattr(torch, card.dtype)
    model = build_model(config, arguments, dtype, card.has_varlen)
    counts = count_step(model, conversation_ids, supervised, dtype if dtype.itemsize == 2 else None)
    pixels = sum(0 in ids for ids in conversation_ids) * 3 * config.vision_config.image_size**2 * 4
    items = {"activations": counts.activations, "peak": max(counts.logits, counts.layers), "pixels": pixels}
    items["tower"] = max(0, counts.tower - sum(items.values()))
    trained = sorted(each.numel() for each in model.parameters() if each.requires_grad)
    return items, counts, trained, sum(each.numel() for each in model.parameters())


def compare(config, arguments, card, conversation_ids, supervised, tolerance=0.02):
    formula = Formula(config, arguments, card)
    items, tower_flops, flops = formula.step(conversation_ids, supervised)
    expected, counts, trained, parameters = counted(config, arguments, formula.card, conversation_ids, supervised)
    assert sorted(formula.trained) == trained and formula.parameters == parameters
    assert items["activations"] == pytest.approx(expected["activations"], rel=tolerance)
    if arguments.gradient_checkpointing:  # the counting holds what a layer makes anew for longer than a GPU does
        assert items["loss or a layer, at its peak"] < expected["peak"]
    else:
        assert sum(items.values()) == pytest.approx(sum(expected.values()), rel=tolerance)
    assert tower_flops == pytest.approx(counts.tower_flops, rel=0.001)
    assert tower_flops + flops == pytest.approx(counts.flops, rel=0.001)


OPTIONS = {
    "stage 1": (Stage1Arguments, {}),
    "stage 1, varlen": (Stage1Arguments, {"attention": "varlen"}),
    "LoRA": (Stage2Arguments, {"lora_r": 8}),
    "no dropout": (Stage2Arguments, {"lora_dropout": 0.0}),
    "nf4": (Stage2Arguments, {"quantization": "nf4"}),
    "int8": (Stage2Arguments, {"quantization": "int8"}),
    "full": (Stage2Arguments, {"tune_decoder": "full"}),
}
DEVICES = {
    "bfloat16": CARDS["a100-80"],
    "float16, SDPA": CARDS["t4"],
    "float32, CPU": CARDS["cpu-16"],
}
PACK = ([sample(150, 200), sample(30), sample(7, 9), sample(90, prefix=0)] * 10, 10 * 400)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["phi", "llama"])
def test_the_formula_gives_what_is_counted(kind, options, device):
    stage, values = OPTIONS[options]
    arguments = stage(stage=1 if stage is Stage1Arguments else 2, **values)
    compare(tiny_config(kind), arguments, DEVICES[device], *PACK)


def test_two_linear_layers_of_the_projector_are_counted():
    config = tiny_config("phi")
    config.projector_type = "mlp"
    compare(config, Stage1Arguments(stage=1), CARDS["a100-80"], *PACK)


@pytest.mark.full_size
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", OPTIONS)
def test_the_formula_gives_what_is_counted_for_phi_2(options, device, checkpointing):
    stage, values = OPTIONS[options]
    arguments = stage(stage=1 if stage is Stage1Arguments else 2, gradient_checkpointing=checkpointing, **values)
    pack = (
        ([sample(165, 165)] * 24, 24 * 250)
        if stage is Stage2Arguments
        else ([sample(11, 12, 12, 11, 12)] * 86, 86 * 63)
    )
    compare(ClipPhiConfig(), arguments, DEVICES[device], *pack)


def test_a_decoder_without_a_formula_is_refused():
    config = ClipPhiConfig(text_config=GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=100), image_token_id=99)
    with pytest.raises(ValueError, match="plan knows decoder layers like Phi's and Llama's, not those of gpt2"):
        Formula(config, Stage1Arguments(stage=1), CARDS["l4-24"])


# What --attention, the norms' outputs and LoRA's inputs are chosen for


def test_a_token_of_phi_2_keeps_no_more_than_promised():
    """Each layer keeps the same, so that two sizes give the count for all 32: full_size.py --count."""
    two, four = count_activations(2), count_activations(4)
    kept = {name: two[name] + 15 * (four[name] - two[name]) for name in two}
    assert kept["stage1"] <= 1.7 and kept["stage2"] <= 4.0 and kept["stage2_dropout0"] <= 2.9 and kept["nf4"] <= 4.1
    assert count_host_syncs() == 2  # one in the micro-batch, one in the step
    for name, arguments in {
        "stage1": Stage1Arguments(stage=1),
        "stage2": Stage2Arguments(stage=2),
        "nf4": Stage2Arguments(stage=2, quantization="nf4"),
        "int8": Stage2Arguments(stage=2, quantization="int8"),
        "full": Stage2Arguments(stage=2, tune_decoder="full"),
    }.items():
        planned = make_plan(arguments, CARDS["a100-80"], 0.4, ClipPhiConfig())
        assert planned["mb_per_token"] == pytest.approx(kept[name], rel=0.01), name


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA L40", "l40"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("Tesla T4", "t4"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA GeForce RTX 4070 Ti", "rtx4070ti"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("NVIDIA H100 80GB HBM3", "h100"),
    ],
)
def test_a_card_is_found_by_its_whole_name(name, key):
    assert find_gpu(name) == CARDS[key]


def test_no_card_is_taken_for_another():
    assert find_gpu("NVIDIA T400 4GB") is None and find_gpu("NVIDIA GH200 480GB").torch_name == "GH200"
    assert CARDS["l4"] is CARDS["l4-24"] and CARDS["t4"] is CARDS["t4-16"] and not CARDS["t4"].has_varlen
