"""Other programs give equal scores: coco-caption (pycocoevalcap, in Java), Hugging Face's evaluate, lmms-eval."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import CAPTIONS, EXPECTED, REFERENCES

from clip_phi.data.synthetic import write_dataset
from clip_phi.evaluation.caption_metrics import CaptionScorer, meteor, tokenise
from clip_phi.evaluation.run import load

pytestmark = pytest.mark.oracle
ROOT = Path(__file__).parent.parent
# Parts of COCO's captions, rare ones included.
WORDS = (
    "a man woman's is isn't riding the dog's two-story red black-and-white t-shirt U.S. St. John street 3 10:30 1st "
    "5-year-old $5 50% \"stop\" 'hi' (left) & AT&T o'clock can't it's they're and/or cat dog tree, sky; sea: hat bat "
    "mr. smith 1950's No.5 a.m. cannot don't he's I'm men's e-mail half-eaten coca-cola Coca-Cola's 200 1,000 "
    "McDonald's Dr. Pepper with on two of in front near sitting standing blue bus bike bench"
)


def random_captions(rng, least):
    words = rng.choices(WORDS.split(), k=rng.randint(least, 16))
    return " ".join(words) + rng.choice(["", "", ".", " .", "!", "..."])


@pytest.fixture(scope="module")
def captions():
    """(captions, references) of random sets, of one image, a few and many."""
    rng = random.Random(0)
    return [
        ([random_captions(rng, 0) for _ in range(n)], [[random_captions(rng, 1) for _ in range(5)] for _ in range(n)])
        for n in (1, 2, 300)
    ]


def reference_tokens(texts):
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    return PTBTokenizer().tokenize({n: [{"caption": text} for text in each] for n, each in enumerate(texts)})


def test_words_are_those_of_the_java_tokenizer(captions):
    texts = [text for candidates, references in captions for text in [*candidates, *sum(references, [])]]
    theirs = reference_tokens([[text] for text in texts])
    different = [text for n, text in enumerate(texts) if " ".join(tokenise(text)) != theirs[n][0]]
    assert len(texts) > 1500 and different == []


def test_scores_are_those_of_coco_caption(captions):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    for candidates, references in captions:
        written, said = reference_tokens(references), reference_tokens([[text] for text in candidates])
        ours = CaptionScorer(references)(candidates)
        bleu, _ = Bleu(4).compute_score(written, said, verbose=0)
        rouge, rouge_each = Rouge().compute_score(written, said)
        cider, cider_each = Cider().compute_score(written, said)
        theirs = {f"BLEU-{n}": score for n, score in enumerate(bleu, start=1)}
        theirs |= {"ROUGE-L": rouge, "CIDEr": cider, "CIDEr-D": cider}
        for name, score in theirs.items():
            assert ours.corpus[name] == pytest.approx(float(score), abs=1e-6), name
        assert np.abs(ours.each["ROUGE-L"] - rouge_each).max() < 1e-6
        assert np.abs(ours.each["CIDEr-D"] - cider_each).max() < 1e-6


def test_meteor_is_that_of_the_public_example():
    assert meteor(CAPTIONS, REFERENCES) == pytest.approx(0.295797, abs=1e-6)


def test_metrics_load_with_evaluate_without_a_network_and_give_our_scores(tmp_path):
    folder = tmp_path / "metrics"  # as in a Space: the metric beside the files that it imports
    shutil.copytree(ROOT / "clip_phi/evaluation", folder)
    script = f"""
import evaluate, json
load = lambda name: evaluate.load({str(folder / "metric.py")!r}, name)
print(json.dumps([
    load("captions").compute(predictions={CAPTIONS!r}, references={REFERENCES!r}),
    load("vqa").compute(predictions=["Red.", "two"], references=[["red"] * 9 + ["blue"], ["3"]]),
    load("pope").compute(predictions=["Yes", "no"], references=["yes", "yes"]),
]))
"""
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    captions, vqa, pope = json.loads(done.stdout.splitlines()[-1])
    assert {name: captions[name] for name in EXPECTED} == pytest.approx(EXPECTED, abs=1e-6)
    assert vqa == {"vqa_accuracy": 0.5, "exact_match": 0.5} and pope["recall"] == 0.5


TASK = """
task: tiny_shapes
dataset_path: json
dataset_kwargs:
  data_files: {folder}/rows.json
test_split: train
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: "<image>{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  max_new_tokens: 6
  num_beams: {num_beams}
process_results: !function utils.process_results
metric_list:
  - metric: same
    aggregation: mean
    higher_is_better: true
"""
UTILS = """
from PIL import Image

def doc_to_visual(doc):
    return [Image.open(doc["image"])]

def process_results(doc, results):
    return {"same": float(results[0] == doc["answer"])}
"""


@pytest.mark.parametrize("num_beams", [1, 3])
def test_lmms_eval_gets_the_same_answers_from_a_local_model(num_beams, model, processor, tmp_path):
    from PIL import Image

    from clip_phi.evaluation.generate import generate_answers

    checkpoint = tmp_path / "checkpoint"
    model.save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    write_dataset(tmp_path / "data", num_train=1, num_val=5)
    questions = ["Is it red?", "How many shapes are there?", "What is it?", "Is there a star?", "blue?"]
    plain, ours, _ = load(str(checkpoint), "cpu")
    rows = []
    for path, question in zip(sorted((tmp_path / "data/val2017").iterdir()), questions, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = ([{"role": "user", "content": content}], Image.open(path).convert("RGB"))
        (answer,) = generate_answers(plain, ours, [prompt], 6, num_beams)
        rows.append({"image": str(path), "question": question, "answer": answer.text})
    rows[-1]["answer"] = "what it does not say"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "utils.py").write_text(UTILS)
    (tmp_path / "tiny_shapes.yaml").write_text(TASK.format(folder=tmp_path, num_beams=num_beams))
    command = [sys.executable, "-m", "lmms_eval", "--model", "clip_phi", "--tasks", "tiny_shapes"]
    command += ["--model_args", f"pretrained={checkpoint},device=cpu", "--include_path", tmp_path, "--batch_size", "2"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([str(word) for word in [*command, "--output_path", tmp_path / "out"]], cwd=tmp_path,
                          capture_output=True, text=True, env=environment)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = (tmp_path / "out").rglob("*_results.json")
    assert json.loads(result.read_text())["results"]["tiny_shapes"]["same,none"] == 0.8
