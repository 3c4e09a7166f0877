"""How sure an answer is: likelihood, gain and confidence, by hand-worked examples and plain forward passes."""

import json
import math

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from clip_phi.cli import main
from clip_phi.data.sample import user_message
from clip_phi.data.synthetic import write_dataset
from clip_phi.evaluation.answers import Decoding, Processes, Question, answer_likelihoods
from clip_phi.evaluation.confidence import (
    ABSTENTION,
    FILE,
    assess,
    calibration,
    describe,
    fit_scaling,
    load_scaling,
    logit,
    risk_coverage,
    save_scaling,
    scale,
)
from clip_phi.evaluation.generate import answer_logprobs, answer_span
from clip_phi.hub.push import SHIPPED
from clip_phi.serving.api import create_app
from clip_phi.serving.engine import Engine, Limits, as_prompt


def test_calibration_error_and_brier_score_by_hand():
    # Bins of 1/15: 0.95 and 0.97 share the last one, 0.65 and 0.6 the tenth and the ninth, whose upper end is 0.6.
    confidence, right = np.array([0.95, 0.97, 0.65, 0.6, 1.0]), np.array([1.0, 0.0, 1.0, 0.5, 1.0])
    found = calibration(confidence, right)
    gaps = [0.95 + 0.97 + 1.0 - 2, 0.65 - 1, 0.6 - 0.5]
    assert found["ece"] == pytest.approx(sum(map(abs, gaps)) / 5)
    assert found["brier"] == pytest.approx((0.05**2 + 0.97**2 + 0.35**2 + 0.1**2 + 0) / 5)
    assert calibration(np.array([0.0, 1.0]), np.array([0.0, 1.0])) == {"ece": 0.0, "brier": 0.0}


def test_risk_and_coverage_by_hand():
    # From the surest on: right, right, wrong, right, wrong. Risks 0, 0, 1/3, 1/4, 2/5.
    found = risk_coverage(np.array([0.2, 0.9, 0.5, 0.8, 0.4]), np.array([0.0, 1, 0, 1, 1]))
    assert found["risk_coverage_area"] == pytest.approx((1 / 3 + 1 / 4 + 2 / 5) / 5)
    assert found["accuracy_at_coverage"] == pytest.approx({"1.0": 3 / 5, "0.9": 3 / 5, "0.8": 3 / 4, "0.5": 2 / 3})
    # Equally sure answers share their scores: their order in the data means nothing.
    for right in ([1.0, 0, 0, 0], [0, 0, 0, 1.0]):
        assert risk_coverage(np.ones(4), np.array(right))["accuracy_at_coverage"] == dict.fromkeys(
            ("1.0", "0.9", "0.8", "0.5"), 0.25
        )


def test_scaling_finds_the_true_slope_and_bias_and_stays_finite():
    rng = np.random.default_rng(0)
    values = rng.normal(0, 3, 20_000)
    right = (rng.random(20_000) < scale(values, 0.5, -0.7)).astype(float)
    found = fit_scaling(values, right)
    assert found["slope"] == pytest.approx(0.5, abs=0.03) and found["bias"] == pytest.approx(-0.7, abs=0.05)
    for all_right in (np.ones(50), np.zeros(50)):
        sure = scale(logit(np.full(50, 1.0)), **fit_scaling(logit(np.full(50, 1.0)), all_right))
        assert sure == pytest.approx((51 / 52 if all_right[0] else 1 / 52) * np.ones(50), abs=1e-3)


def test_the_scaling_is_fitted_on_half_of_the_images_and_reported_on_the_others():
    rng = np.random.default_rng(0)
    digests = [f"{image % 16:x}{image:07x}" for image in rng.integers(0, 500, 4000)]
    fit = np.array([int(digest[0], 16) % 2 == 0 for digest in digests])
    likelihoods = rng.uniform(0.5, 1, 4000)
    right = np.where(fit, rng.random(4000) < likelihoods**4, 0.0)
    found = assess(likelihoods, likelihoods - 0.5, right.astype(float), digests)
    assert found["answers"] == (~fit).sum() and found["fitted_on"] == fit.sum()
    assert found["likelihood"]["accuracy_at_coverage"]["1.0"] == 0  # of the other half alone
    assert found["likelihood"]["ece"] == pytest.approx(likelihoods[~fit].mean())
    expected = scale(logit(likelihoods[fit]), *(found["likelihood"]["scaled"][name] for name in ("slope", "bias")))
    assert calibration(expected, right[fit])["ece"] < 0.05  # though the likelihoods are overconfident
    assert "ece" not in found["gain"] and found["gain"]["scaled"]["ece"] > 0
    assert assess(likelihoods, likelihoods, right, ["0a"] * 4000) == {}


