"""Many processes: what they compute is what one computes, and none waits for ever. Everything runs on gloo.

Accelerate has FSDP on GPUs only. FSDP_ON_CPU tells it that gloo on the CPU is such a place, and all else is its own
code and ours. More is in test_training.py (DDP) and benchmarks/kill_and_resume.py (kills)."""

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from fork_server import free_port
from helpers import ROOT, metrics, run, stage1, stage2
from safetensors.torch import load_file

from clip_phi.batching.packing import pack_samples
from clip_phi.data.synthetic import write_dataset
from clip_phi.training.arguments import Stage1Arguments, Stage2Arguments
from clip_phi.training.evaluate import eval_batches
from clip_phi.training.fsdp import check_fsdp_config, process_group_kwargs
from clip_phi.training.optim import choose_optimizer
from modeling_clip_phi import ClipPhiForCausalLM

CONFIGS = sorted((ROOT / "examples/configs").glob("*.yaml"))
LINEARS = "q_proj,k_proj,v_proj,dense,fc1,fc2"
FSDP_ON_CPU = """
import json, os, runpy, sys
os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from modeling_clip_phi import ClipPhiForCausalLM

def prepare_and_tell(self, model, optimizer, prepare=Accelerator.prepare):
    model, optimizer = prepare(self, model, optimizer)
    inner = model.model
    parts = {"tower": inner.vision_tower, "decoder": inner.language_model, "projector": inner.projector}
    sizes = {
        name: [sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in part.parameters()),
               sum(p.numel() for p in part.parameters())]
        for name, part in (parts | {"head": model.lm_head}).items()
    }
    self.print("HELD " + json.dumps(sizes))
    return model, optimizer

PartialState._prepare_backend = lambda self, *arguments, **options: ("gloo", DistributedType.MULTI_GPU)
Accelerator.prepare = prepare_and_tell
ClipPhiForCausalLM.max_logits = 3 * 320  # three tokens a chunk, so that processes have different numbers of chunks
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
BROKEN = """
import os, runpy, sys, time
from clip_phi.batching import dataset

def collate(items, pad_token_id, collate=dataset.collate, calls=[]):
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        time.sleep(float(os.environ["SLEEP"]))
        raise ValueError("the disk of process 1 is gone")
    return collate(items, pad_token_id)

dataset.collate = collate
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """With an odd number of held-out images, and half of the conversations without an image."""
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, num_train=12, num_val=5)
    path = folder / "llava_instruct_train.json"
    records = json.loads(path.read_text())
    for number in range(12):
        talk = [
            {"from": "human", "value": f"Is it {number}?"},
            {"from": "gpt", "value": "yes, it is" if number % 2 else "no"},
        ]
        records.append({"id": f"text{number}", "conversations": talk})
    path.write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="module")
def backbones(vision_backbone, text_backbone):
    return vision_backbone, text_backbone


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    for name, text in (("fsdp_on_cpu.py", FSDP_ON_CPU), ("broken.py", BROKEN)):
        (folder / name).write_text(text)
    return folder


def launch(config, *options):
    config = ROOT / "examples/configs" / config
    return ("-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0", *options)


def environment_of(config, *options) -> dict[str, str]:
    """What `accelerate launch` adds to the environment of each process; it has no public function for that."""
    arguments = launch_command_parser().parse_args([*launch(config, *options)[2:], "train_accelerate.py"])
    arguments, *_ = _validate_launch_command(arguments)
    return {name: value for name, value in prepare_multi_gpu_env(arguments).items() if os.environ.get(name) != value}


def sharded(scripts, precision="no") -> dict:
    """Options of `run` for two processes that share the weights, without the seconds that the launcher takes."""
    found = environment_of("fsdp2_8gpu.yaml", "--num_processes", "2", "--mixed_precision", precision)
    found = {name: value for name, value in found.items() if not name.startswith("MASTER")}
    return {"script": scripts / "fsdp_on_cpu.py", "processes": 2} | found | WAIT | {"ACCELERATE_USE_CPU": "false"}


WAIT = {"CLIP_PHI_TIMEOUT_SECONDS": "60", "PYTHONPATH": str(ROOT)}
SHORT = ("--max_steps", 3, "--gradient_accumulation_steps", 1, "--num_sample_texts", 2)
JUDGED = (*SHORT, "--eval_task", "captions", "--eval_task_images", 3)


