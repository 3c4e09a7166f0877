"""Training and generation on a CUDA device: make test-gpu. Without a device all of it is skipped."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, metrics, run, stage1, stage2

from clip_phi.batching.attention import PACKED_ATTENTION, SDPA_PACKED_ATTENTION, has_varlen_kernel
from clip_phi.batching.encode import Encoded
from clip_phi.batching.packing import build_shared_prefix, pack_samples
from clip_phi.data.synthetic import write_dataset
from modeling_clip_phi import ClipPhiForCausalLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEMO = [ROOT / "examples/demo_backbones" / part for part in ("vision", "text")]
LITTLE = ("--num_sample_texts", 1, "--max_steps", 6, "--eval_steps", 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, num_train=24, num_val=4)
    return folder


def train(*options, **environment):
    return run(*options, launcher=(), **environment)


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    """A model of stage 1."""
    output = tmp_path_factory.mktemp("one") / "run"
    train(*stage1(data, DEMO, output, *LITTLE, "--warmup_ratio", 0, "--learning_rate", 0.01))
    losses = [*metrics(output, "loss").values()]
    assert losses[-1] < losses[0] - 0.1
    return output


def assert_learnt(output):
    losses = metrics(output, "eval_loss")
    assert losses[6] < losses[1], losses


def precision_of(output):
    return json.loads((output / "run.json").read_text())["mixed_precision"]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "no"])
@pytest.mark.parametrize("attention", ["sdpa", "auto"])
def test_stage_2_learns_in_every_precision(precision, attention, one, data, tmp_path):
    train(
        *stage2(data, one, tmp_path, *LITTLE, "--lora_learning_rate", 0.001, "--attention", attention),
        ACCELERATE_MIXED_PRECISION=precision,
    )
    assert_learnt(tmp_path)
    assert precision_of(tmp_path) == precision


@pytest.mark.parametrize(
    "options",
    [
        ("--quantization", "nf4"),
        ("--quantization", "int8"),
        ("--quantization", "nf4", "--gradient_checkpointing", "true", "--optim", "paged_adam8bit"),
        ("--gradient_checkpointing", "true", "--optim", "adamw_torch_fused"),
    ],
    ids=lambda options: " ".join(options[1::2]),
)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_stage_2_learns_with_less_memory(options, precision, one, data, tmp_path):
    train(
        *stage2(data, one, tmp_path, *LITTLE, "--lora_learning_rate", 0.001, *options),
        ACCELERATE_MIXED_PRECISION=precision,
    )
    assert_learnt(tmp_path)


def test_the_decoder_is_tuned_whole(one, data, tmp_path):
    train(
        *stage2(data, one, tmp_path, *LITTLE, "--tune_decoder", "full", "--learning_rate", 0.0002),
        ACCELERATE_MIXED_PRECISION="bf16",
    )
    assert_learnt(tmp_path)


@pytest.mark.parametrize("optimizer", ["adam8bit", "paged_adam8bit"])
def test_a_resumed_run_continues_the_losses(optimizer, one, data, tmp_path):
    options = ("--optim", optimizer, "--lora_r", 64, "--save_steps", 3, "--num_sample_texts", 0)
    whole = stage2(data, one, tmp_path / "whole", *options, "--max_steps", 6)
    train(*whole, ACCELERATE_MIXED_PRECISION="bf16")
    place = tmp_path / "whole/checkpoints/step-00000003"
    train(
        *stage2(data, one, tmp_path / "again", *options, "--max_steps", 6, "--resume_from_checkpoint", place),
        ACCELERATE_MIXED_PRECISION="bf16",
    )
    expected, found = (metrics(tmp_path / name, "loss") for name in ("whole", "again"))
    assert [found[step] for step in (4, 5, 6)] == pytest.approx([expected[step] for step in (4, 5, 6)], rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_kernels_give_the_loss_and_gradient_of_float32(dtype):
    if not has_varlen_kernel(torch.device("cuda"), dtype):
        pytest.skip("no varlen kernel")
    torch.manual_seed(0)
    model = ClipPhiForCausalLM.from_backbones(*map(str, DEMO)).cuda()
    model.model.projector.requires_grad_(True)
    size, patch = model.config.vision_config.image_size, model.config.vision_config.patch_size
    patches = (size // patch) ** 2
    texts = [[[5 + i + j for j in range(4 + 3 * i)] for i in range(number)] for number in (3, 1, 2)]
    samples = [
        build_shared_prefix([Encoded(ids, ids) for ids in each], [model.config.image_token_id] * patches, "")
        for each in texts
    ]
    pack = pack_samples(samples, torch.randn(3, 3, size, size), 0).to(torch.device("cuda"))
    found = {}
    for name, attention, autocast in (
        ("float32", SDPA_PACKED_ATTENTION, None),
        ("sdpa", SDPA_PACKED_ATTENTION, dtype),
        ("varlen", PACKED_ATTENTION, dtype),
    ):
        model.set_attn_implementation({"text_config": attention})
        model.zero_grad()
        with torch.autocast("cuda", autocast or torch.float16, enabled=autocast is not None):
            loss = model(**pack.inputs, use_cache=False, num_items_in_batch=pack.num_supervised).loss
        loss.backward()
        found[name] = loss.item(), model.model.projector.weight.grad.clone()
    for name in ("sdpa", "varlen"):
        assert found[name][0] == pytest.approx(found["float32"][0], rel=0.01)
        difference = (found[name][1] - found["float32"][1]).norm() / found["float32"][1].norm()
        assert difference < 0.05, name


def test_captions_are_written_on_the_device(one, data, tmp_path):
    command = [sys.executable, "-m", "clip_phi.cli", "caption", str(data / "val2017"), "--model", str(one)]
    command += ["--output", str(tmp_path / "captions.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4" in done.stdout + done.stderr


def test_doctor_finds_no_problem_with_the_device():
    done = subprocess.run(
        [sys.executable, "-m", "clip_phi.cli", "doctor", "--json"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stderr
    checks = json.loads(done.stdout.splitlines()[-1])["checks"]
    assert {each["status"] for each in checks if each["name"] in ("8-bit optimizer", "training step")} == {"ok"}
