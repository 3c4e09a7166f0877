"""Both training stages on one CUDA device at true size: samples per second, MFU, and peak memory against the plan.

    python benchmarks/gpu.py [--json FILE]           about 6 minutes
    python benchmarks/gpu.py --device cpu --tiny     the same script with tiny backbones, as a check

The weights are random and have the shapes of TinyCLIP and phi-2. A row is a way to train: frozen weights in half
precision, trained ones in float32, autocast, clipping, and a step of the optimizer, as in train_accelerate.py. A step
is one pack. MFU is the FLOPs of the model, without attention and recomputation, divided by the device's dense peak in
half precision. Peak memory is the most that torch allocated. It is compared with what `clip-phi plan` computes for the
same pack, without the plan's reserve. Host syncs are those that torch reports in a forward and backward pass and in a
step of the optimizer.

Then the same samples in padded batches (of 2 captions or 8 conversations, as in the recipe, and of 16 in Hugging
Face's Llava), by forward and backward pass alone.
"""

import argparse
import gc
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from training import (
    IMAGE,
    PATCHES,
    TRUE_SIZE,
    Contender,
    Models,
    Size,
    Work,
    caption_work,
    conversation_work,
    make_configs,
    make_hugging_face,
    make_models,
    make_ours,
    make_padded,
    step,
    to_device,
)

from clip_phi.batching.attention import SDPA_PACKED_ATTENTION, has_varlen_kernel
from clip_phi.batching.packing import PackedBatch, SharedPrefixSample, build_shared_prefix, pack_samples
from clip_phi.environment import peak_flops
from clip_phi.training.arguments import Stage1Arguments, Stage2Arguments, TrainingArguments
from clip_phi.training.logger import FlopsPerToken
from clip_phi.training.memory import CARDS, Formula
from clip_phi.training.model import make_trainable
from clip_phi.training.optim import make_optimizer
from modeling_clip_phi import ClipPhiConfig, ClipPhiForCausalLM

TINY_SIZE = Size(128, 2, 2, 32, 2, 1)
LOSS_TOLERANCE = 0.02  # relative, in half precision
STEPS = 3  # at least, after two that warm up


class Variant(NamedTuple):
    """A way to train. options: of the stage. dtype: of frozen weights and products."""

    name: str
    stage: int
    options: dict[str, Any]
    dtype: torch.dtype = torch.bfloat16


VARIANTS = (
    Variant("stage 1", 1, {}),
    Variant("stage 1, varlen", 1, {"attention": "varlen"}),
    Variant("stage 1, fp16", 1, {}, torch.float16),
    Variant("stage 2", 2, {}),
    Variant("stage 2, sdpa", 2, {"attention": "sdpa"}),
    Variant("stage 2, dropout 0", 2, {"lora_dropout": 0.0}),
    Variant("stage 2, fp16", 2, {}, torch.float16),
    Variant("stage 2, nf4", 2, {"quantization": "nf4"}),
    Variant("stage 2, nf4, fp16", 2, {"quantization": "nf4"}, torch.float16),
    Variant("stage 2, int8", 2, {"quantization": "int8"}),
    Variant("stage 2, checkpointed", 2, {"gradient_checkpointing": True}),
    Variant("stage 2, nf4, checkpointed", 2, {"quantization": "nf4", "gradient_checkpointing": True}),
    Variant("stage 2, full", 2, {"tune_decoder": "full"}),
    Variant("stage 2, AdamW", 2, {"optim": "adamw_torch_fused"}),
)


@dataclass
class Row:
    """The figures of a variant or contender. error: why there are none."""

    samples_per_second: float = 0.0
    tokens_per_second: float = 0.0
    mfu: float | None = None  # None without a known peak
    peak_gb: float | None = None  # None on a CPU, as the next three
    plan_gb: float | None = None
    reserved_gb: float | None = None
    host_syncs: tuple[int, int] | None = None
    optimizer_ms: float = 0.0
    loss: float = 0.0
    error: str = ""


