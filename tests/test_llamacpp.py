"""llama.cpp's own server, on a CPU, gives the answers of the demo's model: make test-llamacpp."""

import json
import subprocess
import sys
from statistics import median

import pytest
import torch
from helpers import ROOT, demo_questions
from PIL import Image

from clip_phi.cli import main
from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

pytestmark = pytest.mark.llamacpp
DEMO = ROOT / "outputs/demo"


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Greedy answers of generate to 100 questions, and the log-probabilities of their two likeliest first tokens."""
    model = ClipPhiForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
    processor = ClipPhiProcessor.from_pretrained(DEMO / "model")
    folder, requests, answers = tmp_path_factory.mktemp("images"), [], []
    for paths, question in demo_questions(94, 6):
        content = [*({"type": "image"} for _ in paths), {"type": "text", "text": question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}])
        images = [Image.open(path).convert("RGB") for path in paths]
        inputs = processor(images=images, text=prompt, return_tensors="pt")
        options = {"max_new_tokens": 40, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        done = model.generate(**inputs, **options)
        best = done.logits[0][0].log_softmax(-1).topk(2)
        tokens = [processor.tokenizer.decode([number]) for number in best.indices.tolist()]
        text = processor.decode(done.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        lossless = [str(folder / f"{path.stem}.png") for path in paths]  # JPEG decoders differ
        for path, image in zip(lossless, images, strict=True):
            image.save(path)
        requests.append({"text": question, "images": lossless})
        answers.append((text, dict(zip(tokens, best.values.tolist(), strict=True))))
    return requests, answers


# The fewest equal answers, and the largest difference of log-probabilities.
BOUNDS = {"float16": (100, 0.02), "float32": (100, 0.02), "q8_0": (95, 0.5), "q4_0": (50, 5.0)}


@pytest.mark.parametrize("dtype", BOUNDS)
def test_llamacpp_gives_the_same_100_answers(dtype, expected, tmp_path, capsys):
    requests, answers = expected
    assert main(["export", str(DEMO / "model"), str(tmp_path / "gguf"), "--to", "gguf", "--dtype", dtype]) == 0
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    command = [sys.executable, ROOT / "tests/llamacpp_driver.py", tmp_path / "gguf"]
    command += [tmp_path / "requests.json", tmp_path / "answers.json"]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "answers.json").read_text())
    equal = sum(ours == theirs["text"] for (ours, _), theirs in zip(answers, found, strict=True))
    differences = [
        abs(ours[token] - theirs["logprobs"][token])
        for (_, ours), theirs in zip(answers, found, strict=True)
        for token in ours.keys() & theirs["logprobs"].keys()
    ]
    with capsys.disabled():
        print(f"\nllama.cpp, {dtype}: {equal} of {len(found)} greedy answers equal, ", end="")
        print(f"first tokens' log-probabilities within {max(differences):.4f}, median {median(differences):.4f}")
    assert len({text for text, _ in answers}) > 10 and len(differences) > 150
    assert equal >= BOUNDS[dtype][0] and len(found) == 100
    assert max(differences) < BOUNDS[dtype][1]
