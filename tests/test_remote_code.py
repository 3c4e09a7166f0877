"""A checkpoint in a clean process: no package of ours to import, a fresh cache, another working directory."""

import pytest
import torch
from helpers import run_clean
from PIL import Image


@pytest.fixture
def expected(model, processor, tmp_path):
    """The logits that every process must give, beside what they are given for."""
    image = Image.effect_noise((40, 30), 60).convert("RGB")
    image.save(tmp_path / "image.png")
    inputs = processor(images=[image], text=["<image>Instruct: a?\nOutput:"], return_tensors="pt")
    with torch.no_grad():
        torch.save(model(**inputs).logits, tmp_path / "expected.pt")
    return tmp_path / "expected.pt"


LOAD_ALL = """
import torch
from PIL import Image
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, pipeline
)
folder, expected, image, again = sys.argv[1:]
expected, image = torch.load(expected), Image.open(image)
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(images=[image], text=["<image>Instruct: a?\\nOutput:"], return_tensors="pt")
for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
    model = auto_class.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__name__ == "ClipPhiForCausalLM"
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected), auto_class
messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "a?"}]}]
ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1]:]
pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
answer = pipe(text=messages, max_new_tokens=5, do_sample=False, return_full_text=False)[0]["generated_text"]
assert answer == processor.decode(ids, skip_special_tokens=True)
model.save_pretrained(again)
processor.save_pretrained(again)
"""

LOAD_AGAIN = """
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor
folder, expected, image = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = processor(images=[Image.open(image)], text=["<image>Instruct: a?\\nOutput:"], return_tensors="pt")
with torch.no_grad():
    assert torch.equal(model(**inputs).logits, torch.load(expected))
"""

NO_PEFT = """
for name in ("peft", "torchvision", "bitsandbytes", "accelerate"):
    sys.modules[name] = None
"""


@pytest.mark.parametrize("merged", [False, True], ids=["delta", "merged"])
def test_remote_code_gives_equal_logits_in_a_clean_process(merged, model, processor, expected, tmp_path):
    folder, again, image = tmp_path / "checkpoint", tmp_path / "again", tmp_path / "image.png"
    model.save_pretrained(folder, merged=merged)
    processor.save_pretrained(folder)
    run_clean(LOAD_ALL, tmp_path, folder, expected, image, again)
    run_clean(NO_PEFT + LOAD_AGAIN, tmp_path, again, expected, image)


def test_registered_classes_need_no_remote_code(model, processor, expected, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint")) is ClipPhiForCausalLM
    assert type(AutoProcessor.from_pretrained(tmp_path / "checkpoint")) is ClipPhiProcessor
