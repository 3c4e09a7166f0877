"""What was released keeps loading: the checkpoints in tests/artifacts, one folder a version, made by make.py there."""

import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import modeling_clip_phi
from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

HERE = Path(__file__).parent / "artifacts"
MAKE = runpy.run_path(str(HERE / "make.py"))
VERSIONS = sorted(path.name for path in HERE.iterdir() if path.is_dir() and path.name[0].isdigit())


def test_this_version_has_an_artifact():
    assert modeling_clip_phi.__version__ in VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
def test_delta_of_every_version_loads_and_answers_as_it_did(version):
    folder = HERE / version / "delta"
    vision, text = MAKE["BACKBONES"]
    model = ClipPhiForCausalLM.from_pretrained(folder, vision_backbone=vision, text_backbone=text)
    processor = ClipPhiProcessor.from_pretrained(folder)
    assert processor.image_token_id == model.config.image_token_id
    answers_as_it_did(model, folder, processor.num_image_tokens)


@pytest.mark.parametrize("version", VERSIONS)
def test_merged_checkpoint_of_every_version_loads_and_answers_as_it_did(version):
    model = ClipPhiForCausalLM.from_pretrained(HERE / version / "merged")
    answers_as_it_did(model, HERE / version / "merged", 4)


def answers_as_it_did(model, folder, num_image_tokens):
    with torch.no_grad():
        logits = model(**MAKE["inputs"](model.config, num_image_tokens)).logits[0, -1].float()
    expected = load_file(folder / "expected.safetensors")["logits"]
    assert logits.argmax() == expected.argmax()
    torch.testing.assert_close(logits, expected, rtol=2e-2, atol=2e-3 * expected.abs().max().item())
