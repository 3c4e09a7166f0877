import json

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, SiglipVisionConfig

from modeling_clip_phi import ClipPhiConfig, ClipPhiForCausalLM


def test_default_is_tinyclip_and_phi_2():
    config = ClipPhiConfig()
    with torch.device("meta"):
        model = ClipPhiForCausalLM(config)
    assert model.model.projector.weight.shape == (2560, 640)
    assert model.lm_head.bias.shape == (51200,)
    decoder = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    assert sum(parameter.numel() for parameter in decoder) == 2_779_683_840
    pixels = torch.empty(1, 3, 224, 224, device="meta")
    assert model.get_image_features(pixels).pooler_output[0].shape == (49, 2560)


def test_config_survives_saving(tmp_path):
    config = ClipPhiConfig(
        vision_config=SiglipVisionConfig(num_hidden_layers=3),
        text_config={"model_type": "llama", "hidden_size": 64, "tie_word_embeddings": True},
        vision_feature_select_strategy="full",
        projector_type="mlp",
    )
    config.save_pretrained(tmp_path)
    reloaded = AutoConfig.from_pretrained(tmp_path)
    assert reloaded.to_dict() == config.to_dict() | {"_name_or_path": str(tmp_path)}
    assert isinstance(reloaded.text_config, LlamaConfig) and reloaded.text_config.hidden_size == 64
    assert reloaded.tie_word_embeddings
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForImageTextToText"] == "modeling_clip_phi.ClipPhiForCausalLM"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"projector_typ": "mlp"}, "no field 'projector_typ': did you mean 'projector_type'?"),
        ({"vision_feature_layer": 13}, r"vision_feature_layer 13 is not one of the 13 hidden states \(-13 to 12\)"),
        ({"vision_feature_layer": -14}, "vision_feature_layer -14 is not one of the 13"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ClipPhiConfig(**fields)


@pytest.mark.parametrize("fields", [{"projector_type": "conv"}, {"image_token_id": "<image>"}])
def test_wrong_types_are_refused(fields):
    with pytest.raises(Exception, match=next(iter(fields))):
        ClipPhiConfig(**fields)
