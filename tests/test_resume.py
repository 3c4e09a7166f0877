"""Going on: what may differ, what may not, and how a run is stopped. The kills are in benchmarks/kill_and_resume.py."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import ROOT, metrics, run, stage1

from clip_phi.data.synthetic import write_dataset
from clip_phi.training.checkpoint import random_state, restore_random_state

SHORT = ("--num_train_epochs", 2, "--gradient_accumulation_steps", 1, "--save_steps", 2, "--save_total_limit", 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, num_train=12, num_val=4)
    return folder


@pytest.fixture(scope="module")
def backbones(vision_backbone, text_backbone):
    return vision_backbone, text_backbone


@pytest.fixture(scope="module")
def whole(data, backbones, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "whole"
    run(*stage1(data, backbones, output, *SHORT))
    return output


def test_checkpoints_are_small_the_newest_are_kept_and_a_finished_run_stays_finished(whole, data, backbones):
    places = sorted((whole / "checkpoints").iterdir())
    assert [place.name for place in places] == ["step-00000004", "step-00000006"]
    assert sum(file.stat().st_size for file in places[-1].iterdir()) < 100_000
    before = metrics(whole, "loss")
    done = run(*stage1(data, backbones, whole, *SHORT, "--resume_from_checkpoint"))
    assert "after step 6 of 6" in done.stdout and metrics(whole, "loss") == before


def resume_from(whole, tmp_path, step):
    """A copy of the run as it was after this step."""
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", str(whole), str(copy)], check=True)
    for place in (copy / "checkpoints").iterdir():
        if int(place.name.removeprefix("step-")) > step:
            subprocess.run(["rm", "-r", str(place)], check=True)
    return copy


def test_more_processes_with_the_same_accumulation_are_another_run(whole, data, backbones, tmp_path):
    copy = resume_from(whole, tmp_path, 4)
    options = stage1(data, backbones, copy, *SHORT, "--resume_from_checkpoint")
    options[options.index("--per_device_train_batch_size") + 1] = 4
    done = run(*options, processes=2, expect=1)
    assert "batches_per_step: 1 then, 2 now" in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--seed", 1), "seed: 0 then, 1 now"),
        (("--per_device_train_batch_size", 2), "per_device_train_batch_size: 4 then, 2 now"),
        (("--captions_per_image", 2), "captions_per_image: 5 then, 2 now"),
        (("--gradient_accumulation_steps", 3), "batches_per_step: 1 then, 3 now"),
        (("--holdout_images", 3, "--eval_data"), "data: "),
    ],
)
def test_another_run_is_not_gone_on_with_and_the_difference_is_named(change, message, whole, data, backbones, tmp_path):
    copy = resume_from(whole, tmp_path, 4)
    done = run(
        *stage1(data, backbones, copy, *SHORT, "--resume_from_checkpoint", "--debug", False, *change),
        expect=2,
    )
    assert message in done.stderr and "--resume_from_checkpoint would continue another run" in done.stderr
    assert metrics(copy, "loss") == metrics(whole, "loss"), "the log of the other run is still there"


def test_what_may_differ_is_said(whole, data, backbones, tmp_path):
    copy = resume_from(whole, tmp_path, 4)
    options = ("--resume_from_checkpoint", "--learning_rate", 0.5, "--weight_decay", 0.25, "--logging_steps", 1)
    done = run(*stage1(data, backbones, copy, *SHORT, *options))
    before, now = (metrics(folder, "learning_rate/projector") for folder in (whole, copy))
    assert {step: now[step] for step in (5, 6)} == pytest.approx({step: 500 * before[step] for step in (5, 6)})
    groups = torch.load(copy / "checkpoints/step-00000006/state.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.25, 0]  # biases have none
    assert "another learning_rate: 0.001 then, 0.5 now. It is allowed; the result will be different" in done.stdout
    assert "another weight_decay: 0.0 then, 0.25 now" in done.stdout and "logging_steps" not in done.stdout
    assert {step: metrics(copy, "loss")[step] for step in (1, 2, 3, 4)} == {
        step: metrics(whole, "loss")[step] for step in (1, 2, 3, 4)
    }


def test_resume_without_a_checkpoint_begins_at_the_beginning(whole, data, backbones, tmp_path):
    run(*stage1(data, backbones, tmp_path / "new", *SHORT, "--resume_from_checkpoint"))
    assert metrics(tmp_path / "new", "loss") == metrics(whole, "loss")


def test_lines_of_a_resumed_run_are_those_of_one_that_never_stopped(data, backbones, tmp_path):
    """Saved between two lines of the log: the loss of the next one is the mean over the steps of both parts."""
    options = (*SHORT, "--logging_steps", 3, "--save_steps", 4, "--num_train_epochs", 3)
    done = run(*stage1(data, backbones, tmp_path / "whole", *options))
    lines = [line for line in done.stdout.splitlines() if re.match(r"step \d/9: loss \d", line)]
    assert [line.split(":")[0] for line in lines] == ["step 3/9", "step 6/9", "step 9/9"] and "ETA 0:00:00" in lines[2]
    assert "it/s" not in done.stderr and "step/s" not in done.stderr, "no progress bar without a terminal"
    copy = resume_from(tmp_path / "whole", tmp_path, 4)
    run(*stage1(data, backbones, copy, *options, "--resume_from_checkpoint"))
    for key in ("loss", "grad_norm", "samples_seen", "tokens_seen"):
        assert metrics(copy, key) == metrics(tmp_path / "whole", key) and len(metrics(copy, key)) == 3, key


def test_a_training_checkpoint_is_resumed_by_its_name_and_later_ones_are_moved_aside(whole, data, backbones, tmp_path):
    copy = resume_from(whole, tmp_path, 6)
    place = copy / "checkpoints/step-00000004"
    done = run(*stage1(data, backbones, copy, *SHORT, "--resume_from_checkpoint", place))
    assert f"resuming from {place}, after step 4 of 6" in done.stdout
    assert [path.name for path in (copy / "checkpoints.before").iterdir()] == ["step-00000006"]
    assert metrics(copy, "loss") == metrics(whole, "loss")
    (place / "state.pt").write_bytes(b"torn")
    options = stage1(data, backbones, copy, *SHORT, "--debug", False, "--resume_from_checkpoint", place)
    done = run(*options, expect=2)
    assert f"--resume_from_checkpoint {place} is not a whole training checkpoint: state.pt" in done.stderr


def test_a_run_begun_anew_in_the_same_folder_neither_uses_nor_deletes_the_checkpoints_of_the_other(
    whole, data, backbones, tmp_path
):
    copy = resume_from(whole, tmp_path, 6)
    done = run(*stage1(data, backbones, copy, *SHORT, "--max_steps", 2))
    assert f"the training checkpoints of an earlier run are moved to {copy}/checkpoints.before" in done.stdout
    assert [place.name for place in (copy / "checkpoints").iterdir()] == ["step-00000002"]
    assert len(list((copy / "checkpoints.before").iterdir())) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_finishes_the_step_and_exits_with_75(number, data, backbones, tmp_path):
    options = stage1(
        data,
        backbones,
        tmp_path / "run",
        "--num_train_epochs",
        2000,
        "--dataloader_num_workers",
        2,
        "--save_steps",
        10**6,
    )
    command = [sys.executable, str(ROOT / "train_accelerate.py"), *map(str, options)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment, cwd=ROOT)
    path = tmp_path / "run/metrics.jsonl"
    while process.poll() is None and not (path.exists() and path.read_text().count("\n") > 3):
        time.sleep(0.1)
    os.killpg(process.pid, number)
    assert process.wait(60) == 75, (tmp_path / "log").read_text()[-2000:]
    (place,) = (tmp_path / "run/checkpoints").iterdir()
    last = max(metrics(tmp_path / "run", "loss"))
    assert json.loads((place / "about.json").read_text())["step"] == last
    assert (
        f"stopped after step {last:,} by a signal; --resume_from_checkpoint continues from there"
        in (tmp_path / "log").read_text()
    )


def test_a_folder_that_cannot_be_written_is_one_line(data, backbones, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").write_text("a file")
    done = run(*stage1(data, backbones, tmp_path / "run", *SHORT, "--debug", False), expect=2)
    assert f"cannot write a training checkpoint in {tmp_path}/run/checkpoints" in done.stderr
    assert "Traceback" not in done.stderr


def test_random_numbers_of_more_gpus_than_there_are_now_are_restored(monkeypatch):
    """Earlier versions saved those of all devices; today each process saves its own."""
    restored = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: restored.append(state.tolist()))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.tensor([7]))
    state = random_state()
    restore_random_state(state)
    restore_random_state(state | {"cuda": [torch.tensor([1]), torch.tensor([2]), torch.tensor([3])]})
    restore_random_state(state | {"cuda": [torch.tensor([4])]})
    restore_random_state(state | {"cuda": []})
    assert restored == [[7], [2], [4]]
