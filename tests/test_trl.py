"""TRL's trainers on a saved model and on one of backbones, with and without LoRA; the result is a delta again."""

import copy
import json
import runpy
import sys

import pytest
import torch
from conftest import END_TOKEN
from helpers import ROOT
from PIL import Image

from clip_phi.cli import main
from clip_phi.data.synthetic import write_dataset
from clip_phi.serving.engine import Engine, as_prompt
from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

pytestmark = [pytest.mark.trl, pytest.mark.usefixtures("installed")]
DECODER = r"model\.language_model\..*\.(q_proj|fc1)"


@pytest.fixture(scope="module")
def installed():
    pytest.importorskip("trl", reason="TRL is not installed: make test-trl")


def picture(seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def turn(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


def records(kind: str, number: int = 4) -> list[dict]:
    """In the conversational form of TRL's documentation. The odd ones have two images."""
    found = []
    for seed in range(number):
        record = {"images": [picture(seed), picture(seed + 9)][: 1 + seed % 2]}
        question, good, bad = turn("user", "a star?"), turn("assistant", "a red circle"), turn("assistant", "no")
        forms = {"sft": {"messages": question + good}, "dpo": {"prompt": question, "chosen": good, "rejected": bad}}
        found.append(record | forms.get(kind, {"prompt": question}))
    return found


def make_trainer(kind: str, model, processor, folder, lora: bool):
    import trl
    from datasets import Dataset
    from peft import LoraConfig

    options = {"output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.01}
    options |= {"report_to": [], "use_cpu": True, "bf16": False, "logging_steps": 1, "disable_tqdm": True}
    own = {"sft": {"assistant_only_loss": True}, "grpo": {"num_generations": 2, "max_completion_length": 4}}
    name = kind.upper()
    arguments = getattr(trl, f"{name}Config")(**options | own.get(kind, {}))
    extra = {"peft_config": LoraConfig(r=2, target_modules=DECODER)} if lora else {}
    if kind == "grpo":  # rewards that differ within a group, or nothing would be learnt
        extra["reward_funcs"] = lambda completions, **_: [float(number % 2) for number in range(len(completions))]
    if kind == "dpo" and not lora:
        extra["ref_model"] = copy.deepcopy(model)
    data = Dataset.from_list(records(kind))
    return getattr(trl, f"{name}Trainer")(
        model, args=arguments, train_dataset=data, processing_class=processor, **extra
    )


@pytest.mark.parametrize("lora", [False, True], ids=["projector", "lora"])
@pytest.mark.parametrize("origin", ["saved", "backbones"])
@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_a_trainer_gives_a_delta_with_the_backbones_untouched(
    kind, origin, lora, checkpoint, vision_backbone, text_backbone, tmp_path
):
    torch.manual_seed(0)
    if origin == "saved":
        model, processor = ClipPhiForCausalLM.from_pretrained(checkpoint), ClipPhiProcessor.from_pretrained(checkpoint)
    else:
        model = ClipPhiForCausalLM.from_backbones(vision_backbone, text_backbone)
        processor = ClipPhiProcessor.from_backbones(vision_backbone, text_backbone)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer = make_trainer(kind, model, processor, tmp_path / "run", lora)
    trainer.train()
    trained = trainer.model.get_base_model() if lora else trainer.model
    trained.save_pretrained(tmp_path / "delta")
    processor.save_pretrained(tmp_path / "delta")
    assert json.loads((tmp_path / "delta/config.json").read_text())["delta"]
    reloaded = ClipPhiForCausalLM.from_pretrained(tmp_path / "delta")
    state = {name.replace(".base_layer.", "."): value for name, value in reloaded.state_dict().items()}
    moved = {name for name, value in state.items() if name in before and not torch.equal(value, before[name])}
    assert moved == (set() if lora else {"model.projector.bias", "model.projector.weight"})
    adapter = {name: value for name, value in state.items() if "lora_" in name}
    assert bool(adapter) == lora and all(value.abs().sum() > 0 for value in adapter.values())
    assert not any("vision_tower" in name for name in adapter)
    messages, images = as_prompt("a star?", picture(0))
    with Engine.from_pretrained(str(tmp_path / "delta"), "cpu") as engine:
        answer = engine.submit(messages, images, max_new_tokens=4).result()
    inputs = processor(text=["<image>Instruct: a star?\nOutput:"], images=images, return_tensors="pt")
    ids = trained.eval().generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer.strip() == processor.decode(ids, skip_special_tokens=True).strip()


def test_sft_learns_the_tokens_that_this_projects_training_learns(model, processor, tmp_path):
    """Several images in a prompt included."""
    trainer = make_trainer("sft", copy.deepcopy(model), processor, tmp_path, False)
    batch = trainer.data_collator(records("sft", 2))
    for number, record in enumerate(records("sft", 2)):
        images = [{"type": "image"}] * len(record["images"])
        messages = copy.deepcopy(record["messages"])
        messages[0]["content"] = [*images, {"type": "text", "text": "a star?"}]
        ids, labels = processor.encode(messages)
        assert batch["input_ids"][number, : len(ids)].tolist() == ids
        assert batch["labels"][number, : len(ids)].tolist() == labels
        assert processor.decode(ids).endswith(END_TOKEN)
    assert len(batch["pixel_values"]) == 3


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with drawn data, and a model of stage 2 that has learnt nothing."""
    folder = tmp_path_factory.mktemp("start")
    write_dataset(folder / "data", num_train=4, num_val=4)
    demo = ROOT / "examples/demo_backbones"
    model = ClipPhiForCausalLM.from_backbones(str(demo / "vision"), str(demo / "text"))
    model.config.caption_instruction = "Describe the image."
    model.save_pretrained(folder / "model")
    ClipPhiProcessor.from_backbones(str(demo / "vision"), str(demo / "text")).save_pretrained(folder / "model")
    return folder


def source(folder, part: str) -> str:
    return f"llava:{folder}/data/llava_instruct_{part}.json,images={folder}/data/{part}2017"


@pytest.mark.parametrize("method", ["sft", "dpo", "grpo"])
def test_the_example_trains_and_evaluate_takes_its_result(method, start, tmp_path, monkeypatch, capsys):
    data = source(start, "train")
    if method == "dpo":
        command = ["preferences", start / "model", tmp_path / "pairs.parquet", "--task", "vqa", "--data", data]
        assert main([*map(str, command), "--samples", "4", "--temperature", "3"]) == 0
        data = tmp_path / "pairs.parquet"
    options = ["--method", method, "--model", start / "model", "--data", data, "--max_steps", 1]
    options += ["--output_dir", tmp_path / "trained", "--lora_r", 2, "--learning_rate", 0.01]
    monkeypatch.setattr(sys, "argv", ["trl_train.py", *map(str, options)])
    runpy.run_path(str(ROOT / "examples/trl_train.py"), run_name="__main__")
    assert ("conversations are not used: no short answer" in capsys.readouterr().out) == (method == "grpo")
    before = ClipPhiForCausalLM.from_pretrained(start / "model").state_dict()
    after = ClipPhiForCausalLM.from_pretrained(tmp_path / "trained").state_dict()
    if method != "grpo":  # whose rewards are all zero where no sample is right
        assert not torch.equal(before["model.projector.weight"], after["model.projector.weight"])
    assert any("lora_" in name for name in after)
    evaluate = ["evaluate", tmp_path / "trained", "--task", "vqa", "--data", source(start, "val")]
    assert main([*map(str, evaluate), "--num_images", "4", "--max_new_tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["images"] == 4


def test_rows_of_preferences_are_learnt_as_they_are(start, tmp_path, capsys):
    """RLAIF-V's and VLFeedback's layouts, and what has no worse answer is counted."""
    images = start / "data/train2017"
    first, second, *_ = sorted(path.name for path in images.iterdir())
    ratings = [{"response": "two", "annotations": {"Help": {"Rating": "5"}}}]
    ratings.append({"response": "nine", "annotations": {"Help": {"Rating": "1"}}})
    rows = [
        {"image": first, "question": "How many?", "chosen": "one", "rejected": "six"},
        {"image": second, "prompt": "How many?", "completions": ratings},
        {"image": second, "question": "A star?", "answer": "no"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records = runpy.run_path(str(ROOT / "examples/trl_train.py"))["records"]
    found = list(records("dpo", f"dataset:{tmp_path / 'rows.jsonl'},images={images}"))
    texts = [[row[name][0]["content"] for name in ("prompt", "chosen", "rejected")] for row in found]
    assert capsys.readouterr().out == "1 rows are not used: no image, prompt, or two different answers\n"
    assert texts == [["How many?", "one", "six"], ["How many?", "two", "nine"]]
    assert [row["images"][0]["bytes"] for row in found] == [(images / name).read_bytes() for name in (first, second)]
