"""transformers' own Trainer on a saved model, with and without an adapter: evaluation, the best model, resuming."""

import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from modeling_clip_phi import ClipPhiForCausalLM

DECODER = r"model\.language_model\..*\.(q_proj|fc1)"
RECORDS = [("a star", "yes"), ("a red circle and a star", "no it is a blue square")] * 4


@pytest.fixture
def collate(processor):
    image = Image.effect_noise((32, 32), 60).convert("RGB")

    def batch(records):
        texts = [f"<image>Instruct: {question}\nOutput: {answer}<|endoftext|>" for question, answer in records]
        inputs = processor(text=texts, images=[image] * len(texts), padding=True, return_tensors="pt")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        return {**inputs, "labels": labels.masked_fill(labels == processor.image_token_id, -100)}

    return batch


def load(checkpoint, adapter: bool) -> ClipPhiForCausalLM:
    model = ClipPhiForCausalLM.from_pretrained(checkpoint)
    if adapter:
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=2, lora_dropout=0.1, target_modules=DECODER))
        model.model.projector.requires_grad_(True)
    return model


def make_trainer(model, folder, collate, processor, **options) -> Trainer:
    options = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "eval_strategy": "steps", "logging_steps": 1} | options
    options |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "remove_unused_columns": False}
    arguments = TrainingArguments(folder, learning_rate=0.01, report_to=[], use_cpu=True, disable_tqdm=True, **options)
    data = {"train_dataset": RECORDS, "eval_dataset": RECORDS, "data_collator": collate}
    return Trainer(model, arguments, processing_class=processor, **data)


def trained(model) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}


def is_equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_resumed_run_equals_one_that_never_stopped(adapter, checkpoint, collate, processor, tmp_path):
    trainer = make_trainer(load(checkpoint, adapter), tmp_path / "run", collate, processor)
    trainer.train()
    assert set(trainer.evaluate()) >= {"eval_loss"}
    assert trainer.predict(RECORDS).predictions.shape[0] == len(RECORDS)
    again = make_trainer(load(checkpoint, adapter), tmp_path / "again", collate, processor)
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    expected = trained(trainer.model)
    assert is_equal(trained(again.model), expected)
    reloaded = ClipPhiForCausalLM.from_pretrained(tmp_path / "run/checkpoint-4")
    assert all(torch.equal(reloaded.get_parameter(name), weight) for name, weight in expected.items())
    trainer.model.save_pretrained(tmp_path / "plain")
    assert set(load_file(tmp_path / "plain/model.safetensors")) == {"model.projector.bias", "model.projector.weight"}


@pytest.mark.parametrize("adapter", [False, True])
def test_the_best_model_is_loaded_at_the_end(adapter, checkpoint, collate, processor, tmp_path):
    trainer = make_trainer(
        *(load(checkpoint, adapter), tmp_path, collate, processor),
        **{"load_best_model_at_end": True, "metric_for_best_model": "step", "greater_is_better": False},
    )
    trainer.compute_metrics = lambda _: {"step": trainer.state.global_step}  # the first evaluation is the best one
    trainer.train()
    best = ClipPhiForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    last = ClipPhiForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    for name, weight in trained(trainer.model).items():
        assert torch.equal(best.get_parameter(name), weight) and not torch.equal(last.get_parameter(name), weight)


def test_a_checkpoint_without_the_adapters_weights_is_refused(checkpoint, collate, processor, tmp_path):
    make_trainer(load(checkpoint, False), tmp_path / "run", collate, processor, max_steps=2).train()
    again = make_trainer(load(checkpoint, True), tmp_path / "again", collate, processor)
    with pytest.raises(ValueError, match="the model has an adapter, these weights have none: load them with"):
        again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": DECODER},
        {"target_modules": DECODER, "modules_to_save": ["projector"]},
        {"target_modules": "all-linear"},
    ],
    ids=["decoder", "projector", "all"],
)
def test_what_peft_wraps_is_saved_as_a_delta(options, checkpoint, collate, processor, tmp_path):
    """LoRA on the decoder, on every linear layer, or beside a trained projector, in PEFT's own way."""
    torch.manual_seed(0)
    wrapped = get_peft_model(ClipPhiForCausalLM.from_pretrained(checkpoint), LoraConfig(r=2, **options))
    trainer = make_trainer(wrapped, tmp_path / "run", collate, processor, max_steps=2)
    trainer.train()
    model = wrapped.get_base_model().eval()
    model.save_pretrained(tmp_path / "delta")
    model.save_pretrained(tmp_path / "merged", merged=True)
    inputs = {name: value for name, value in collate(RECORDS[:2]).items() if name != "labels"}
    with torch.no_grad():
        expected = model(**inputs).logits
        reloaded = ClipPhiForCausalLM.from_pretrained(tmp_path / "delta")(**inputs).logits
        torch.testing.assert_close(reloaded, expected, rtol=0, atol=1e-6)
        merged = ClipPhiForCausalLM.from_pretrained(tmp_path / "merged")
        assert (merged(**inputs).logits - expected).abs().max() < 1e-5
    start = ClipPhiForCausalLM.from_pretrained(checkpoint).state_dict()
    moved = not torch.equal(merged.model.projector.weight, start["model.projector.weight"])
    assert moved == (options["target_modules"] == "all-linear" or "modules_to_save" in options)
    shutil.rmtree(tmp_path / "run")
    model.save_pretrained(tmp_path / "by_trainer", state_dict=None)
    before = trained(model)
    with torch.no_grad():
        for name in before:
            model.get_parameter(name).add_(1.0)
    model.load_state_dict(load_file(tmp_path / "by_trainer/model.safetensors"), strict=False)
    assert is_equal(trained(model), before)