def build(variant: Variant, arguments: TrainingArguments, size: Size, device: torch.device) -> ClipPhiForCausalLM:
    """A model of random weights, ready to train."""
    torch.manual_seed(0)
    vision, text = make_configs(size)
    default = torch.get_default_dtype()
    torch.set_default_dtype(variant.dtype)
    try:
        with device:
            model = ClipPhiForCausalLM(ClipPhiConfig(vision_config=vision, text_config=text, image_token_id=IMAGE))
    finally:
        torch.set_default_dtype(default)
    if isinstance(arguments, Stage2Arguments) and arguments.quantization != "none":
        quantize(model.model.language_model, arguments.quantization, variant.dtype, device)
    make_trainable(model, arguments, device, variant.dtype)
    return model.to(device).train()


def quantize(decoder: nn.Module, kind: str, dtype: torch.dtype, device: torch.device) -> None:
    """Replace the decoder's linear layers by those of bitsandbytes, as transformers does at loading."""
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    for name, layer in [*decoder.named_modules()]:
        if not isinstance(layer, nn.Linear):
            continue
        sizes = (layer.in_features, layer.out_features, layer.bias is not None)
        weight = layer.weight.data.to("cpu", torch.float16)
        if kind == "nf4":
            new: Any = Linear4bit(*sizes, compute_dtype=dtype, compress_statistics=True, quant_type="nf4")
            new.weight = Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4")
            new.support_avx512bf16_for_cpu = False
        else:
            new = Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
            new.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        new.bias = layer.bias
        parent, _, own = name.rpartition(".")
        setattr(decoder.get_submodule(parent), own, new.to(device))


def make_pack(work: Work, tokens: int) -> tuple[PackedBatch, list[list[int]]]:
    """One pack of at most so many tokens, and what Formula needs of it."""
    samples: list[SharedPrefixSample] = []
    images = []
    for number, conversations in enumerate(work.conversations):
        sample = build_shared_prefix(conversations, [IMAGE] * PATCHES, str(number))
        if sum(len(each.input_ids) for each in samples) + len(sample.input_ids) <= tokens:
            samples.append(sample)
            images.append(number)
    return pack_samples(samples, work.pixels[images], 0), [sample.conversation_ids for sample in samples]


def planned_bytes(variant: Variant, arguments: TrainingArguments, model: Any, ids: Any, supervised: int) -> int:
    """What the plan says that tensors take at the peak."""
    attention = model.config.get_text_config()._attn_implementation
    card = CARDS["h100-80"]._replace(
        dtype=str(variant.dtype).removeprefix("torch."), has_varlen=attention != SDPA_PACKED_ATTENTION
    )
    bill = Formula(model.config, arguments, card).bill(ids, supervised)
    return sum(size for name, size in bill.items() if name not in ("context", "allocator"))