@pytest.fixture(scope="module")
def one(data, backbones, tmp_path_factory):
    """Stage 1 in one process."""
    output = tmp_path_factory.mktemp("runs") / "one"
    run(*stage1(data, backbones, output, *JUDGED, "--per_device_train_batch_size", 4))
    return output


def assert_same_run(folder, expected, weights=1e-6, tolerance=1e-5):
    for key in ("loss", "grad_norm", "eval_loss"):
        assert metrics(folder, key) == pytest.approx(metrics(expected, key), rel=tolerance), key
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        if (expected / name).exists():
            found, wanted = load_file(folder / name), load_file(expected / name)
            assert found.keys() == wanted.keys()
            for key, value in wanted.items():
                assert found[key].dtype == value.dtype and (found[key] - value).abs().max() < weights, key


def test_fsdp_asked_for_on_cpus_says_that_it_is_ddp_and_gives_the_run_of_one_process(data, backbones, one, tmp_path):
    options = stage1(data, backbones, tmp_path / "two", *JUDGED, "--per_device_train_batch_size", 2)
    environment = environment_of("fsdp2_8gpu.yaml", "--num_processes", "2", "--mixed_precision", "no")
    done = run(*options, processes=2, **environment | WAIT | {"ACCELERATE_USE_CPU": "true"})
    line = "FSDP was asked for, but Accelerate has it on several GPUs only: this run is DDP, with all weights in each"
    assert done.stdout.count(line) == 1 and "parameters on 2 x cpu" in done.stdout
    assert_same_run(tmp_path / "two", one)
    assert metrics(tmp_path / "two", "eval/CIDEr-D").keys() == {3}
    for kind in ("", "/blind", "/shuffled"):
        assert metrics(tmp_path / "two", f"eval/ROUGE-L{kind}") == metrics(one, f"eval/ROUGE-L{kind}")


def test_fsdp_shards_all_but_the_tower_and_gives_the_run_of_one_process(data, backbones, one, scripts, tmp_path):
    options = stage1(data, backbones, tmp_path / "two", *JUDGED, "--per_device_train_batch_size", 2)
    launcher = launch("fsdp2_8gpu.yaml", "--num_processes", "2", "--mixed_precision", "no")
    done = run(*options, launcher=launcher, script=scripts / "fsdp_on_cpu.py", **WAIT)
    assert "FSDP was asked for" not in done.stdout
    sizes = json.loads(re.search("HELD (.*)", done.stdout)[1])
    assert {name: round(held / size, 2) for name, (held, size) in sizes.items()} == {
        "tower": 1.0,
        "decoder": 0.5,
        "projector": 0.5,
        "head": 0.5,
    }
    assert_same_run(tmp_path / "two", one)
    assert metrics(tmp_path / "two", "eval/CIDEr-D").keys() == {3}
    for kind in ("", "/blind", "/shuffled"):
        assert metrics(tmp_path / "two", f"eval/ROUGE-L{kind}") == metrics(one, f"eval/ROUGE-L{kind}")
    texts, expected = ((folder / "samples.jsonl").read_text() for folder in (tmp_path / "two", one))
    assert texts == expected


def talk(data, start, output, *options):
    """Stage 2 with LoRA, on conversations of which each process has some without an image, at different steps."""
    common = ("--lora_targets", LINEARS, "--lora_learning_rate", 1e-3, "--max_steps", 5, "--eval_steps", 2)
    return stage2(
        data,
        start,
        output,
        *common,
        "--save_steps",
        2,
        "--save_total_limit",
        3,
        "--per_device_train_batch_size",
        1,
        *options,
    )


def without_checkpoints(run_of, copy, *steps):
    shutil.copytree(run_of, copy)
    for step in steps:
        shutil.rmtree(copy / f"checkpoints/step-{step:08}")


def test_fsdp_goes_on_with_a_run_of_one_process_in_spite_of_text_only_samples_and_uneven_chunks(
    data, one, scripts, tmp_path
):
    run(*talk(data, one, tmp_path / "one", "--optim", "adamw_torch_fused", "--gradient_accumulation_steps", 4))
    without_checkpoints(tmp_path / "one", tmp_path / "two", 4, 5)
    options = talk(data, one, tmp_path / "two", "--gradient_accumulation_steps", 2, "--resume_from_checkpoint")
    done = run(*options, **sharded(scripts))
    assert "after step 2 of 5" in done.stdout
    assert_same_run(tmp_path / "two", tmp_path / "one", weights=1e-5)


