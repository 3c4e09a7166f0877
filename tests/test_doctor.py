"""clip-phi doctor: a sound installation passes, and each known trap is named with its way out."""

import json
import os
import platform
import shutil
from collections import namedtuple

import pytest
import torch
from accelerate.commands.config import config_args
from huggingface_hub import constants

from clip_phi.cli import main
from clip_phi.tools import doctor
from clip_phi.tools.doctor import Check

NAMES = {
    *("python", "torch", "transformers", "accelerate", "pillow", "8-bit optimizer", "OpenMP threads"),
    *("memory", "folder", "Hub cache", "Hub", "Hub token", "accelerate yaml"),
    "training step",
}


def by_name(checks):
    return {check.name: check for check in checks}


def test_a_sound_installation_has_no_problem_and_no_secret_is_printed(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert main(["doctor", "--json"]) == 0
    output = capsys.readouterr()
    assert "hf_secret" not in output.out + output.err
    result = json.loads(output.out)
    assert set(result) == {"environment", "checks", "problems"} and result["problems"] == 0
    assert result["environment"]["packages"]["torch"] == torch.__version__
    checks = by_name(Check(**check) for check in result["checks"])
    assert set(checks) >= NAMES and len(checks) == len(result["checks"])
    assert {check.status for check in checks.values()} <= {"ok", "note"}
    assert all(bool(check.remedy) == (check.status == "note") for check in checks.values())
    assert checks["Hub token"] == Check("ok", "Hub token", "found")
    assert checks["training step"].found.startswith("on cpu in float32: loss ")


def test_a_problem_is_one_line_and_status_1(monkeypatch, capsys):
    def broken(*arguments):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr("clip_phi.training.optim.make_optimizer", broken)
    assert main(["doctor"]) == 1
    *lines, summary = capsys.readouterr().out.splitlines()
    assert f"ok       torch            {torch.__version__}" in lines
    assert lines[-1] == (
        "problem  training step    RuntimeError: no kernel image is available -> "
        "fix the problems above first; --debug shows the traceback"
    )
    notes = sum(line.startswith("note ") for line in lines)
    assert summary == f"{len(lines)} checks: 1 problems, {notes or 'no'} notes"
    with pytest.raises(RuntimeError, match="no kernel image"):
        main(["doctor", "--debug"])


@pytest.mark.parametrize("part", ["lm_head", "vision_tower"])
def test_a_step_that_moves_frozen_weights_or_not_the_projector_is_a_problem(part, monkeypatch):
    def trains_something_else(model, arguments, device):
        parameters = [parameter for name, parameter in model.named_parameters() if part in name]
        for parameter in parameters:
            parameter.requires_grad_(True)
            parameter.grad = torch.ones_like(parameter)
        return torch.optim.SGD(parameters, lr=1.0)

    monkeypatch.setattr("clip_phi.training.optim.make_optimizer", trains_something_else)
    [check] = doctor.check_training_step()
    assert check.status == "problem" and "frozen weights changed, or trained ones did not" in check.found
    assert part in check.found and check.remedy == "install the versions of constraints.txt"


def test_a_missing_torch_is_reported_and_does_not_end_the_examination(monkeypatch, capsys):
    def no_torch():
        raise ImportError("No module named 'torch'")

    monkeypatch.setattr(doctor, "describe_environment", no_torch)
    monkeypatch.setattr(doctor, "CHECKS", (doctor.check_python, doctor.check_training_step, doctor.check_memory))
    monkeypatch.setattr(doctor, "_device_and_dtype", no_torch)
    assert main(["doctor", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["environment"] == {"error": "ImportError: No module named 'torch'"} and result["problems"] == 1
    names = [check["name"] for check in result["checks"]]
    assert names[:3] == ["python", "training step", "memory"]


def test_an_untested_python_is_a_problem(monkeypatch):
    for version, status in (((3, 10), "problem"), ((3, 11), "ok"), ((3, 13), "ok"), ((3, 14), "problem")):
        monkeypatch.setattr(platform, "python_version_tuple", lambda version=version: (*map(str, version), "0"))
        assert [check.status for check in doctor.check_python()] == [status], version


def test_packages_are_held_to_what_is_declared(monkeypatch):
    declared = ["torch>=99", "transformers<6,>=5.18", "nosuch>=1", 'absent>=2; extra == "fast"']
    declared += ['pytest>=99; extra == "track"', 'ruff>=99; extra == "dev"', 'oldpython>=1; python_version < "3"']
    monkeypatch.setattr(doctor, "requires", lambda name: {"clip-phi": declared}[name])
    checks = by_name(doctor.check_packages())
    assert set(checks) == {"torch", "transformers", "nosuch", "absent", "pytest"}
    assert checks["torch"] == Check(
        "problem", "torch", f"{torch.__version__}, but >=99 is needed", 'pip install "torch>=99"'
    )
    assert checks["nosuch"] == Check("problem", "nosuch", "not installed, but >=1 is needed", 'pip install "nosuch>=1"')
    assert checks["transformers"].status == "ok"
    assert (checks["absent"].status, checks["absent"].remedy) == ("note", "pip install 'clip-phi[fast]'")
    assert (checks["pytest"].status, checks["pytest"].remedy) == ("problem", 'pip install "pytest>=99"')


def test_a_torchvision_of_another_torch_is_a_problem(tmp_path, monkeypatch):
    (tmp_path / "torchvision").mkdir()
    code = "raise RuntimeError('operator torchvision::nms does not exist')"
    (tmp_path / "torchvision/__init__.py").write_text(code)
    (tmp_path / "torchvision-0.23.0.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.23.0\nRequires-Dist: numpy\nRequires-Dist: "
    (tmp_path / "torchvision-0.23.0.dist-info/METADATA").write_text(f"{metadata}torch==2.8.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    check = by_name(doctor.check_torch_companions())["torchvision"]
    assert check.status == "problem" and check.remedy.startswith("pip uninstall torchvision")
    assert check.found == (
        f"0.23.0 is built for torch==2.8.0, and torch {torch.__version__} is installed: "
        "RuntimeError: operator torchvision::nms does not exist"
    )


@pytest.mark.parametrize(
    ("hidden", "cuda", "status", "remedy"),
    [
        (None, None, "problem", "install a CUDA build"),
        (None, "12.8", "problem", "update the NVIDIA driver"),
        ("", None, "note", "unset CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_gpu_that_torch_does_not_see_is_told_with_its_cause(hidden, cuda, status, remedy, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(shutil, "which", {"nvidia-smi": "/usr/bin/nvidia-smi"}.get)
    if hidden is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    [check] = doctor.check_device()
    assert (check.status, check.name) == (status, "device") and check.remedy.startswith(remedy)


@pytest.mark.parametrize(("capability", "status"), [((7, 5), "note"), ((8, 0), "ok")])
def test_an_old_gpu_is_told_to_train_in_fp16(capability, status, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (15 * 10**9, 16 * 10**9))
    [check] = doctor.check_device()
    assert (check.status, check.name) == (status, "cuda:0")
    assert check.found.startswith("Tesla T4, 15.0 of 16.0 GB free")
    assert check.remedy == ("accelerate launch --mixed_precision fp16" if status == "note" else "")
    dtype = torch.float16 if status == "note" else torch.bfloat16
    assert doctor._device_and_dtype() == (torch.device("cuda"), dtype)


def test_bitsandbytes_without_a_library_for_cuda_is_a_problem(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    [check] = doctor.check_bitsandbytes()
    assert (check.status, check.found) == ("problem", "bitsandbytes has no library for CUDA 12.8")


def test_spinning_threads_are_a_note(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert [check.status for check in doctor.check_threads()] == ["ok"]
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert [check.remedy for check in doctor.check_threads()] == ["export OMP_NUM_THREADS=1"]


def test_little_memory_and_little_shared_memory_are_notes(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(doctor, "MEMORY_LIMITS", (str(limit),))
    monkeypatch.setattr(doctor, "SHARED_MEMORY", tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(64 * 2**20, 0, 64 * 2**20))
    limit.write_text("4000000000\n")
    memory, shared = doctor.check_memory()
    assert (memory.status, memory.found) == ("note", "4.0 GB: not enough to load phi-2")
    assert (shared.status, shared.remedy) == ("note", "docker run --shm-size=8g, or --dataloader_num_workers 0")
    limit.write_text("max\n")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2 * 10**9, 0, 10**9))
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10**7}.get)
    assert [check.status for check in doctor.check_memory()] == ["ok", "ok"]


def test_a_cache_that_cannot_be_written_is_a_problem_and_a_full_disk_a_note(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file/hub"))
    check = by_name(doctor.check_disk())["Hub cache"]
    assert (check.status, check.remedy) == ("problem", "make it writable, or set HF_HOME")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    usage = namedtuple("usage", "total used free")
    for free, statuses in ((11, ["ok", "ok"]), (9, ["ok", "note"]), (0.5, ["note", "note"])):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(0, 0, free * 10**9))
        assert [check.status for check in doctor.check_disk()] == statuses
    assert not (tmp_path / "hub").exists()


def test_offline_and_no_token_are_notes(monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert [check.status for check in doctor.check_hub()] == ["note", "note"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert [check.status for check in doctor.check_hub()] == ["ok", "note"]


@pytest.mark.parametrize(
    ("yaml", "status"),
    [
        ("distributed_type: DEEPSPEED", "note"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_sharding_strategy: FULL_SHARD}", "note"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 2}", "ok"),
        ("distributed_type: 'NO'", "ok"),
    ],
)
def test_a_default_of_accelerate_that_cannot_train_is_a_note(yaml, status, tmp_path, monkeypatch):
    path = tmp_path / "default_config.yaml"
    path.write_text(yaml)
    monkeypatch.setattr(config_args, "default_config_file", str(path))
    assert [check.status for check in doctor.check_accelerate()] == [status]
