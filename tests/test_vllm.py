"""vLLM itself, on a CPU, gives the answers of the demo's model: make test-vllm."""

import json
import os
import subprocess

import pytest
import torch
from helpers import ROOT, demo_questions
from PIL import Image

from clip_phi.cli import main
from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

pytestmark = pytest.mark.vllm
DEMO = ROOT / "outputs/demo"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm") / "model"
    assert main(["export", str(DEMO / "model"), str(folder), "--to", "vllm"]) == 0
    return folder


@pytest.fixture(scope="module")
def requests(exported):
    """First questions about unseen scenes, and questions about several images."""
    processor = ClipPhiProcessor.from_pretrained(exported)
    made = []
    for paths, question in demo_questions(94, 6):
        content = [{"type": "image"}] * len(paths) + [{"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        made.append({"messages": messages, "prompt": prompt, "images": [str(path) for path in paths]})
    return made


@pytest.fixture(scope="module")
def expected(exported, requests):
    """By generate, one request at a time."""
    model = ClipPhiForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
    processor = ClipPhiProcessor.from_pretrained(DEMO / "model")
    answers = []
    for request in requests:
        images = [Image.open(path).convert("RGB") for path in request["images"]]
        inputs = processor(images=images, text=request["prompt"], return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.decode(ids, skip_special_tokens=True))
    return answers


@pytest.mark.parametrize("way", ["class", "http"])
def test_vllm_gives_the_same_100_answers(way, exported, requests, expected, tmp_path, capsys):
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    command = [ROOT / ".venv-vllm/bin/python", ROOT / "tests/vllm_driver.py", way, exported]
    command += [tmp_path / "requests.json", tmp_path / "answers.json"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    answers = json.loads((tmp_path / "answers.json").read_text())
    equal = sum(ours.strip() == theirs.strip() for ours, theirs in zip(expected, answers, strict=True))
    with capsys.disabled():
        print(f"\nvLLM, {way}: {equal} of {len(expected)} greedy answers equal")
    assert len(set(expected)) > 10
    assert answers == expected if way == "class" else equal == len(expected)
