"""The plan: what can be counted is counted rightly, and the largest step is really the largest."""

import json

import pytest
import torch

from clip_phi.cli import main
from clip_phi.plan import CARDS, Card, Row, as_text, build_model, count_step, make_plan, typical_row
from clip_phi.training.arguments import Stage1Arguments, Stage2Arguments
from modeling_clip_phi import ClipPhiConfig


def small_config():
    """phi-2's width, four of its layers."""
    config = ClipPhiConfig()
    config.text_config.num_hidden_layers = 4
    return config


def plan(gpu, stage=1, **options):
    kind = {1: Stage1Arguments, 2: Stage2Arguments}[stage]
    return make_plan(kind(stage=stage, **options), CARDS[gpu], 0.4, small_config())


@pytest.fixture(scope="module")
def a100():
    return make_plan(Stage1Arguments(stage=1), CARDS["a100-40"], mfu=0.4)


def test_parameters_are_those_of_tinyclip_one_layer_and_phi_2(a100):
    assert a100["trainable_parameters"] == 640 * 2560 + 2560
    assert a100["parameters"] == 61_083_520 - a100_unused() + 1_640_960 + 2_779_683_840
    assert a100["bill_bytes"]["frozen weights"] == 2 * (a100["parameters"] - a100["trainable_parameters"])
    assert a100["bill_bytes"]["trained weights"] == a100["bill_bytes"]["gradients"] == 4 * 1_640_960


def a100_unused():
    """The visual projection of a whole CLIP (640 x 512), which the tower alone has not."""
    return 61_083_520 - (2_842_408_320 - 1_640_960 - 2_779_683_840)


def test_a_token_keeps_at_most_2_5_megabytes_and_six_tenths_of_what_plain_blocks_keep(a100):
    assert 2.0e6 < a100["activation_bytes_per_token"] <= 2.5e6
    arguments = Stage1Arguments(stage=1)
    row = typical_row(arguments)
    kept = {}
    for activation in ("gelu_pytorch_tanh", "gelu_new"):
        config = small_config()
        config.text_config.hidden_act = activation
        model = build_model(config, arguments, torch.bfloat16)
        kept[activation] = count_step(model, row, 2, torch.bfloat16).activations
    assert kept["gelu_pytorch_tanh"] <= 0.6 * kept["gelu_new"]


def test_the_largest_step_fits_and_one_image_more_does_not(a100):
    assert sum(a100["bill_bytes"].values()) <= a100["memory_bytes"]
    assert a100["tokens_per_step"] == a100["images_per_step"] * (49 + 58)
    usual = plan("l4-24")
    needed = sum(usual["bill_bytes"].values()) / 2**30
    exact, less = (
        make_plan(Stage1Arguments(stage=1), Card("a card", gib, 1.0), 0.4, small_config())
        for gib in (needed + 1e-6, needed - 0.01)
    )
    assert exact["images_per_step"] == usual["images_per_step"] == less["images_per_step"] + 1


def test_more_memory_or_checkpointing_is_a_larger_step_and_adamw_a_smaller():
    usual = plan("l4-24", 2)
    assert usual["tokens_per_step"] < plan("a100-40", 2)["tokens_per_step"]
    assert usual["tokens_per_step"] < plan("l4-24", 2, gradient_checkpointing=True)["tokens_per_step"]
    optimizer = plan("l4-24", 2, optimizer="adamw")["bill_bytes"]["optimizer"]
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
    from clip_phi.batching.packing import PACKED_ATTENTION, make_segments

    arguments = Stage1Arguments(stage=1)
    # Text alone: beside an image the kernel of variable length keeps the image's keys once more for each branch.
    row = Row(0, (107,), 60)
    config = small_config()
    config.text_config.num_hidden_layers = 2
    config.text_config.vocab_size = 50300
    counted = count_step(build_model(config, arguments, torch.float32), row, 1, None).activations
    torch.manual_seed(0)
    from modeling_clip_phi import ClipPhiForCausalLM

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

    embeds = torch.randn(1, row.length, 2560, requires_grad=True)
    mask = torch.ones((1, 1, 1, 1), dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=torch.arange(row.length).unsqueeze(0),
            use_cache=False,
            segments=make_segments([row.branch_ids]),
        )
    measured = sum(size for size, _ in saved.values())
    assert counted == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gpu", "a200"], "unknown --gpu a200: it is one of a100-40, a100-80, h100-80"),
        (["--gpu", "l4-24", "--mfu", "2"], "--mfu must be more than 0 and at most 1"),
        (["--gpu", "l4-24", "--lora_rank", "8"], "--lora_rank is of stage 2, not of stage 1"),
    ],
)
def test_a_bad_option_is_one_line_and_status_2(argv, message, capsys):
    assert main(["plan", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_what_does_not_fit_says_so_and_what_to_try(a100):
    none = make_plan(Stage1Arguments(stage=1), Card("a small card", 1.0, 30.0), 0.4, small_config())
    assert not none["fits"] and none["tokens_per_step"] == 0
    assert "Not even one image fits: try --gradient_checkpointing" in as_text(none)
    assert "largest --tokens_per_step" in as_text(a100)


def test_stage_2_trains_lora_of_the_rank_asked_for():
    wide, narrow = (plan("h100-80", 2, lora_rank=rank)["trainable_parameters"] for rank in (64, 8))
    projector = 640 * 2560 + 2560
    assert wide - projector == 8 * (narrow - projector)


def test_the_command_prints_json_for_a_checkpoint(tmp_path, capsys):
    small_config().save_pretrained(tmp_path)
    assert main(["plan", "--gpu", "rtx-8", "--checkpoint", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(plan("rtx-8")))
