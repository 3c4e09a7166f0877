"""vLLM itself, on a CPU, gives the answers of the demo's model: make test-vllm."""

import json
import os
import subprocess
from itertools import islice
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from PIL import Image

from clip_phi.cli import main
from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

pytestmark = pytest.mark.vllm
DEMO = ROOT / "outputs/demo"
QUESTIONS, SEVERAL = 94, 6  # together 100


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm") / "model"
    assert main(["export", str(DEMO / "model"), str(folder), "--to", "vllm"]) == 0
    return folder


@pytest.fixture(scope="module")
def requests(exported):
    """First questions about unseen scenes, and questions about several images."""
    processor = ClipPhiProcessor.from_pretrained(exported)
    records = json.loads((DEMO / "data/llava_instruct_val.json").read_text())
    asked = []
    for record in islice(records, QUESTIONS):
        question = record["conversations"][0]["value"].replace("<image>", "").strip()
        asked.append(([DEMO / "data/val2017" / Path(record["image"]).name], question))
    for number in range(SEVERAL):
        paths = [paths[0] for paths, _ in asked[number * 3 : number * 3 + 2 + number % 2]]
        asked.append((paths, asked[number][1]))
    made = []
    for paths, question in asked:
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