@torch.no_grad()
def test_the_likelihood_of_an_answer_is_that_of_a_plain_forward_pass(model, processor):
    image = Image.new("RGB", (64, 64), "red")
    prompts = [([user_message(question, n)], [image] * n) for question, n in (("What?", 1), ("How many are there?", 0))]
    answers = ["red", "two red circles"]
    for (messages, images), text, found in zip(
        prompts, answers, answer_logprobs(model, processor, prompts, answers), strict=True
    ):
        ids, labels = processor.encode([*messages, {"role": "assistant", "content": text}])
        pixels = processor.image_processor(images, return_tensors="pt") if images else {}
        logprobs = model(torch.tensor([ids]), **pixels).logits[0].log_softmax(-1)
        expected = sum(float(logprobs[place - 1, label]) for place, label in enumerate(labels) if label >= 0)
        assert labels[-1] == processor.tokenizer.eos_token_id and found == pytest.approx(expected, abs=1e-4)


def test_an_answer_that_spells_a_special_token_has_a_likelihood(model, processor):
    answers = ["red", "<image>", f"a {processor.tokenizer.eos_token} b", f"{processor.tokenizer.pad_token}<image>"]
    pairs = [(Question("key", None, "What?"), text) for text in answers]
    found = answer_likelihoods(model, processor, pairs, Decoding(max_new_tokens=4, batch_size=2), Processes())
    assert found.shape == (4,) and (found > 0).all() and (found < 1).all()


@torch.no_grad()
def test_the_likelihood_of_a_later_answer_leaves_out_the_earlier_ones(model, processor):
    earlier = [user_message("What?"), {"role": "assistant", "content": "red"}, user_message("How many?")]
    ids, labels = processor.encode([*earlier, {"role": "assistant", "content": "two"}])
    start = max(place for place, label in enumerate(labels) if label < 0) + 1
    logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = sum(float(logprobs[place - 1, ids[place]]) for place in range(start, len(ids)))
    assert answer_logprobs(model, processor, [(earlier, None)], ["two"]) == pytest.approx([expected], abs=1e-4)
    # Some templates write a line break after the end token.
    assert answer_span([-100, 5, 6, -100, 7, 8, -100]) == (4, 5) and answer_span([7, 8]) == (0, 1)


def test_evaluate_reports_and_keeps_the_scaling_which_other_weights_refuse(fresh_model, processor, tmp_path, capsys):
    model = fresh_model
    folder, data = tmp_path / "checkpoint", tmp_path / "data"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_dataset(data, num_train=0, num_val=8)
    source = f"llava:{data}/llava_instruct_val.json,images={data}/val2017"

    def evaluate(task, *options):
        return main(["evaluate", str(folder), "--task", task, "--data", source, "--max_new_tokens", "3", *options])

    assert load_scaling(str(folder), model) is None
    assert evaluate("loss", "--calibrate") == 2
    assert "--calibrate requires --task vqa or pope or exact" in capsys.readouterr().err
    assert evaluate("vqa", "--calibrate") == 0
    assert "ECE by likelihood" in capsys.readouterr().out
    result = json.loads((folder / "evaluation/vqa.json").read_text())["confidence"]
    scaled = result["likelihood"]["scaled"]
    assert load_scaling(str(folder), model) == {name: scaled[name] for name in ("slope", "bias")}
    assert SHIPPED.fullmatch(FILE)  # it is pushed with the weights
    samples = [json.loads(line) for line in (folder / "evaluation/vqa.samples.jsonl").read_text().splitlines()]
    assert result["answers"] + result["fitted_on"] == len(samples)
    assert all(0 <= each["likelihood"] <= 1 and -1 <= each["gain"] <= each["likelihood"] for each in samples)
    with pytest.raises(ValueError, match="needs answers about more images"):
        save_scaling(folder, model, {"confidence": {}})
    inverted = {"likelihood": {"scaled": {"slope": -0.3, "bias": 0.0}}, "fitted_on": 5}
    with pytest.raises(ValueError, match="in 5 answers the likelier ones are no better"):
        save_scaling(folder, model, {"confidence": inverted})
    with torch.no_grad():
        next(model.model.projector.parameters()).add_(1)
    assert load_scaling(str(folder), model) is None


# Serving


@pytest.fixture(scope="module")
def engine(model, processor):
    with Engine(model, processor, limits=Limits(gather_seconds=0)) as engine:
        yield engine


def ask(engine, number, **options):
    messages, images = as_prompt("What?", Image.new("RGB", (64, 64), "red") if number else None)
    completion = engine.submit(messages, images, max_new_tokens=4, top_logprobs=0, **options)
    completion.result()
    return completion, messages


