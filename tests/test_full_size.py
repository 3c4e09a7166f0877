"""Training at phi-2's and TinyCLIP's true widths, from checkpoints in the Hub's formats: make test-full-size.

Two of phi-2's 32 layers, so that this takes 3 GB and a minute; python benchmarks/full_size.py runs all of them."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, CLIPModel

ROOT = Path(__file__).parent.parent
PROJECTOR = 640 * 2560 + 2560
LORA = 2 * 64 * (4 * (2560 + 2560) + 2 * (2560 + 10240))
pytestmark = pytest.mark.full_size


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("full-size")


@pytest.fixture(scope="module")
def result(folder):
    script = [sys.executable, "benchmarks/full_size.py"]
    command = [*script, "--layers", "2", "--folder", str(folder), "--json", str(folder / "json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "json").read_text())


def test_both_stages_run_and_the_loss_falls(result):
    for stage in ("stage1", "stage2"):
        first, last = result[stage]["losses"]
        assert math.log(51200) + 2 > first > last, stage


def test_what_is_saved_is_what_was_trained(result, folder):
    assert result["stage1"]["checkpoint_weights"] == PROJECTOR
    assert result["stage2"]["checkpoint_weights"] == PROJECTOR + LORA
    saved = {path.relative_to(folder) for path in folder.glob("stage*/**/*.safetensors")}
    found = {path for path in saved if "checkpoints" not in path.parts}
    assert found == {
        Path("stage1/model.safetensors"),
        Path("stage2/model.safetensors"),
        Path("stage2/adapter/adapter_model.safetensors"),
    }
    for path in saved:
        with safe_open(folder / path, framework="pt") as file:
            odd = [name for name in file.keys() if "projector" not in name and "lora_" not in name]  # noqa: SIM118
        assert not odd, f"{path} holds frozen weights"


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_memory_is_the_planned_one_within_a_tenth(result, stage):
    assert abs(result[stage]["plan_error"]) <= 0.1
    assert result[stage]["peak_bytes"] < 4e9


def test_the_backbones_are_in_the_formats_of_the_hub(result, folder):
    config = AutoConfig.from_pretrained(folder / "text")
    assert (config.model_type, config.hidden_size, config.vocab_size, config.resid_pdrop) == ("phi", 2560, 51200, 0.1)
    with safe_open(folder / "text" / "model.safetensors", framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        assert {file.get_slice(name).get_dtype() for name in shapes} == {"F16"}
    assert shapes["lm_head.bias"] == [51200] and shapes["model.embed_tokens.weight"] == [51200, 2560]
    tokenizer = AutoTokenizer.from_pretrained(folder / "text")
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token) == (50295, 50256, None)
    assert tokenizer(" " * 31 + "\t\t").input_ids == [50257, 50294]
    clip, info = CLIPModel.from_pretrained(folder / "vision", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert sum(parameter.numel() for parameter in clip.vision_model.parameters()) == 61_083_520
