"""Where a run trains: precision, what is refused before a weight is loaded, packs that fit, and fake CUDA tensors."""

import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from helpers import ACCELERATE, ROOT, metrics, stage1
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from clip_phi import environment
from clip_phi.batching import attention
from clip_phi.batching.encode import Encoded
from clip_phi.batching.packing import build_shared_prefix, pack_samples
from clip_phi.data.synthetic import write_dataset
from clip_phi.serving.engine import Engine
from clip_phi.serving.kv_cache import BatchCache, cache_shapes
from clip_phi.training import device as devices
from clip_phi.training import memory
from clip_phi.training.arguments import Stage1Arguments, Stage2Arguments
from clip_phi.training.device import asked_precision, check_machine, choose_precision
from clip_phi.training.memory import fit_batches, fit_by_trial, fit_longest, trial_step
from clip_phi.training.model import choose_attention, make_trainable

STAGES = {1: Stage1Arguments, 2: Stage2Arguments}


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of a name and a capability, as far as the decisions before training ask it."""

    def make(name="Tesla T4", capability=(7, 5)):
        monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (15 * 2**30, 16 * 2**30))
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90", "compute_90"])

    return make


def accelerator(device="cuda", processes=1, printed=None):
    return SimpleNamespace(
        device=torch.device(device),
        num_processes=processes,
        distributed_type="NO",
        mixed_precision="bf16",
        print=(printed if printed is not None else []).append,
        autocast=nullcontext,
    )


@pytest.mark.parametrize(
    ("name", "capability", "precision", "reason"),
    [
        ("Tesla T4", (7, 5), "fp16", "Tesla T4 only emulates bf16"),
        ("NVIDIA L4", (8, 9), "bf16", "NVIDIA L4 computes in it"),
    ],
)
def test_without_a_yaml_the_precision_is_the_cards(name, capability, precision, reason, gpu, tmp_path, monkeypatch):
    gpu(name, capability)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert choose_precision(Stage1Arguments(stage=1), tmp_path) == (precision, f"mixed precision {precision}: {reason}")
    # accelerate launch passes "no" on if nobody has asked for a precision
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(devices, "launcher_command", lambda: ["python", "accelerate", "launch", "train_accelerate.py"])
    assert choose_precision(Stage1Arguments(stage=1), tmp_path)[0] == precision
    asked = Stage1Arguments(stage=1, mixed_precision="no")
    assert choose_precision(asked, tmp_path) == ("no", "mixed precision no: by --mixed_precision")


def test_a_yaml_or_an_option_that_was_given_decides_the_precision(tmp_path, monkeypatch):
    launch = ["python", "accelerate", "launch"]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert asked_precision([], tmp_path) == ("no", "ACCELERATE_MIXED_PRECISION")
    assert asked_precision([*launch, "--mixed_precision=no"], tmp_path) == ("no", "accelerate launch")
    own = tmp_path / "own.yaml"
    own.write_text("mixed_precision: 'no'\n")
    assert asked_precision([*launch, "--config_file", str(own)], tmp_path) == ("no", "own.yaml")
    own.write_text("num_processes: 1\n")
    assert asked_precision([*launch, f"--config_file={own}"], tmp_path)[0] is None
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert asked_precision(launch, tmp_path) == ("bf16", "accelerate launch")


def test_the_yaml_beside_the_script_is_used_if_no_other_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    (tmp_path / "accelerate_config.yaml").write_text("mixed_precision: bf16\n")
    assert asked_precision([], tmp_path) == ("bf16", "accelerate_config.yaml")
    (tmp_path / "accelerate_config.yaml").write_text("num_processes: 8\n")
    with pytest.raises(ValueError, match="asks for several processes: accelerate launch --config_file"):
        asked_precision([], tmp_path)
    assert asked_precision([], ROOT)[0] is None  # the project's own leaves it to the card


def test_a_run_without_a_gpu_says_why_in_its_first_lines(monkeypatch):
    printed = []
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    check_machine(Stage1Arguments(stage=1), accelerator("cpu", printed=printed))
    (line,) = printed
    assert line.startswith("no GPU is used: ") and " -> " in line
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    check_machine(Stage1Arguments(stage=1), accelerator("cpu", printed=printed))
    assert printed == [line]


def test_what_cannot_train_is_refused_before_a_weight_is_loaded(gpu, monkeypatch):
    for kind in ("mps", "xpu"):
        with pytest.raises(ValueError, match=f"training on {kind} is not supported: ACCELERATE_USE_CPU=true"):
            check_machine(Stage1Arguments(stage=1), accelerator(kind))
    gpu("Tesla V100-SXM2-16GB", (7, 0))
    with pytest.raises(ValueError, match=r"has no kernels for its capability 7\.0 -> install a torch build"):
        check_machine(Stage1Arguments(stage=1), accelerator())
    gpu()
    monkeypatch.setattr(devices, "installed_version", lambda name: None)
    with pytest.raises(ImportError, match=r"adam8bit needs bitsandbytes: pip install .*--optim adamw_torch_fused$"):
        check_machine(Stage1Arguments(stage=1), accelerator())
    with pytest.raises(ImportError, match="--quantization nf4 needs bitsandbytes"):
        check_machine(Stage2Arguments(stage=2, quantization="nf4"), accelerator())
    check_machine(Stage1Arguments(stage=1, optim="adamw_torch_fused"), accelerator())


@pytest.mark.parametrize(
    ("capability", "runs"), [((7, 0), False), ((7, 5), True), ((8, 9), True), ((10, 0), True), ((6, 1), False)]
)
def test_a_build_runs_on_later_devices_of_a_generation_and_by_ptx_on_all_later_ones(capability, runs):
    assert environment.has_kernels(*capability, ["sm_75", "sm_80", "sm_90", "compute_90"]) is runs


@pytest.mark.parametrize(
    ("stage", "options", "expected"),
    [
        (1, {}, "clip_phi_sdpa_packed"),
        (2, {}, "clip_phi_packed"),
        (2, {"attention": "sdpa"}, "clip_phi_sdpa_packed"),
        (1, {"attention": "varlen"}, "clip_phi_packed"),
    ],
)
def test_each_stage_has_the_attention_that_keeps_less(stage, options, expected, gpu):
    gpu("NVIDIA A100", (8, 0))
    assert choose_attention(STAGES[stage](stage, **options), torch.device("cuda"), torch.bfloat16) == expected


def test_a_kernel_that_is_not_there_is_refused(gpu):
    gpu()
    with pytest.raises(ValueError, match="--attention varlen needs bf16 or fp16 on an NVIDIA GPU of capability 8.0"):
        choose_attention(Stage2Arguments(stage=2, attention="varlen"), torch.device("cuda"), torch.float16)


# Packs that fit


def fitted(monkeypatch, fits, stage=2, processes=1, before=None, device="cuda", **options):
    monkeypatch.setattr(memory, "tokens_that_fit", lambda *arguments: fits)
    arguments = STAGES[stage](stage=stage, given=frozenset(options), **options)
    found, _ = fit_batches(arguments, None, accelerator(device, processes), before)
    return found.max_tokens_per_batch, found.gradient_accumulation_steps


def test_smaller_cards_take_more_passes_of_the_same_step(monkeypatch):
    assert fitted(monkeypatch, 100_000) == (16384, 1)
    assert fitted(monkeypatch, 9000) == (8192, 2)
    assert fitted(monkeypatch, 1516) == (1488, 11)
    assert fitted(monkeypatch, 9000, processes=8) == (2048, 1)
    assert fitted(monkeypatch, 5000, stage=1) == (4096, 2)
    assert fitted(monkeypatch, 9000, gradient_accumulation_steps=3) == (9000, 3)
    assert fitted(monkeypatch, 9000, tokens_per_optimizer_step=4000) == (4000, 1)


def test_without_cuda_or_with_sizes_that_are_given_nothing_is_tried(monkeypatch):
    assert fitted(monkeypatch, None, stage=1, device="cpu") == (0, 1)
    assert fitted(monkeypatch, None, device="cpu") == (4096, 4)
    assert fitted(monkeypatch, None, stage=1, per_device_train_batch_size=4) == (0, 1)
    assert fitted(monkeypatch, None, max_tokens_per_batch=900) == (900, 4)
    assert fitted(monkeypatch, None, max_tokens_per_batch=900, tokens_per_optimizer_step=1800) == (900, 2)


def test_a_resumed_run_keeps_its_packs_on_another_number_of_gpus(monkeypatch):
    before = {"max_tokens_per_batch": 2000, "batches_per_step": 8}
    assert fitted(monkeypatch, None, before=before) == (2000, 8)
    assert fitted(monkeypatch, None, processes=4, before=before) == (2000, 2)
    # What is given is not replaced: check_same_run refuses it.
    assert fitted(monkeypatch, None, before=before, gradient_accumulation_steps=3) == (2000, 3)


def test_tokens_of_a_step_without_packs_are_refused(monkeypatch):
    for options in ({"device": "cpu"}, {"max_tokens_per_batch": 0}, {"per_device_train_batch_size": 4}):
        with pytest.raises(ValueError, match="--tokens_per_optimizer_step has no effect on batches of images"):
            fitted(monkeypatch, None, stage=1, tokens_per_optimizer_step=900, **options)


def test_a_pack_that_does_not_fit_is_made_smaller():
    tried = []

    def fits(number):
        tried.append(number)
        return number <= 50

    assert fit_by_trial(80, fits) == 48 and tried == [80, 68, 57, 48]
    assert fit_by_trial(3, lambda number: False) == 0


@pytest.mark.parametrize("stage", [1, 2])
def test_a_trial_step_leaves_no_gradient_and_the_same_random_numbers(stage, fresh_model, monkeypatch):
    arguments = STAGES[stage](stage=stage, **({"lora_r": 2} if stage == 2 else {}))
    make_trainable(fresh_model, arguments, torch.device("cpu"), torch.float32)
    state = torch.get_rng_state()
    assert trial_step(arguments, fresh_model, accelerator("cpu"), 2, spare=100)
    assert all(parameter.grad is None for parameter in fresh_model.parameters())
    assert torch.equal(torch.get_rng_state(), state)

    def out_of_memory(*arguments, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fresh_model, "forward", out_of_memory)
    assert not trial_step(arguments, fresh_model, accelerator("cpu"), 2, spare=100)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_plan_of_packs_leaves_the_model_as_it_was(stage, fresh_model, gpu, monkeypatch):
    gpu()
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    arguments = STAGES[stage](stage=stage, optim="adam8bit", **({"lora_r": 2} if stage == 2 else {}))
    make_trainable(fresh_model, arguments, torch.device("cpu"), torch.float32)
    attention, tried = fresh_model.config.get_text_config()._attn_implementation, []

    def trial_on_the_cpu(arguments, model, accelerator_on_cuda, number, spare):
        tried.append(trial_step(arguments, model, accelerator("cpu"), min(number, 2), spare=100))
        return tried[-1]

    monkeypatch.setattr(memory, "trial_step", trial_on_the_cpu)
    assert memory.tokens_that_fit(arguments, fresh_model, accelerator()) > 0 and tried == [True]
    assert fresh_model.config.get_text_config()._attn_implementation == attention
    assert fresh_model.model.language_model.config._attn_implementation == attention


def test_where_not_one_sample_fits_the_line_names_what_to_change(fresh_model, gpu, monkeypatch):
    gpu()
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(memory, "trial_step", lambda *arguments: False)
    arguments = Stage2Arguments(stage=2, optim="adam8bit", lora_r=2)
    with pytest.raises(ValueError, match=r"fits on Tesla T4 .* try --quantization nf4, --gradient_checkpointing true"):
        memory.tokens_that_fit(arguments, fresh_model, accelerator())


def test_a_sample_that_does_not_fit_turns_checkpointing_on_or_is_refused(fresh_model):
    printed = []
    fit_longest(fresh_model, Stage2Arguments(stage=2), 100, 200, printed.append)
    assert not printed and not fresh_model.is_gradient_checkpointing
    given = Stage2Arguments(stage=2, given=frozenset({"gradient_checkpointing"}))
    with pytest.raises(ValueError, match="longest sample has 300 tokens, and 200 fit: --gradient_checkpointing true"):
        fit_longest(fresh_model, given, 300, 200, printed.append)
    fit_longest(fresh_model, Stage2Arguments(stage=2), 300, 200, printed.append)
    assert "is turned on" in printed[0] and fresh_model.is_gradient_checkpointing


# CUDA tensors without a GPU: a tensor on the wrong device, or of the wrong dtype, is an error. Forward passes only:
# autograd needs a device. The backward passes run on meta tensors, in test_plan.py.


def fake_pack(model, with_images=True):
    texts = [[Encoded([5, 6, 7], [-100, 6, 7]), Encoded([8, 9], [8, 9])], [Encoded([3, 4], [3, 4])]]
    prefix = [model.config.image_token_id] * 4 if with_images else []
    texts = texts if with_images else [[Encoded([5, 6, 7], [-100, 6, 7])]]
    samples = [build_shared_prefix(each, prefix, "") for each in texts]
    return pack_samples(samples, torch.zeros(2, 3, 32, 32) if with_images else None, 0)


def put_on_fake_cuda(model, mode):
    names = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in names:
        owner, _, own = name.rpartition(".")
        fake = mode.from_tensor(tensor).detach().to("cuda:0")
        fake = torch.nn.Parameter(fake, False) if isinstance(tensor, torch.nn.Parameter) else fake
        setattr(model.get_submodule(owner), own, fake)


def run_on_fake_cuda(model, arguments, dtype, with_images=True):
    """The loss of a pack, with all weights on a fake CUDA device, under CUDA's autocast."""
    pack = fake_pack(model, with_images)
    make_trainable(model.to(dtype), arguments, torch.device("cpu"), dtype)
    model.set_attn_implementation({"vision_config": "eager"})
    place = torch.device("cuda:0")
    with FakeTensorMode() as mode, WithoutGuard(), torch.no_grad():
        put_on_fake_cuda(model, mode)
        inputs = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, pack.inputs)
        inputs = type(pack)(inputs, *list(vars(pack).values())[1:]).to(place).inputs
        half = dtype if dtype != torch.float32 else torch.bfloat16
        with torch.autocast("cuda", half, enabled=dtype != torch.float32):
            loss = model.train()(**inputs, use_cache=False, num_items_in_batch=3).loss
    return loss