@torch.no_grad()
def test_the_engines_likelihood_and_gain_are_those_of_plain_forward_passes(engine, model, processor):
    grammar = engine.grammars.compile(regex="[a-z]{2}")
    completion, messages = ask(engine, 1, grammar=grammar)
    found = engine.confidence(completion, messages)
    prompt, _ = processor.encode(messages, add_generation_prompt=True)
    ids = [each.token for each in completion.logprobs]
    pixels = processor.image_processor([Image.new("RGB", (64, 64), "red")], return_tensors="pt")
    logprobs = model(torch.tensor([prompt + ids]), **pixels).logits[0].log_softmax(-1)
    assert completion.num_tokens == len(ids) + 1 and completion.finish_reason == "stop"
    ids.append(processor.tokenizer.eos_token_id)  # also where a form has ended: as the scaling was fitted
    expected = sum(float(logprobs[len(prompt) + place - 1, token]) for place, token in enumerate(ids))
    assert math.log(found["likelihood"]) == pytest.approx(expected, abs=1e-3)
    blind = answer_logprobs(model, processor, [([user_message("What?")], None)], [completion.text])[0]
    assert found["gain"] == pytest.approx(found["likelihood"] - math.exp(blind), abs=1e-9)
    assert found["confidence"] is None and found["abstained"] is False
    completion, messages = ask(engine, 0)
    assert engine.confidence(completion, messages)["gain"] is None  # there is no image to leave out
    completion, messages = ask(engine, 1, grammar=engine.grammars.compile(regex="[a-z]{9}"))
    cut = engine.confidence(completion, messages)  # has no end token, which the blind likelihood would have
    assert completion.finish_reason == "length" and cut["likelihood"] > 0 and cut["gain"] is None
    completion, messages = ask(engine, 1, grammar=engine.grammars.compile(regex="ab"), stop=["b"])
    assert completion.text == "a" and completion.finish_reason == "stop"
    assert engine.confidence(completion, messages)["gain"] is None  # two tokens were generated, and one is left


def test_a_completion_that_is_not_sure_abstains_by_its_confidence(engine, monkeypatch):
    completion, messages = ask(engine, 1)
    text, likelihood = completion.text, math.exp(completion.logprob)
    assert not engine.confidence(completion, messages, likelihood)["abstained"] and completion.text == text
    monkeypatch.setattr(engine, "scaling", {"slope": 0.0, "bias": 0.0})
    assert engine.confidence(completion, messages, 0.49)["confidence"] == 0.5 and completion.text == text
    assert engine.confidence(completion, messages, 0.51)["abstained"] and completion.text == ABSTENTION
    assert "confidence 0.50" in describe({"likelihood": 0.1, "gain": None, "confidence": 0.5})
    assert describe({"likelihood": 0.1, "gain": 0.25, "confidence": None}) == (
        "likelihood 0.1, +0.25 by the image; not calibrated"
    )


def test_the_api_has_the_confidence_of_each_choice_and_sends_no_text_that_it_withholds(engine):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "What?"}], "max_tokens": 4}

    def post(options, **more):
        return TestClient(create_app(engine, "tiny", **options)).post("/v1/chat/completions", json=body | more)

    def streamed(options, **more):
        lines = post(options, stream=True, **more).text.splitlines()
        return [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]

    plain = post({}).json()["choices"][0]
    assert "confidence" not in plain
    for choice in (post({}, confidence=True, n=2).json()["choices"][1], streamed({}, confidence=True)[-1]):
        found = choice["confidence"]
        assert 0 < found["likelihood"] < 1 and not found["abstained"] and not choice["logprobs"]
    withheld = post({"abstain_below": 1.0}).json()["choices"][0]
    assert withheld["message"]["content"] == ABSTENTION and withheld["confidence"]["abstained"]
    pieces = [each["delta"].get("content", "") for each in streamed({"abstain_below": 1.0})]
    assert "".join(pieces) == ABSTENTION
    formed = post({"abstain_below": 1.0}, guided_choice=["ab"]).json()["choices"][0]
    assert formed["message"]["content"] == "ab" and "confidence" not in formed
    assert post({}, confidence="yes").status_code == 400


def test_ask_prints_how_sure_it_is_and_abstains(checkpoint, tmp_path, capsys):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "image.png")

    def run(*options):
        words = ["ask", tmp_path / "image.png", "What?", "--model", checkpoint, "--max_new_tokens", 3, *options]
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    code, out, _ = run("--confidence", "--choices", "a,b")  # which ends: a cut answer has no gain
    assert code == 0 and " by the image; not calibrated\n" in out and "likelihood " in out
    code, out, error = run("--abstain_below", 1, "--json")
    assert code == 0 and json.loads(out)["answer"] == ABSTENTION and json.loads(out)["confidence"]["abstained"]
    assert "is not calibrated" in error
    (tmp_path / "schema.json").write_text("{}")
    assert run("--abstain_below", 1, "--schema", tmp_path / "schema.json")[0] == 2
