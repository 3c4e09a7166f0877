"""What vLLM's backend for transformers models asks of model and processor (its multimodal.py and base.py). Each test
does one thing as that backend does it; vLLM itself: make test-vllm."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import AttentionInterface, AutoProcessor


@pytest.fixture(scope="module")
def checkpoint(model, processor, tmp_path_factory):
    """A merged checkpoint whose AutoModel is the headless class, as clip-phi export --to vllm makes it."""
    folder = tmp_path_factory.mktemp("merged")
    model.save_pretrained(folder, merged=True)
    processor.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModel"] = "modeling_clip_phi.ClipPhiModel"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# In a process that does not know modeling_clip_phi, as vLLM does not
SCRIPT = """
import json, sys, torch
from transformers import AutoConfig, AutoModel
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.device("meta"):
    model = AutoModel.from_config(config, dtype=torch.bfloat16, trust_remote_code=True)
text = config.get_text_config()
print(json.dumps({
    "class": type(model).__name__,
    "weights": list(model.state_dict()),
    "supported": model._supports_attention_backend and model.language_model._supports_attention_backend,
    "embeddings": model.get_input_embeddings() is model.language_model.embed_tokens,
    "text": [text is config.text_config, text.hidden_size, text.vocab_size, text.num_hidden_layers],
}))
"""


@pytest.fixture(scope="module")
def headless(checkpoint):
    command = [sys.executable, "-c", SCRIPT, str(checkpoint)]
    done = subprocess.run(command, cwd=checkpoint.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_automodel_is_the_headless_model_with_the_parts_by_name(headless):
    assert headless["class"] == "ClipPhiModel" and headless["supported"] and headless["embeddings"]
    assert headless["text"] == [True, 32, 320, 2]


def test_weights_of_the_checkpoint_are_those_of_the_headless_model_and_a_head(checkpoint, headless):
    from safetensors import safe_open

    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        names = set(file.keys())
    inside = {name.removeprefix("model.") for name in names if name.startswith("model.")}
    assert inside == set(headless["weights"])
    assert names - {f"model.{name}" for name in inside} == {"lm_head.weight", "lm_head.bias"}


def test_keyword_arguments_reach_the_decoders_attention_and_a_tuple_comes_back(fresh_model):
    model, seen = fresh_model.model, []

    def attention(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
        seen.append((module.layer_idx, attention_instances, attention_mask))
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return output.transpose(1, 2), None

    ids, places = torch.tensor([[5, 6, 7, 8]]), torch.arange(4)[None]
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        expected = model(input_ids=ids).last_hidden_state
        AttentionInterface.register("as_vllm_does", attention)
        model.config.get_text_config()._attn_implementation = "as_vllm_does"
        instances = {0: object(), 1: object()}
        found = model(
            input_ids=None,
            inputs_embeds=embeds,
            use_cache=False,
            position_ids=places,
            attention_instances=instances,
            return_dict=False,
        )
    assert isinstance(found, tuple) and torch.allclose(found[0], expected, atol=1e-5)
    assert [(layer, given is instances) for layer, given, _ in seen] == [(0, True), (1, True)]


def test_image_features_come_as_one_tensor_an_image(model, processor):
    pixels = torch.randn(3, 3, 32, 32)
    features = model.model.get_image_features(pixels)
    width = model.config.get_text_config().hidden_size
    assert [tuple(each.shape) for each in features.pooler_output] == [(processor.num_image_tokens, width)] * 3


def test_the_processor_marks_image_tokens_and_counts_them_by_size(checkpoint):
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    assert processor.image_token == "<image>"
    counts = processor._get_num_multimodal_tokens(image_sizes=[(10_000, 10_000), (30, 40)])
    assert counts["num_image_tokens"] == [processor.num_image_tokens] * 2 and counts["num_image_patches"] == [1, 1]
    images = [Image.new("RGB", (40, 30), color) for color in ("red", "blue")]
    text = processor.image_token * 2 + "Instruct: which?\nOutput:"
    inputs = processor(text=text, images=images, return_mm_token_type_ids=True, return_tensors="pt")
    marked = torch.where(inputs["mm_token_type_ids"] == 1)[1]
    assert torch.equal(marked, torch.where(inputs["input_ids"] == processor.image_token_id)[1])
    chunks = torch.split(marked, counts["num_image_tokens"])
    assert [(int(chunk[0]), len(chunk)) for chunk in chunks] == [
        (number * processor.num_image_tokens, processor.num_image_tokens) for number in range(2)
    ]
    assert inputs["pixel_values"].shape[0] == sum(counts["num_image_patches"])