def count_syncs(function: Callable[[], Any]) -> int:
    """The synchronisations of the host with the device that torch reports."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [each for each in caught if "synchroniz" in str(each.message)]
    for each in found if len(found) < 10 else []:
        print(f"  sync at {each.filename}:{each.lineno}")
    return len(found)


def measure(variant: Variant, size: Size, tokens: int, device: torch.device, peak: float | None, seconds: float) -> Row:
    """Train for at least so many seconds, and at least STEPS steps."""
    kind: type[TrainingArguments] = Stage1Arguments if variant.stage == 1 else Stage2Arguments
    arguments = kind(stage=variant.stage, **variant.options)
    is_cuda = device.type == "cuda"
    synchronize: Callable[[], Any] = torch.cuda.synchronize if is_cuda else lambda: None
    free(is_cuda)
    try:
        model = build(variant, arguments, size, device)
        optimizer = make_optimizer(model, arguments, device)
        scaler = torch.amp.GradScaler(device.type, enabled=is_cuda and variant.dtype == torch.float16)
        images = 2 * tokens // 107
        work = caption_work(images) if variant.stage == 1 else conversation_work(images, log_mean=5.0)
        pack, ids = make_pack(work, tokens)
        pack = pack.to(device)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        loss = torch.zeros((), device=device)

        def passes() -> None:
            with torch.autocast(device.type, variant.dtype):
                found = model(**pack.inputs, use_cache=False, num_items_in_batch=pack.num_supervised).loss
            scaler.scale(found).backward()
            loss.copy_(found.detach())

        def update() -> None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(trained, 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

        for _ in range(2):
            passes()
            first_loss = loss.item()
            update()
        if is_cuda:
            torch.cuda.reset_peak_memory_stats()
            passes()  # the next passes run beside its gradients, as in accumulation
        syncs = (count_syncs(passes), count_syncs(update)) if is_cuda else None
        synchronize()
        steps, started, updating = 0, time.perf_counter(), 0.0
        while steps < STEPS or time.perf_counter() - started < seconds:
            passes()
            synchronize()
            before = time.perf_counter()
            update()
            synchronize()
            updating += time.perf_counter() - before
            steps += 1
        taken = (time.perf_counter() - started) / steps
    except torch.OutOfMemoryError:
        return Row(error="out of memory")
    if not torch.isfinite(loss):
        raise SystemExit(f"{variant.name}: the loss is {loss.item()}")
    flops = FlopsPerToken.of(model, PATCHES).counts_of(pack).flops
    return Row(
        pack.num_conversations / taken,
        pack.inputs["input_ids"].numel() / taken,
        flops / taken / peak if peak else None,
        torch.cuda.max_memory_allocated() / 1e9 if is_cuda else None,
        planned_bytes(variant, arguments, model, ids, pack.num_supervised) / 1e9,
        torch.cuda.max_memory_reserved() / 1e9 if is_cuda else None,
        syncs,
        1000 * updating / steps,
        first_loss,
    )


def free(is_cuda: bool) -> None:
    gc.collect()
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# ------------------------------------------------------------------ padded batches


def place(contender: Contender, device: str) -> Contender:
    """Move the batches to the device, and compute the loss under autocast."""
    autocast = torch.autocast(device, torch.bfloat16)
    batches = [to_device(batch, device) for batch in contender.batches]
    return replace(contender, batches=batches, loss=autocast(contender.loss))


def measure_contender(contender: Contender, models: Models, device: torch.device, seconds: float) -> Row:
    is_cuda = device.type == "cuda"
    free(is_cuda)
    try:
        contender = place(contender, device.type)
        loss = step(contender, models.trained).item()
        steps, started = 0, time.perf_counter()
        while steps == 0 or time.perf_counter() - started < seconds:
            step(contender, models.trained).item()
            steps += 1
    except torch.OutOfMemoryError:
        return Row(error="out of memory")
    taken = (time.perf_counter() - started) / steps
    memory = torch.cuda.max_memory_allocated() / 1e9 if is_cuda else None
    return Row(contender.samples / taken, contender.tokens / taken, peak_gb=memory, loss=loss)


def contenders_of(models: Models, stage: int, tokens: int) -> list[Contender]:
    """The recipes, and ours on the same samples."""
    work = caption_work(max(1, tokens // 107), budget=tokens)
    if stage == 2:
        work = conversation_work(max(2, tokens // 480), log_mean=5.0, budget=tokens)
    return [
        make_padded(models, work),
        make_hugging_face(models, work._replace(rows=16)),
        make_ours(models, work, name="ours"),
    ]


# ------------------------------------------------------------------ the table


def check_losses(rows: dict[str, Row], names: Sequence[str]) -> None:
    """Raises SystemExit if the same samples have other losses."""
    done = {name: rows[name].loss for name in names if name in rows and not rows[name].error}
    for name, loss in done.items():
        difference = abs(loss / next(iter(done.values())) - 1)
        if difference > LOSS_TOLERANCE:
            raise SystemExit(f"{name}: the loss differs by {difference:.2g}")


def print_rows(title: str, rows: dict[str, Row]) -> None:
    names = f"{'samples/s':>10}{'tokens/s':>10}{'MFU':>7}{'peak GB':>9}{'plan':>8}{'reserved':>10}{'syncs':>8}"
    print(f"\n{title}\n{'':28}{names}{'optimizer':>11}{'loss':>9}")
    for name, row in rows.items():
        if row.error:
            print(f"{name:28} {row.error}")
            continue
        mfu = "-" if row.mfu is None else f"{row.mfu:.1%}"
        memory, reserved = ("-" if each is None else f"{each:.2f}" for each in (row.peak_gb, row.reserved_gb))
        plan = f"{row.plan_gb / row.peak_gb - 1:+.1%}" if row.plan_gb and row.peak_gb else "-"
        syncs = "-" if row.host_syncs is None else "{}+{}".format(*row.host_syncs)
        print(
            f"{name:28}{row.samples_per_second:10.1f}{row.tokens_per_second:10.0f}{mfu:>7}{memory:>9}{plan:>8}"
            f"{reserved:>10}{syncs:>8}{row.optimizer_ms:8.1f} ms{row.loss:9.4f}",
            flush=True,
        )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu needs --tiny (default: %(default)s)"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny backbones and steps, as a check of the script")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--tokens", type=int, default=8192, help="of a pack (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="least time of each row (default: %(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=7.0, help="time after which nothing new starts (default: %(default)s)"
    )
    parser.add_argument("--only", help="rows whose name contains this")
    parser.add_argument("--peak-tflops", type=float, help="dense peak of the device; known for common ones")
    options = parser.parse_args()
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu needs --tiny: true size on a CPU is training.py --true-size")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; '--device cpu --tiny' runs the same script with tiny backbones")
    return options


def main() -> None:
    options = parse_options()
    stop = time.monotonic() + 60 * options.minutes
    device = torch.device(options.device)
    peak = options.peak_tflops * 1e12 if options.peak_tflops else peak_flops(device)
    size, tokens = (TINY_SIZE, 4 * 107) if options.tiny else (TRUE_SIZE, options.tokens)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    has_kernel = has_varlen_kernel(device, torch.bfloat16)
    print(f"{name}, torch {torch.__version__}, peak {peak and peak / 1e12}, varlen kernel {has_kernel}", flush=True)
    rows: dict[str, Row] = {}
    for variant in VARIANTS:
        if (variant.options.get("attention") == "varlen" and not has_kernel) or (
            options.only or ""
        ) not in variant.name:
            continue
        if options.device == "cpu" and variant.dtype == torch.float16:
            continue
        if time.monotonic() > stop:
            rows[variant.name] = Row(error="out of time")
        else:
            rows[variant.name] = measure(variant, size, tokens, device, peak, options.seconds)
        print_rows("", {variant.name: rows[variant.name]})
    for each_stage in ("stage 1", "stage 2"):
        same = ("", ", varlen", ", sdpa", ", fp16", ", checkpointed", ", AdamW")
        check_losses(rows, [each_stage + each for each in same])
    print_rows(f"{name}: a step is a pack of {tokens} tokens", rows)
    result: dict[str, Any] = {"device": name, "peak_flops": peak, "torch": torch.__version__, "tokens": tokens}
    result["rows"] = {each: asdict(row) for each, row in rows.items()}
    for stage in (1, 2) if options.only is None else ():
        if time.monotonic() > stop:
            break
        models = make_models(size, 64 if stage == 2 else 0, options.device, torch.bfloat16)
        compared = {
            each.name: measure_contender(each, models, device, options.seconds)
            for each in contenders_of(models, stage, tokens // 2)
        }
        check_losses(compared, [*compared])
        print_rows(f"stage {stage}: forward and backward pass of the same samples, padded and in packs", compared)
        result[f"padded_stage{stage}"] = {each: asdict(row) for each, row in compared.items()}
        del models
        free(options.device == "cuda")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