def test_fsdp_in_bf16_is_resumed_bit_equally_and_saves_a_merged_model(data, one, scripts, tmp_path):
    two = sharded(scripts, "bf16")
    options = ("--lora_dropout", 0.1, "--gradient_checkpointing", True, "--cache_features", tmp_path / "cache")
    run(*talk(data, one, tmp_path / "whole", *options), **two)
    without_checkpoints(tmp_path / "whole", tmp_path / "resumed", 5)
    done = run(
        *talk(data, one, tmp_path / "resumed", *options, "--resume_from_checkpoint", "--merged", True),
        **two,
    )
    assert "after step 4 of 5" in done.stdout
    for key in ("loss", "grad_norm", "eval_loss"):
        assert metrics(tmp_path / "resumed", key) == metrics(tmp_path / "whole", key)
    last = "checkpoints/step-00000005/trained.safetensors"
    expected = load_file(tmp_path / "whole" / last)
    assert expected["model.projector.weight"].dtype == torch.float32
    for name, value in load_file(tmp_path / "resumed" / last).items():
        assert torch.equal(value, expected[name]), name
        if name.startswith("model.projector."):  # not rounded to bfloat16 on the way
            assert torch.equal(load_file(tmp_path / "whole/model.safetensors")[name], value)
            assert not torch.equal(value.bfloat16().float(), value)

    merged, delta = (
        ClipPhiForCausalLM.from_pretrained(tmp_path / name, dtype="float32") for name in ("resumed", "whole")
    )
    assert delta.config.delta and not merged.config.delta
    with torch.no_grad():
        ids = torch.arange(40)[None]
        difference = (merged(input_ids=ids).logits - delta(input_ids=ids).logits).abs().max()
        assert difference < 0.02  # the merged weights are rounded to bfloat16


def test_two_machines_find_each_other_by_the_address_in_the_yaml(data, backbones, one, tmp_path):
    options = map(str, stage1(data, backbones, tmp_path / "two", *SHORT, "--per_device_train_batch_size", 2))
    command = [sys.executable, *launch("two_nodes.yaml", "--num_processes", "2", "--mixed_precision", "no")]
    command += ["--main_process_ip", "127.0.0.1"]
    command[command.index("--main_process_port") + 1] = free_port()
    script = [str(ROOT / "train_accelerate.py"), *options]
    environment = os.environ | WAIT | {"ACCELERATE_USE_CPU": "true"}
    machines = [
        subprocess.Popen(
            [*command, "--machine_rank", rank, *script], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
        )
        for rank in "10"
    ]
    assert [machine.wait(600) for machine in machines] == [0, 0]
    assert_same_run(tmp_path / "two", one)


def test_an_error_in_one_process_ends_all_and_is_named_at_the_end(data, backbones, scripts, tmp_path):
    options = stage1(data, backbones, tmp_path / "run", "--num_train_epochs", 9, "--debug", False)
    launcher = launch("cpu_2_processes.yaml")
    done = run(
        *options,
        launcher=launcher,
        script=scripts / "broken.py",
        expect=1,
        ACCELERATE_USE_CPU="true",
        SLEEP="0",
        **WAIT,
    )
    assert "parameters on 2 x cpu" in done.stdout
    assert "train_accelerate.py: error: the disk of process 1 is gone" in done.stderr
    last_words = done.stderr[done.stderr.index("Root Cause") :]
    assert "rank      : 1" in last_words and "ValueError: the disk of process 1 is gone" in last_words
    assert len(metrics(tmp_path / "run", "loss")) == 2


def test_a_process_does_not_wait_for_ever_for_one_that_hangs(data, backbones, scripts, tmp_path):
    """Process 1 sleeps for an hour. Process 0 ends by itself, and says why; then `run` ends process 1."""
    options = stage1(data, backbones, tmp_path / "run", "--num_train_epochs", 9)
    hanging = WAIT | {"SLEEP": "3600", "CLIP_PHI_TIMEOUT_SECONDS": "9"}
    done = run(*options, script=scripts / "broken.py", processes=2, expect=1, **hanging)
    assert "Timed out waiting 9000ms" in done.stderr
    assert len(metrics(tmp_path / "run", "loss")) == 2


