"""Answering in 8 bits on a CPU: what is quantised, how near it is, and how it is asked for."""

import json

import torch

from clip_phi.cli import main
from clip_phi.serving.engine import Engine
from clip_phi.serving.int8 import Int8Linear, quantize_decoder


def test_a_layer_in_8_bits_is_near_the_one_in_32():
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 64)
    states = torch.randn(3, 5, 256)
    expected, found = linear(states), Int8Linear(linear)(states)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found - expected).norm() / expected.norm() < 0.02
    assert torch.allclose(Int8Linear(linear)(torch.zeros(1, 256)), linear.bias)  # kept as it is


def test_decoder_and_head_are_quantised_with_lora_folded_in_and_nothing_else(fresh_model):
    from peft import LoraConfig

    fresh_model.float()
    fresh_model.add_adapter(LoraConfig(r=4, target_modules=r"model\.language_model\..*\.(q_proj|fc1)"))
    for name, parameter in fresh_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        expected = fresh_model(input_ids=ids).logits
        quantize_decoder(fresh_model)
        found = fresh_model(input_ids=ids).logits
    assert (found - expected).norm() / expected.norm() < 0.05
    kinds = {name: type(module) for name, module in fresh_model.named_modules()}
    assert kinds["lm_head"] is Int8Linear and kinds["model.language_model.layers.1.mlp.fc1"] is Int8Linear
    left = {name.split(".")[1] for name, kind in kinds.items() if kind is torch.nn.Linear}
    assert left == {"vision_tower", "projector"} and not any("lora" in name for name in kinds)


def test_the_command_line_answers_in_8_bits(checkpoint, tmp_path, capsys, monkeypatch):
    from PIL import Image

    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    asked = []
    load = Engine.__init__

    def noted(self, *options):
        load(self, *options)
        asked.append(type(self.model.lm_head))

    monkeypatch.setattr(Engine, "__init__", noted)
    options = [str(tmp_path / "red.png"), "--model", checkpoint, "--max_new_tokens", "4"]
    for extra in ([], ["--quantization", "int8"]):
        assert main(["caption", *options, "--json", *extra]) == 0
        assert json.loads(capsys.readouterr().out)["caption"] is not None
    assert asked == [torch.nn.Linear, Int8Linear]
