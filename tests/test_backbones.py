"""Each family of decoders and towers is right, or refused in one line: the same in training, evaluation and serving."""

import json

import backbones
import pytest
from backbones import DECODERS, QUICK, REFUSED, TOWERS
from conftest import save_tokenizer
from helpers import run, stage1
from transformers import LlamaConfig, LlamaForCausalLM

from clip_phi.data.synthetic import write_dataset
from clip_phi.evaluation.run import load
from clip_phi.serving.engine import Engine
from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

NO_TOWERS = {family for family, (*_, features) in TOWERS.items() if not features}
QUICK_TOWERS = ["SigLIP and SigLIP 2, fixed size", "DINOv2, fewer pixels than its config", "DINOv2 with registers"]
QUICK_TOWERS += ["ResNet", "Swin", "Pixtral", "SigLIP 2, NaFlex", "ViT-MAE (masks patches)"]


def families(all_of_them, quick):
    """The quick ones run in 'make test', the others in 'make test-backbones'."""
    slow = pytest.mark.backbones
    return [pytest.param(family, marks=() if family in quick else slow) for family in all_of_them]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return backbones.save_tower("CLIP", tmp_path_factory.mktemp("clip"))


@pytest.mark.parametrize("family", families(DECODERS, QUICK))
def test_decoder_is_right_or_refused(family, clip, tmp_path):
    found = backbones.check_decoder(family, clip, tmp_path)
    if family in REFUSED:
        assert "decoders are not supported" in found["refused"] and "\n" not in found["refused"]
    else:
        assert found["refused"] is None
        assert found["packed_vs_alone"] < 1e-5 and found["reload"] == 0 and found["cached"] == 0


@pytest.mark.parametrize("family", families(TOWERS, QUICK_TOWERS))
def test_tower_gives_its_patches_or_is_refused(family, text_backbone, tmp_path):
    found = backbones.check_tower(family, text_backbone, tmp_path)
    if family in NO_TOWERS:
        assert found["tokens"] is None and "not" in found["refused"] and "\n" not in found["refused"]
    else:
        assert found == {"tokens": TOWERS[family][-1], "expected": TOWERS[family][-1], "refused": None}


def test_there_are_enough_families_and_the_script_writes_their_results(tmp_path, capsys):
    assert len(DECODERS.keys() - REFUSED) >= 20 and set(QUICK) <= DECODERS.keys() and REFUSED & set(QUICK)
    backbones.main(["--json", str(tmp_path / "out.json"), "--families", "Bloom", "CLIP"])
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["decoders"].keys() == {"Bloom"} and "Bloom: " in capsys.readouterr().err
    assert found["towers"] == {"CLIP": {"tokens": 16, "expected": 16, "refused": None}}


def test_a_decoder_is_refused_by_the_same_line_in_training_evaluation_and_serving(vision_backbone, tmp_path):
    text = backbones.save_decoder("LFM2", tmp_path / "text")
    model = ClipPhiForCausalLM.from_backbones(vision_backbone, text)
    model.save_pretrained(tmp_path / "model")
    ClipPhiProcessor.from_backbones(vision_backbone, text).save_pretrained(tmp_path / "model")
    line = "'lfm2' decoders are not supported: conv layers mix packed samples; choose one with"
    with pytest.raises(ValueError, match=line):
        load(str(tmp_path / "model"), "cpu")
    with pytest.raises(ValueError, match=line):
        Engine.from_pretrained(str(tmp_path / "model"), "cpu")
    write_dataset(tmp_path / "data", num_train=4, num_val=2)
    options = stage1(tmp_path / "data", (vision_backbone, text), tmp_path / "run", "--max_steps", 1)
    done = run(*options, "--debug", False, expect=2)
    assert f"train_accelerate.py: error: {line}" in done.stderr and not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("family", "options", "features"),
    [
        ("SigLIP and SigLIP 2, fixed size", ("--vision_feature_layer", -1), 16),
        ("DINOv2 with registers", ("--vision_feature_select_strategy", "full"), 21),
    ],
)
def test_training_takes_a_layer_and_a_selection_and_every_row_of_the_vocabulary_may_be_used(
    family, options, features, tmp_path
):
    vision = backbones.save_tower(family, tmp_path / "vision")
    size = save_tokenizer(tmp_path / "text").vocab_size
    config = LlamaConfig(**backbones.TINY | {"vocab_size": size, "hidden_act": "silu"})
    LlamaForCausalLM(config).save_pretrained(tmp_path / "text")
    write_dataset(tmp_path / "data", num_train=8, num_val=2)
    run(*stage1(tmp_path / "data", (vision, tmp_path / "text"), tmp_path / "run", "--max_steps", 2, *options))
    processor = ClipPhiProcessor.from_pretrained(tmp_path / "run")
    assert processor.num_image_tokens == features and processor.image_token_id == size
    found = ClipPhiForCausalLM.from_pretrained(tmp_path / "run").config
    assert str(getattr(found, options[0].removeprefix("--"))) == str(options[1])
    with Engine.from_pretrained(str(tmp_path / "run"), "cpu") as engine:
        assert engine.submit([{"role": "user", "content": "a?"}], max_new_tokens=3).result() is not None


def test_training_refuses_a_layer_that_the_tower_lacks(vision_backbone, text_backbone, tmp_path):
    write_dataset(tmp_path / "data", num_train=4, num_val=2)
    options = stage1(tmp_path / "data", (vision_backbone, text_backbone), tmp_path / "run", "--max_steps", 1)
    done = run(*options, "--vision_feature_layer", 7, "--debug", False, expect=2)
    assert "error: vision_feature_layer 7 is not one of the 4 hidden states (-4 to 3) of the tower" in done.stderr
