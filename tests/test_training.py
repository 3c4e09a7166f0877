"""The real script on tiny backbones: files, steps, parameters, losses."""

import json
import os
import re
import shutil

import pytest
import torch
from helpers import ACCELERATE, ROOT, TORCHRUN, metrics, run, stage1, stage2
from safetensors.torch import load_file

from clip_phi.cli import main
from clip_phi.data.synthetic import write_dataset
from clip_phi.training.arguments import parse_arguments
from modeling_clip_phi import ClipPhiForCausalLM


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, num_train=12, num_val=4)
    return folder


@pytest.fixture(scope="module")
def backbones(vision_backbone, text_backbone):
    return vision_backbone, text_backbone


@pytest.fixture(scope="module")
def trained1(data, backbones, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "stage1"
    options = ("--num_train_epochs", 2, "--gradient_accumulation_steps", 1, "--eval_steps", 4, "--learning_rate", 0.01)
    done = run(*stage1(data, backbones, output, *options), launcher=ACCELERATE)
    return output, done.stdout


@pytest.fixture(scope="module")
def trained2(data, trained1, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "stage2"
    done = run(
        *stage2(data, trained1[0], output, "--gradient_accumulation_steps", 3, "--lora_learning_rate", 0.01),
        launcher=(),
    )
    return output, done.stdout


def test_stage1_trains_the_projector_alone_and_writes_what_it_says(trained1, backbones):
    output, printed = trained1
    start = ClipPhiForCausalLM.from_backbones(*backbones)
    projector = sum(parameter.numel() for parameter in start.model.projector.parameters())
    total = sum(parameter.numel() for parameter in start.parameters())
    assert f"training {projector:,} of {total:,} parameters on 1 x cpu" in printed
    assert list(load_file(output / "model.safetensors")) == ["model.projector.bias", "model.projector.weight"]
    assert list(metrics(output, "loss")) == [1, 2, 3, 4, 5, 6]
    assert list(metrics(output, "eval_loss")) == [4, 6]
    assert metrics(output, "eval_loss")[6] < metrics(output, "loss")[1] - 0.005
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [4] * 4 + [6] * 4
    assert (output / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert not (output / "adapter").exists()


def test_frozen_weights_are_bit_equal_after_both_stages_and_trained_ones_moved(trained1, trained2, backbones):
    before = ClipPhiForCausalLM.from_backbones(*backbones).state_dict()
    after = ClipPhiForCausalLM.from_pretrained(trained2[0]).state_dict()
    stage1_projector = load_file(trained1[0] / "model.safetensors")
    moved = set()
    for name, value in after.items():
        plain = name.replace(".base_layer.", ".")
        if ".lora_" in name:
            if ".lora_B." in name:
                assert value.abs().sum() > 0, f"trained {name} did not move"
                moved.add(name.split(".")[-4])
        elif name.startswith("model.projector."):
            assert not torch.equal(value, before[plain]), f"trained {name} did not move in stage 1"
            assert not torch.equal(value, stage1_projector[plain]), f"trained {name} did not move in stage 2"
        else:
            assert torch.equal(value, before[plain]), f"frozen {name} moved"
    assert moved == {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}
    assert not [name for name in after if "vision_tower" in name and "lora" in name]


def test_stage2_counts_steps_and_keeps_how_to_ask_for_a_caption(trained2):
    output, _ = trained2
    assert list(metrics(output, "loss")) == [1]  # 12 images, 4 in a batch, 3 batches in a step
    assert ClipPhiForCausalLM.from_pretrained(output).config.caption_instruction == "Describe the image."
    assert sorted(path.name for path in (output / "adapter").iterdir())[:2] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_merged_checkpoint_holds_everything(trained1, data, tmp_path):
    run(*stage2(data, trained1[0], tmp_path / "merged", "--max_steps", 1, "--merged", True))
    names = load_file(tmp_path / "merged/model.safetensors").keys()
    assert not [name for name in names if "lora" in name]
    assert {name.split(".")[1] for name in names if name.startswith("model.")} == {
        "vision_tower",
        "projector",
        "language_model",
    }
    merged = ClipPhiForCausalLM.from_pretrained(tmp_path / "merged")
    assert not merged.config.delta and merged.config.text_backbone is None

    # Trained on, it stays merged: a delta over the original backbones would lose what was folded in.
    done = run(*stage2(data, tmp_path / "merged", tmp_path / "again", "--max_steps", 1))
    assert "training starts from a merged model, so a merged model is saved" in done.stdout
    again = load_file(tmp_path / "again/model.safetensors")
    name = "model.vision_tower.encoder.layers.0.mlp.fc1.weight"
    assert again.keys() == names and torch.equal(again[name], merged.state_dict()[name])


def test_accumulation_equals_one_big_batch_though_answers_differ_in_length(data, trained1, tmp_path):
    common = ("--max_steps", 3, "--lora_learning_rate", 0.01, "--max_grad_norm", 0)
    big = ("--per_device_train_batch_size", 12, "--gradient_accumulation_steps", 1)
    small = ("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 6)
    run(*stage2(data, trained1[0], tmp_path / "big", *common, *big, "--num_train_epochs", 3))
    run(*stage2(data, trained1[0], tmp_path / "small", *common, *small, "--num_train_epochs", 3))
    expected, losses = metrics(tmp_path / "big", "loss"), metrics(tmp_path / "small", "loss")
    assert list(expected) == [1, 2, 3]
    assert list(losses.values()) == pytest.approx(list(expected.values()), rel=1e-5)
    one, other = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("big", "small"))
    for name, value in one.items():
        assert (other[name] - value).abs().max() < 2e-4, name


def test_two_processes_give_the_losses_of_one(data, backbones, tmp_path):
    common = ("--max_steps", 2, "--gradient_accumulation_steps", 1)
    run(*stage1(data, backbones, tmp_path / "one", *common, "--per_device_train_batch_size", 4))
    two = stage1(data, backbones, tmp_path / "two", *common, "--per_device_train_batch_size", 2)
    done = run(*two, launcher=TORCHRUN, ACCELERATE_USE_CPU="true")
    assert "parameters on 2 x cpu" in done.stdout
    for key in ("loss", "eval_loss"):
        one = metrics(tmp_path / "one", key)
        assert metrics(tmp_path / "two", key) == pytest.approx(one, rel=1e-5)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        assert (two[name] - value).abs().max() < 1e-5, name


def test_workers_bf16_adam8bit_checkpointing_mlp_and_hold_out_run_together(data, backbones, tmp_path):
    options = [
        *(
            "--dataloader_num_workers",
            2,
            "--optim",
            "adam8bit",
            "--gradient_checkpointing",
            True,
            "--projector_type",
            "mlp",
        ),
        *("--eval_data", "--holdout_images", 3, "--captions_per_image", 2, "--num_train_epochs", 1),
        *("--gradient_accumulation_steps", 1),
    ]
    run(*stage1(data, backbones, tmp_path / "run", *options), ACCELERATE_MIXED_PRECISION="bf16")
    assert list(metrics(tmp_path / "run", "loss")) == [1, 2, 3]  # 9 images are left to train on
    model = ClipPhiForCausalLM.from_pretrained(tmp_path / "run")
    assert model.dtype == torch.bfloat16
    assert set(load_file(tmp_path / "run/model.safetensors")) == {
        f"model.projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }


def damage(data, folder):
    """A copy of the drawn data with two unreadable images and one missing."""
    shutil.copytree(data, folder)
    (folder / "train2017/000000000002.jpg").write_bytes(b"")
    (folder / "train2017/000000000005.jpg").write_bytes(b"<html>404</html>")
    (folder / "train2017/000000000007.jpg").unlink()
    return folder


REPORT = {
    "records": 60,
    "skipped": {"empty image file": 5, "missing image": 5, "not an image": 5},
    "repaired": {},
}


@pytest.mark.parametrize("processes", [1, 2])
def test_damaged_images_are_skipped_reported_once_and_alike_by_any_number_of_processes(
    processes, data, backbones, tmp_path
):
    damaged = damage(data, tmp_path / "data")
    options = (
        "--num_train_epochs",
        3,
        "--max_bad_fraction",
        0.25,
        "--per_device_train_batch_size",
        2 // processes,
        "--dataloader_num_workers",
        1,
    )
    done = run(*stage1(damaged, backbones, tmp_path / "run", *options), processes=processes)
    report = json.loads((tmp_path / "run/data_report.json").read_text())
    assert {name: report[name] for name in REPORT} == REPORT
    (example,) = report["examples"]["missing image"]  # a hint may follow
    origin = f"{damaged}/annotations/captions_train2017.json:annotations[30]"
    assert example.startswith(f"{origin}: {damaged}/train2017/000000000007.jpg")
    assert "15 of 60 records were skipped" in done.stdout
    assert len(metrics(tmp_path / "run", "loss")) == -(-11 * 3 // 2)


def test_a_run_stops_when_too_many_images_turn_out_damaged(data, backbones, tmp_path):
    damaged = damage(data, tmp_path / "data")
    options = ("--max_bad_fraction", 0.1, "--per_device_train_batch_size", 12, "--debug", False)
    done = run(*stage1(damaged, backbones, tmp_path / "run", *options), expect=2)
    assert "15 of 60 records are bad (25.00%), more than --max_bad_fraction 0.1 allows" in done.stderr
    assert "not an image (e.g. " in done.stderr and "Traceback" not in done.stderr


def test_text_only_records_train_as_text_in_two_processes_that_lack_images_at_different_steps(data, trained1, tmp_path):
    records = json.loads((data / "llava_instruct_train.json").read_text())
    for number in range(12):
        talk = [{"from": "human", "value": f"Is it {number}?"}, {"from": "gpt", "value": "yes"}]
        records.append({"id": f"text{number}", "conversations": talk})
    mixed = tmp_path / "mixed.json"
    mixed.write_text(json.dumps(records))
    options = stage2(data, trained1[0], tmp_path / "two", "--per_device_train_batch_size", 1, "--num_train_epochs", 1)
    options[options.index("--data") + 1] = f"llava:{mixed},images={data}/train2017"
    run(*options, processes=2)
    options[options.index(tmp_path / "two")] = tmp_path / "one"
    options[-3] = 2
    run(*options)
    one, two = (metrics(tmp_path / name, "loss") for name in ("one", "two"))
    assert len(one) > 5 and two == pytest.approx(one, rel=1e-5)
    report = json.loads((tmp_path / "one/data_report.json").read_text())
    assert report["records"] == len(records) and report["skipped"] == {}


def test_several_sources_are_mixed_by_weight_and_several_validation_sets_are_told_apart(data, trained1, tmp_path):
    llava = f"llava:{data}/llava_instruct_train.json,images={data}/train2017"
    coco = f"coco:{data}/annotations/captions_train2017.json,images={data}/train2017"
    held_out = [f"{text.replace('train', 'val')},name={name}" for name, text in (("talk", llava), ("captions", coco))]
    options = stage2(data, trained1[0], tmp_path / "run", "--gradient_accumulation_steps", 1)
    place = options.index("--data")
    options[place : place + 4] = ["--data", f"{llava},weight=3", f"{coco},weight=1", "--eval_data", *held_out]
    run(*options)
    losses = {name: metrics(tmp_path / "run", f"eval_loss/{name}")[6] for name in ("talk", "captions")}
    assert len(metrics(tmp_path / "run", "loss")) == 6  # 24 samples of both, 4 in a step
    assert min(losses.values()) < metrics(tmp_path / "run", "eval_loss")[6] < max(losses.values())


def test_a_stream_is_trained_on_for_max_steps_and_its_damage_is_counted_as_it_comes(data, backbones, tmp_path):
    import datasets

    files = sorted((data / "train2017").iterdir())
    rows = [{"image": {"bytes": file.read_bytes(), "path": file.name}, "caption": "a circle"} for file in files]
    rows[3]["image"]["bytes"] = b"damaged"
    rows[5]["caption"] = " "
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "rows")
    options = stage1(data, backbones, tmp_path / "run", "--max_steps", 9, "--dataloader_num_workers", 1)
    options[options.index("--data") + 1] = f"dataset:{tmp_path}/rows,streaming=true"
    run(*options)
    assert len(metrics(tmp_path / "run", "loss")) == 9
    report = json.loads((tmp_path / "run/data_report.json").read_text())
    assert report["skipped"] == {"not an image": 1, "caption is empty": 1}
    assert report["records"] == 9 * 4
    assert "streamed, and needs --max_steps and --eval_data" in run(*options, "--max_steps", 0, expect=1).stderr


def test_packs_of_tokens_give_the_same_training_with_one_and_two_processes(data, trained1, tmp_path):
    common = ("--max_tokens_per_batch", 900, "--lora_learning_rate", 0.01, "--num_train_epochs", 2)
    one, two = (stage2(data, trained1[0], tmp_path / name, *common) for name in ("one", "two"))
    done = run(*one)
    packs, fill = re.search(r"(\d+) packs of 900 tokens an epoch, ([\d.]+)% full", done.stdout).groups()
    run(*two, "--gradient_accumulation_steps", 1, processes=2)
    expected = metrics(tmp_path / "one", "loss")
    assert len(expected) == int(packs) and float(fill) > 60  # two packs in a step, two epochs
    assert metrics(tmp_path / "two", "loss") == pytest.approx(expected, rel=1e-5)


def test_a_warm_feature_cache_gives_the_same_run_and_opens_no_image(data, backbones, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    cache = (
        "--cache_features",
        tmp_path / "cache",
        "--num_sample_texts",
        0,
        "--num_train_epochs",
        2,
        "--dataloader_num_workers",
        1,
    )
    run(*stage1(copy, backbones, tmp_path / "cold", *cache))
    for image in [*copy.glob("*2017/*.jpg")]:  # what it finds now, it cannot decode
        status = image.stat()
        image.write_bytes(b"x" * status.st_size)
        os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    run(*stage1(copy, backbones, tmp_path / "warm", *cache))
    for key in ("loss", "eval_loss"):
        assert metrics(tmp_path / "warm", key) == metrics(tmp_path / "cold", key)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("cold", "warm"))
    assert all(torch.equal(other[name], value) for name, value in one.items())
    run(*stage1(data, backbones, tmp_path / "plain", "--num_train_epochs", 2, "--num_sample_texts", 0))
    plain, cached = metrics(tmp_path / "plain", "loss"), metrics(tmp_path / "cold", "loss")
    assert plain == pytest.approx(cached, rel=1e-3) and plain != cached  # features are kept in bfloat16

    images = sorted((copy / "train2017").iterdir())
    os.utime(images[0])  # a changed image is noticed
    done = run(*stage1(copy, backbones, tmp_path / "changed", *cache, "--max_bad_fraction", 0.5))
    assert "5 of 60 records were skipped" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stage", "4"], "unknown --stage 4"),
        (["--stage", "1"], "'clip-phi download coco' downloads it"),
        (
            ["--stage", "2", "--init_from", "a/b", "--data", "llava:README.md", "--holdout_images", "0"],
            "give --eval_data or --holdout_images",
        ),
    ],
)
def test_bad_input_is_one_line_with_status_2_and_no_traceback(options, message):
    done = run(*options, expect=2)
    assert message in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("train_accelerate.py: error: ")


def test_answers_that_the_context_has_no_room_for_are_refused_before_training(data, backbones, tmp_path):
    done = run(*stage1(data, backbones, tmp_path / "run", "--max_new_tokens", 10**5, "--debug", False), expect=2)
    assert "--max_new_tokens 100000: the decoder's context has " in done.stderr
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_missing_weights_say_where_they_were_looked_for_and_name_the_demo(data, tmp_path):
    options = stage1(data, ("nobody/nothing", "microsoft/phi-2"), tmp_path / "run", "--debug", False)
    done = run(*options, expect=2)
    assert "nobody/nothing" in done.stderr and "make demo" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["outputs/absent", "tests/absent", "./absent", "/nowhere", "absent", "a/b/c"])
def test_a_missing_local_folder_is_named_before_anything_is_imported(name, data, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    arguments = parse_arguments(list(map(str, stage2(data, name, "out"))))
    with pytest.raises(ValueError, match=f"--init_from {name}: there is no such folder, and a Hub id is user/name"):
        arguments.check()
    parse_arguments(list(map(str, stage2(data, "someone/model", "out")))).check()
    for command in (["chat", name], ["inspect", "README.md", "--model", name]):
        assert main(command) == 2
        assert f"no model {name}: there is no such folder" in capsys.readouterr().err
    backbones = (name, "gpt2") if name != "absent" else ("./absent", "gpt2")
    with pytest.raises(ValueError, match=f"--vision_backbone {backbones[0]}: there is no such folder"):
        parse_arguments(list(map(str, stage1(data, backbones, "out")))).check()