@pytest.fixture
def no_checks(monkeypatch, gpu):
    """What the value of a fake tensor decides is left out."""
    gpu("NVIDIA A100", (8, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *arguments: True)
    module = sys.modules["modeling_clip_phi.modeling_clip_phi"]
    monkeypatch.setattr(module, "torch_compilable_check", lambda *arguments: None)
    monkeypatch.setattr(attention, "scaled_dot_product_attention", plain_attention)  # the choice of a kernel needs one


class WithoutGuard(TorchFunctionMode):
    """Some functions ask for the device itself, also of a fake one: the same without them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.contiguous:
            return args[0].clone(memory_format=torch.contiguous_format)
        if func is torch.tensor and "device" in (kwargs or {}):  # an empty one, of a new cache
            return torch.empty(len(args[0]), **kwargs)
        if func is torch.Tensor.__getitem__:
            return self.select(args[0], args[1] if isinstance(args[1], tuple) else (args[1],))
        if func is torch.Tensor.__setitem__:
            return torch.ops.aten.index_put_(*args)
        return func(*args, **(kwargs or {}))

    def select(self, tensor, items):
        if all(isinstance(item, torch.Tensor) for item in items):
            return torch.ops.aten.index.Tensor(tensor, items)
        dim, named = 0, sum(item is not None and item is not Ellipsis for item in items)
        for item in items:
            if item is Ellipsis:
                dim += tensor.dim() - named
            elif item is None:
                tensor, dim = tensor.unsqueeze(dim), dim + 1
            elif isinstance(item, int):
                tensor, named = tensor.select(dim, item), named - 1
            elif isinstance(item, slice):
                tensor = torch.ops.aten.slice.Tensor(tensor, dim, item.start, item.stop, item.step or 1)
                dim += 1
            else:
                tensor, dim = tensor.index_select(dim, item), dim + 1
        return tensor


def plain_attention(query, key, value, attn_mask=None, is_causal=False, scale=None, dropout_p=0.0):
    assert query.dtype == key.dtype == value.dtype and (attn_mask is None or attn_mask.device == query.device)
    return (query @ key.transpose(-1, -2)).softmax(-1).to(value.dtype) @ value


KINDS = {"stage 1": (1, {}), "LoRA": (2, {"lora_r": 2}), "full": (2, {"tune_decoder": "full"})}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_pass_runs_on_fake_cuda_tensors(kind, dtype, fresh_model, no_checks):
    stage, options = KINDS[kind]
    loss = run_on_fake_cuda(fresh_model, STAGES[stage](stage=stage, attention="sdpa", **options), dtype)
    assert loss.device.type == "cuda" and loss.dtype == torch.float32


def test_text_only_packs_run_on_fake_cuda_tensors(fresh_model, no_checks):
    arguments = Stage2Arguments(stage=2, attention="sdpa", lora_r=2)
    assert run_on_fake_cuda(fresh_model, arguments, torch.bfloat16, with_images=False).device.type == "cuda"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_generation_runs_on_fake_cuda_tensors(dtype, fresh_model, no_checks):
    """What generate runs: a prompt of two images, then a token with the cache."""
    fresh_model.to(dtype).set_attn_implementation("eager")
    ids = torch.tensor([[fresh_model.config.image_token_id] * 4 + [5, 6]] * 2)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, WithoutGuard(), torch.no_grad():
        put_on_fake_cuda(fresh_model, mode)
        inputs = {"input_ids": ids, "pixel_values": torch.zeros(2, 3, 32, 32), "attention_mask": torch.ones_like(ids)}
        on_device = {name: mode.from_tensor(tensor).to("cuda:0") for name, tensor in inputs.items()}
        outputs = fresh_model(**on_device, use_cache=True, logits_to_keep=1)
        token = outputs.logits.argmax(-1)
        outputs = fresh_model(input_ids=token, past_key_values=outputs.past_key_values, use_cache=True)
    assert (outputs.logits.device.type, outputs.logits.dtype, token.shape) == ("cuda", dtype, (2, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_engines_steps_run_on_fake_cuda_tensors(dtype, fresh_model, processor, no_checks, monkeypatch):
    """Images, a prompt of two requests, and a step of both, in the cache of continuous batching."""
    monkeypatch.setattr("clip_phi.serving.engine.refuse_other_attention", lambda model: None)  # compares values
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", plain_attention)
    fresh_model.to(dtype).set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    shapes = cache_shapes(fresh_model)
    with Engine(fresh_model, processor) as engine, FakeTensorMode() as mode, WithoutGuard(), torch.no_grad():
        put_on_fake_cuda(fresh_model, mode)
        features = fresh_model.get_image_features(torch.zeros(2, 3, 32, 32).to("cuda:0")).pooler_output
        engine._cache = BatchCache(shapes, dtype, fresh_model.device, 2**30)
        engine._cache.reserve(2, 8)
        embeds = torch.stack(features).to(dtype)
        positions, lasts = torch.arange(4).repeat(2, 1), torch.tensor([[3], [2]]).to("cuda:0")
        logits = engine._forward(0, positions, 4, lasts, inputs_embeds=embeds)
        step = engine._forward(0, torch.tensor([[4], [3]]), 5, 1, input_ids=logits.argmax(-1, keepdim=True))
    assert {(each.device.type, each.dtype, each.shape[0]) for each in (logits, step)} == {("cuda", torch.float32, 2)}


def test_attention_in_half_precision_whatever_the_residual_stream(fresh_model, no_checks, monkeypatch):
    """As the varlen kernel needs it, in full tuning, too, whose residual stream is float32."""
    seen = []

    def watch(query, key, value, *arguments):
        seen.extend((query.dtype, key.dtype, value.dtype))
        return attend(query, key, value, *arguments)

    attend = attention.attend_by_bucket
    monkeypatch.setattr(attention, "attend_by_bucket", watch)
    arguments = Stage2Arguments(stage=2, attention="sdpa", tune_decoder="full")
    run_on_fake_cuda(fresh_model, arguments, torch.bfloat16)
    assert set(seen) == {torch.bfloat16}


def test_a_tensor_that_is_not_moved_would_be_noticed(fresh_model, no_checks, monkeypatch):
    module = sys.modules["modeling_clip_phi.modeling_clip_phi"].ClipPhiForCausalLM
    forward = module.forward

    def forgetful(self, **inputs):
        inputs["position_ids"] = inputs["position_ids"].to("cpu")
        return forward(self, **inputs)

    monkeypatch.setattr(module, "forward", forgetful)
    with pytest.raises(RuntimeError, match="two devices, cpu and cuda"):
        run_on_fake_cuda(fresh_model, Stage1Arguments(stage=1), torch.bfloat16)


# Signals and folders


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, num_train=12, num_val=4)
    return folder


def test_sigterm_to_accelerate_launch_stops_its_child_with_a_checkpoint_and_a_second_run_is_refused(
    data, vision_backbone, text_backbone, tmp_path
):
    options = stage1(data, (vision_backbone, text_backbone), tmp_path / "run", "--num_train_epochs", 100_000)
    command = [sys.executable, *ACCELERATE, str(ROOT / "train_accelerate.py"), *map(str, options)]
    with open(tmp_path / "log", "w") as log:
        launcher = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, start_new_session=True)
    path, lock = tmp_path / "run/metrics.jsonl", tmp_path / "run/run.lock"
    until(lambda: path.exists() and path.read_text().count("\n") > 2, tmp_path / "log")
    pid = int(lock.read_text())
    assert pid != launcher.pid
    script = "from clip_phi.training.guards import lock_run; from pathlib import Path; import sys\n"
    script += "try:\n    lock_run(Path(sys.argv[1]))\nexcept ValueError as error:\n    sys.exit(str(error))\n"
    second = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True
    )
    assert second.returncode == 1
    assert f"process {pid} trains in {tmp_path}/run: stop it first, or choose another --output_dir" in second.stderr
    os.kill(launcher.pid, signal.SIGTERM)  # to the launcher alone
    assert launcher.wait(60) != 0
    until(lambda: "stopped after step" in (tmp_path / "log").read_text(), tmp_path / "log")
    until(lambda: not os.path.exists(f"/proc/{pid}"), tmp_path / "log")
    place = max((tmp_path / "run/checkpoints").iterdir())
    assert int(place.name.removeprefix("step-")) == max(metrics(tmp_path / "run", "loss"))


def until(condition, log, seconds=120):
    stop = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < stop, log.read_text()[-2000:]
        time.sleep(0.1)