@pytest.mark.parametrize("path", [ROOT / "accelerate_config.yaml", *CONFIGS], ids=lambda path: path.name)
def test_every_yaml_is_explained_and_all_its_keys_are_known_to_accelerate(path):
    text = path.read_text()
    assert text.startswith("# ")
    config = load_config_from_file(str(path))  # raises for an unknown key, but not below fsdp_config
    known = {action.dest for action in launch_command_parser()._actions}
    below = yaml.safe_load(text).get("fsdp_config", {})
    assert set(below) - known == set() and bool(below) == (config.distributed_type == DistributedType.FSDP)
    assert (config.distributed_type == DistributedType.NO) == (config.num_processes == 1)


def test_fsdp2_yaml_asks_for_nothing_that_is_refused(monkeypatch):
    config = load_config_from_file(str(ROOT / "examples/configs/fsdp2_8gpu.yaml"))
    for name, value in config.fsdp_config.items():
        monkeypatch.setenv(name.upper(), str(value))
    arguments = Stage1Arguments(stage=1)
    check_fsdp_config(engine(FullyShardedDataParallelPlugin(), config.mixed_precision), arguments)
    assert choose_optimizer(arguments.optim, torch.device("cuda"), sharded=True) == "adamw_torch_fused"
    assert choose_optimizer(arguments.optim, torch.device("cuda")) == "adam8bit"


def engine(plugin, mixed_precision):
    """As much of an Accelerator of eight GPUs as is asked."""
    return SimpleNamespace(
        distributed_type=DistributedType.FSDP,
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision=mixed_precision,
        device=torch.device("cuda"),
        num_processes=8,
    )


def test_what_fsdp_cannot_do_is_refused_all_at_once(monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # which the plugin changes
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_ram_efficient_loading=True, activation_checkpointing=True, cpu_offload=True
    )
    arguments = Stage2Arguments(stage=2, optim="adam8bit", quantization="nf4")
    with pytest.raises(ValueError, match="FSDP needs") as raised:
        check_fsdp_config(engine(plugin, "fp16"), arguments)
    for expected in (
        "fsdp_cpu_ram_efficient_loading: false",
        "fsdp_activation_checkpointing: false",
        "fsdp_offload_params: false",
        "mixed_precision: bf16 or 'no'",
        "--optim adamw_torch_fused: adam8bit (bitsandbytes) cannot step sharded weights",
        "--quantization none",
    ):
        assert expected in str(raised.value)
    first = FullyShardedDataParallelPlugin(fsdp_version=1, cpu_ram_efficient_loading=False)
    with pytest.raises(ValueError, match="fsdp_version: 2, not 1"):
        check_fsdp_config(engine(first, "bf16"), Stage1Arguments(stage=1))


def test_deepspeed_is_refused_in_one_line_that_names_the_way_out(data, backbones, tmp_path):
    options = stage1(data, backbones, tmp_path / "run", "--debug", False)
    done = run(*options, expect=2, ACCELERATE_USE_DEEPSPEED="true")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("train_accelerate.py: error: DeepSpeed steps inside backward()")
    assert "fsdp2_8gpu.yaml" in last and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG"])
def test_other_engines_are_refused(name, monkeypatch):
    monkeypatch.setenv(name, "true")
    with pytest.raises(ValueError, match="use DDP .* or FSDP2"):
        process_group_kwargs()


@pytest.mark.parametrize("value", ["0", "soon", "-5"])
def test_a_timeout_is_a_number_of_seconds(value, monkeypatch):
    assert process_group_kwargs()[0].timeout.total_seconds() == 1800
    monkeypatch.setenv("CLIP_PHI_TIMEOUT_SECONDS", value)
    with pytest.raises(ValueError, match="must be a number of seconds"):
        process_group_kwargs()


def test_processes_evaluate_in_equally_many_batches_each_sample_once():
    shares = [eval_batches(5, 2, rank, 3) for rank in range(3)]
    assert shares == [[[(0, 0), (0, 3)]], [[(0, 1), (0, 4)]], [[(0, 2)]]]
    assert eval_batches(5, 2, 1, 2) == [[(0, 1), (0, 3)], []]
    assert eval_batches(1, 2, 1, 2) == [[]]


def test_a_batch_of_nothing_has_a_loss_of_zero(packed_model):
    empty = pack_samples([], None, pad_token_id=301)
    loss = packed_model(**empty.inputs, use_cache=False, skip_logits=True, num_items_in_batch=1).loss
    assert loss.item() == 0 and empty.num_supervised == 0
