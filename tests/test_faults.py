"""What goes wrong in training is named, survived or refused: the script's loop, in this process, with one fault."""

import errno
import json
import math
import os
import re
import runpy
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import ROOT, metrics, stage1, stage2
from safetensors.torch import load_file

from clip_phi.batching import dataset as loader
from clip_phi.batching.attention import PACKED_ATTENTION
from clip_phi.data.synthetic import write_dataset
from clip_phi.training import guards as watch
from clip_phi.training import logger as monitor
from clip_phi.training.arguments import parse_arguments
from clip_phi.training.checkpoint import Checkpoints
from modeling_clip_phi import ClipPhiForCausalLM as Causal

ORIGIN = "annotations/captions_train2017.json:annotations["
add_image_features = loader.add_image_features


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, num_train=12, num_val=4)
    return folder


@pytest.fixture(scope="module")
def backbones(vision_backbone, text_backbone):
    return vision_backbone, text_backbone


@pytest.fixture
def train(monkeypatch):
    """train_accelerate.py's train, of options as on the command line."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(options):
        AcceleratorState._reset_state(reset_partial_state=True)
        arguments = parse_arguments([str(option) for option in options])
        arguments.check()
        runpy.run_path(str(ROOT / "train_accelerate.py"))["train"](arguments)  # anew, with what a test has patched

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def few(data, backbones, tmp_path):
    """Options of six steps of stage 1, of which each sees four images."""
    silent = ("--num_train_epochs", 2, "--num_sample_texts", 0, "--dataloader_num_workers", 0, "--learning_rate", 0.01)
    return stage1(data, backbones, tmp_path / "run", *silent)


def before_step(monkeypatch, fault):
    """Call fault(step, pack, model) when the data of a training step has come."""
    steps = []

    def add_with_fault(pack, model, cache):
        pack = add_image_features(pack, model, cache)
        if model.training:
            steps.append(1)
            fault(len(steps), pack, model)
        return pack

    monkeypatch.setattr(loader, "add_image_features", add_with_fault)


def poison_from(first, last=99):
    def poison(step, pack, model):
        if first <= step <= last:
            pack.inputs["pixel_values"] = pack.inputs["pixel_values"] * math.nan

    return poison


def test_a_loss_that_is_not_finite_stops_the_run_with_its_samples_and_what_reproduces_it(
    train, few, backbones, tmp_path, monkeypatch
):
    before_step(monkeypatch, poison_from(2))
    with pytest.raises(ValueError, match="step 2: loss nan, .*--nan_policy skip") as caught:
        train(few)
    place = tmp_path / "run/not_finite/step-00000002"
    kept = torch.load(place / "rank-0.pt", weights_only=False)
    assert kept["step"] == 2 and math.isnan(kept["loss"]) and len(kept["origins"][0]) == 4
    assert all(ORIGIN in origin and origin in str(caught.value) for origin in kept["origins"][0])
    model = Causal.from_backbones(*backbones)
    model.load_state_dict(load_file(place / "trained.safetensors"), strict=False)
    model.set_attn_implementation({"text_config": PACKED_ATTENTION})
    assert not model(**kept["inputs"][0], use_cache=False).loss.isfinite()


def test_steps_left_out_change_no_weight_and_are_counted(train, few, tmp_path, monkeypatch, capsys):
    before_step(monkeypatch, poison_from(3))
    train([*few, "--nan_policy", "skip"])
    assert list(metrics(tmp_path / "run", "loss")) == [1, 2]
    kept, saved = (
        load_file(tmp_path / "run" / name)
        for name in ("not_finite/step-00000003/trained.safetensors", "model.safetensors")
    )
    assert kept.keys() == saved.keys() and all(torch.equal(saved[name], value) for name, value in kept.items())
    assert json.loads((tmp_path / "run/run.json").read_text())["steps_left_out"] == 4
    assert capsys.readouterr().out.count("It is left out") == 4


def test_a_run_that_only_leaves_steps_out_stops(train, few, monkeypatch):
    monkeypatch.setattr(watch, "MAX_IN_A_ROW", 2)
    before_step(monkeypatch, poison_from(2))
    with pytest.raises(ValueError, match="step 4: .* in 3 steps in a row"):
        train([*few, "--nan_policy", "skip"])


def test_a_gradient_that_overflows_is_the_scalers_to_handle_but_a_loss_is_not(tmp_path):
    health = watch.NonFiniteGuard(tmp_path, "stop", print)
    assert health.is_finite_step(1, 2.0, math.inf, scaled=True)
    assert not health.is_finite_step(2, 2.0, math.inf, scaled=False)
    assert not health.is_finite_step(3, math.nan, 1.0, scaled=True)


def test_running_out_of_memory_names_a_number_of_tokens_that_fits(train, few, monkeypatch):
    def out_of_memory(self, *inputs, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    before_step(monkeypatch, lambda step, *_: step == 2 and monkeypatch.setattr(Causal, "forward", out_of_memory))
    with pytest.raises(OSError, match="step 2: out of memory") as caught:
        train(few)
    tokens, fits = re.search(r"with ([\d,]+) tokens .*--max_tokens_per_batch (\d+)", str(caught.value)).groups()
    assert 64 <= int(fits) < int(tokens.replace(",", ""))


@pytest.mark.parametrize(
    ("held", "most", "limit", "fits"),
    [
        (0, 0, None, 448),  # a first step: half of its tokens, in full packs of 64
        (10e9, 20e9, 30e9, 896),  # what was too much is not tried again, however much room there seems to be
        (10e9, 15e9, 13e9, 448),  # 3 GB of 5 MB a token, with some air
        (10e9, 15e9, 10e9, 64),
    ],
)
def test_tokens_that_fit_are_counted_from_what_earlier_steps_took(held, most, limit, fits):
    assert watch.fitting_tokens(1000, held, most, limit) == fits


def test_data_that_does_not_come_is_named_and_waited_for(train, few, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(watch, "STALL_SECONDS", 0.2)
    before_step(monkeypatch, lambda step, pack, model: time.sleep(0.6 * (step == 2)))
    train(few)
    printed = capsys.readouterr().err.splitlines()
    lines = [line for line in printed if "no data for 0.2 s: step 2 needs " in line]  # a slow machine adds other steps
    assert len(lines) == 1 and lines[0].count(ORIGIN) == 4
    assert list(metrics(tmp_path / "run", "loss")) == [1, 2, 3, 4, 5, 6]


def test_a_worker_that_dies_is_told_with_what_was_waited_for(train, few, monkeypatch):
    read = loader.ImageReader.__call__

    def die_in_a_worker(self, image):
        if torch.utils.data.get_worker_info() is not None:
            os._exit(1)
        return read(self, image)

    monkeypatch.setattr(loader.ImageReader, "__call__", die_in_a_worker)
    with pytest.raises(OSError, match="a process that reads data has died: step 1 needs .*--dataloader_num_workers 0"):
        train([*few, "--dataloader_num_workers", 1])


def test_a_folder_that_cannot_be_written_or_is_full_is_found_before_training(train, few, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write in .*choose another --output_dir"):
        train([*few, "--output_dir", tmp_path / "file/run"])
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="has room for 0.00 GB, and training checkpoints and model need"):
        train(few)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_is_full_for_a_while_costs_files_and_lines_but_not_the_run(
    train, few, tmp_path, monkeypatch, capsys
):
    write, save, opened = Checkpoints._write, Causal.save_pretrained, []

    def write_later(self, step, *rest):
        return (full if step < 4 else write)(self, step, *rest)

    def save_later(self, *rest, calls=[], **options):  # noqa: B006
        calls.append(1)
        return (full if len(calls) == 1 else save)(self, *rest, **options)

    def open_later(path, *rest, **options):
        opened.append(path)
        return (full if len(opened) == 2 else open)(path, *rest, **options)

    monkeypatch.setattr(Checkpoints, "_write", write_later)
    monkeypatch.setattr(Causal, "save_pretrained", save_later)
    monkeypatch.setattr(monitor, "open", open_later, raising=False)
    train([*few, "--save_steps", 2, "--eval_steps", 3])
    told = capsys.readouterr().err
    assert told.count("a training checkpoint was not written, and training goes on") == 1
    assert told.count(f"the model in {tmp_path / 'run'} was not written, and training goes on") == 1
    assert told.count("metrics.jsonl was not written, and training goes on") == 1
    assert sorted(os.listdir(tmp_path / "run/checkpoints")) == ["step-00000004", "step-00000006"]
    assert list(metrics(tmp_path / "run", "loss")) == [1, 3, 4, 5, 6]
    assert (tmp_path / "run/model.safetensors").exists()


def test_what_cannot_be_written_at_the_end_is_an_error(train, few, monkeypatch):
    monkeypatch.setattr(Checkpoints, "_write", full)
    with pytest.raises(OSError, match="a training checkpoint was not written: .*No space left"):
        train([*few, "--max_steps", 1])


def test_a_frozen_weight_that_changes_is_named_at_the_end(train, few, tmp_path, monkeypatch):
    @torch.no_grad()
    def nudge(step, pack, model):
        if step == 2:
            model.lm_head.weight[3, 5] += 0.5

    before_step(monkeypatch, nudge)
    with pytest.raises(ValueError, match=r"1 frozen weights changed in training \(lm_head.weight\)"):
        train(few)
    assert "frozen_weights" not in json.loads((tmp_path / "run/run.json").read_text())


def test_a_loss_that_jumps_is_logged_with_its_samples(tmp_path):
    health = watch.NonFiniteGuard(tmp_path, "stop", print)
    quiet = [health.spikes_at(3.0 + 0.1 * math.sin(step)) for step in range(100)]
    assert not any(quiet) and not health.spikes_at(3.4) and health.spikes_at(9.0) and health.state["spikes"] == 1
    log = monitor.TrainingLogger(tmp_path, 1, True, torch.device("cpu"))
    log.log_spike(101, 9.0, ["a.json:3", "a.json:7"])
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"step": 101, "loss_spike": 9.0, "origins": ["a.json:3", "a.json:7"]}


def test_a_run_that_waits_for_its_data_says_once_what_to_try(tmp_path, capsys):
    log = monitor.TrainingLogger(tmp_path, 9, True, torch.device("cpu"), advice="try --image_processing fast")
    for step, waited in ((1, 50.0), (2, 0.0), (3, 50.0), (4, 50.0)):  # the first line includes the start
        log.count(monitor.StepCounts(), 1.0, waited)
        log.log(step)
    assert [line.partition(":")[2] for line in capsys.readouterr().out.splitlines() if "waits for" in line] == [
        " try --image_processing fast"
    ]


def test_run_json_and_tensorboard_tell_what_metrics_jsonl_tells_and_a_resumed_run_goes_on_counting(
    train, few, data, tmp_path
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    few = [*few, "--save_steps", 3, "--eval_steps", 3]
    train([*few, "--report_to", "tensorboard"])
    folder = tmp_path / "run"
    (place,) = {path.parent for path in folder.rglob("events.out.tfevents*") if path.parent.name == "clip-phi"}
    events = EventAccumulator(str(place)).Reload()
    for name in ("loss", "learning_rate/projector", "tokens_seen", "eval_loss", "grad_norm"):
        written = {event.step: event.value for event in events.Scalars(name)}
        assert written == pytest.approx(metrics(folder, name), rel=1e-6), name

    captions = json.loads((data / "annotations/captions_train2017.json").read_text())["annotations"]
    assert metrics(folder, "samples_seen")[6] == 2 * len(captions)
    assert metrics(folder, "epoch") == {step: pytest.approx(step / 3, abs=1e-4) for step in range(1, 7)}
    run = json.loads((folder / "run.json").read_text())
    assert run["frozen_weights"] == "unchanged" and run["steps_left_out"] == 0 and run["num_steps"] == 6
    assert run["held_out_loss"] == metrics(folder, "eval_loss")[6]
    projector = sum(value.numel() for value in load_file(folder / "model.safetensors").values())
    assert run["trainable_parameters"] == projector
    assert run["environment"]["packages"]["torch"] == torch.__version__ and run["data"]["records"] == len(captions)
    assert run["options"]["learning_rate"] == 0.01 and len(run["data"]["fingerprint"]) > 8

    counted = ("loss", "samples_seen", "tokens_seen", "epoch")
    before = {name: metrics(folder, name) for name in counted}
    shutil.rmtree(folder / "checkpoints/step-00000006")
    train([*few, "--resume_from_checkpoint"])
    assert {name: metrics(folder, name) for name in counted} == before
    assert json.loads((folder / "run.json").read_text())["first_step"] == 3


def test_recomputed_activations_give_the_same_training(train, few, tmp_path):
    train(few)
    again = [tmp_path / "again" if option == tmp_path / "run" else option for option in few]
    train([*again, "--gradient_checkpointing", "true"])
    assert metrics(tmp_path / "again", "loss") == metrics(tmp_path / "run", "loss")
    assert metrics(tmp_path / "again", "grad_norm") == metrics(tmp_path / "run", "grad_norm")


@pytest.mark.parametrize("optimizer", ["adam8bit", "paged_adam8bit"])
def test_optimizers_of_bitsandbytes_train_on_the_cpu(optimizer, train, few, tmp_path):
    train([*few, "--optim", optimizer])
    losses = metrics(tmp_path / "run", "loss")
    assert losses[6] < losses[1] - 0.005


@pytest.fixture
def stage2_of(train, data, tmp_path):
    """Between the demo's backbones: 4-bit weights come in blocks of 64."""
    demo = [ROOT / "examples/demo_backbones" / part for part in ("vision", "text")]
    train(stage1(data, demo, tmp_path / "run", "--max_steps", 1, "--num_sample_texts", 0))

    def run(*options):
        quick = ["--num_sample_texts", 0, "--gradient_accumulation_steps", 1]
        quick += [] if "full" in options else ["--lora_learning_rate", 0.01]
        train(stage2(data, tmp_path / "run", tmp_path / "two", *quick, "--max_steps", 2, *options))
        return tmp_path / "two"

    return run


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_decoder_trains_lora_and_saves_a_delta_for_the_whole_one(kind, stage2_of, train, data, tmp_path):
    folder = stage2_of("--quantization", kind, "--eval_steps", 1)
    losses = metrics(folder, "loss")
    assert len(losses) == 2 and all(map(math.isfinite, losses.values()))
    saved = load_file(folder / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert any(not torch.equal(value, load_file(tmp_path / "run/model.safetensors")[n]) for n, value in saved.items())
    adapter = load_file(folder / "adapter/adapter_model.safetensors")
    assert all(value.abs().sum() > 0 for name, value in adapter.items() if "lora_B" in name)
    whole = Causal.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = whole(input_ids=ids).logits
    whole.save_pretrained(tmp_path / "merged", merged=True)
    merged = Causal.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert (merged(input_ids=ids).logits - expected).abs().max() < 1e-5

    # Stage 2 goes on from its own result, in the same folder, with the adapter that is there.
    train([*stage2(data, folder, folder, "--quantization", kind, "--max_steps", 1, "--lora_learning_rate", 1e-9)])
    again = load_file(folder / "adapter/adapter_model.safetensors")
    assert again.keys() == adapter.keys()
    assert all((value - adapter[name]).abs().max() < 1e-7 for name, value in again.items())


def test_stage_2_goes_on_with_its_adapter_or_refuses_another_one(stage2_of, train, data, tmp_path):
    folder = stage2_of("--lora_targets", "q_proj,fc1", "--lora_r", 3)
    (last,) = [value for step, value in metrics(folder, "eval_loss").items() if step == 2]
    options = [
        *stage2(data, folder, tmp_path / "three", "--max_steps", 2, "--lora_learning_rate", 0.001),
        "--lora_r",
        3,
    ]
    train([*options, "--lora_dropout", 0.25, "--save_steps", 1])
    run = json.loads((tmp_path / "three/run.json").read_text())
    assert [run["options"][name] for name in ("lora_r", "lora_alpha", "lora_targets", "lora_dropout")] == [
        *(3, 128, "fc1,q_proj", 0.25)
    ]
    before, after = (load_file(each / "adapter/adapter_model.safetensors") for each in (folder, tmp_path / "three"))
    assert before.keys() == after.keys() and all(not torch.equal(before[name], after[name]) for name in before)
    assert metrics(tmp_path / "three", "eval_loss")[2] < last, "training goes on from what was learnt"
    saved = json.loads((tmp_path / "three/adapter/adapter_config.json").read_text())
    assert (saved["r"], saved["lora_dropout"]) == (3, 0.25)
    shutil.rmtree(tmp_path / "three/checkpoints/step-00000002")
    train([*options, "--lora_dropout", 0.25, "--save_steps", 1, "--resume_from_checkpoint"])
    resumed = load_file(tmp_path / "three/adapter/adapter_model.safetensors")
    assert all(torch.equal(value, after[name]) for name, value in resumed.items()), "dropout included"
    for wrong, message in (
        (("--lora_r", 8), "--lora_r 8: the adapter of"),
        (("--lora_targets", "q_proj"), "--lora_targets q_proj: the adapter of .* has fc1,q_proj"),
    ):
        with pytest.raises(ValueError, match=message):
            train([*options, *wrong])
    with pytest.raises(ValueError, match="--tune_decoder full: .* has a LoRA adapter: leave it out, or start from"):
        train(stage2(data, folder, tmp_path / "four", "--tune_decoder", "full"))


def test_all_of_the_decoder_can_be_trained_and_the_result_is_whole(stage2_of):
    folder = stage2_of("--tune_decoder", "full", "--learning_rate", 0.001)
    demo = (str(ROOT / "examples/demo_backbones" / part) for part in ("vision", "text"))
    before = Causal.from_backbones(*demo).state_dict()
    model = Causal.from_pretrained(folder)
    assert not model.config.delta
    for name, value in model.state_dict().items():
        moved = not torch.equal(value.float(), before[name].float())
        assert moved == ("vision_tower" not in name), name
