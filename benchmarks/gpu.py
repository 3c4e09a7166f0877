"""The comparison of training.py on one CUDA device at true size: samples per second, MFU and peak memory.

    python benchmarks/gpu.py [--json FILE]           about 8 minutes
    python benchmarks/gpu.py --device cpu --tiny     the same script with tiny backbones, as a check

The weights are random, in bfloat16 and the shapes of TinyCLIP and phi-2. Projector and LoRA are in float32, under
autocast as in Accelerate. A step of ours is one pack of 4096 or 8192 tokens. The others process the same samples in
padded batches: of 2 captions or 8 conversations in the recipe, of 16 in Hugging Face's Llava. The losses must agree
to 2 % (bfloat16). MFU is the FLOPs of each, divided by the device's dense bfloat16 peak. It includes recomputation
and padding, but not the attention in packs. Memory is the most that torch allocated, with the weights.
"""

import argparse
import gc
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.attention.varlen as varlen
from training import (
    TRUE_SIZE,
    Contender,
    Models,
    Size,
    caption_work,
    conversation_work,
    counted_step,
    make_hugging_face,
    make_levers,
    make_models,
    make_padded,
    make_token_loop,
    step,
    to_device,
)

TINY_SIZE = Size(32, 2, 1, 32, 2, 1)
LOSS_TOLERANCE = 0.02  # relative, in bfloat16
# Dense bfloat16 TFLOP/s by a part of the device's name, from NVIDIA's data sheets.
PEAKS = {"A100": 312.0, "H100": 989.4, "H200": 989.4, "L40S": 362.0, "L4": 121.0, "4090": 165.2}


@dataclass
class Row:
    """The figures of one contender."""

    samples_per_second: float = 0.0
    tokens_per_sample: float = 0.0
    tflops_per_sample: float = 0.0
    mfu: float | None = None  # None without a known peak
    peak_gb: float | None = None  # None on a CPU
    loss: float = 0.0
    varlen_calls: int = 0
    error: str = ""  # why there are no figures


@contextmanager
def counting_varlen() -> Iterator[list[int]]:
    """Count the calls of torch's kernel for packs, in a list of one number."""
    original: Any = varlen.varlen_attn
    calls = [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return original(*args, **kwargs)

    varlen.varlen_attn = counted
    try:
        yield calls
    finally:
        varlen.varlen_attn = original


def place(contender: Contender, device: str) -> Contender:
    """Move the batches to the device, and compute the loss under autocast."""
    autocast = torch.autocast(device, torch.bfloat16)
    return replace(
        contender, batches=[to_device(batch, device) for batch in contender.batches], loss=autocast(contender.loss)
    )


def measure(contender: Contender, models: Models, device: str, peak: float | None, seconds: float) -> Row:
    """Count FLOPs and memory in one step, then time steps for at least this many seconds."""
    is_cuda = device == "cuda"
    gc.collect()
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    contender = place(contender, device)
    try:
        with counting_varlen() as calls:
            flops, loss, _ = counted_step(contender, models.trained)
        steps, started = 0, time.perf_counter()
        while steps == 0 or time.perf_counter() - started < seconds:
            step(contender, models.trained)
            if is_cuda:
                torch.cuda.synchronize()
            steps += 1
    except torch.OutOfMemoryError:
        return Row(error="out of memory")
    speed = contender.samples * steps / (time.perf_counter() - started)
    tflops = flops / contender.samples / 1e12
    return Row(
        speed,
        contender.tokens / contender.samples,
        tflops,
        speed * tflops / peak if peak else None,
        torch.cuda.max_memory_allocated() / 1e9 if is_cuda else None,
        loss,
        calls[0],
    )


def contenders_of(models: Models, stage: int, tokens: int) -> list[Contender]:
    """Make the recipes and our variants; all but token_loop process the same samples, in ours as one pack."""
    work = caption_work(max(1, tokens // 107), budget=tokens)
    if stage == 2:
        # 2 conversations per image; its tokens are twice their mean, and the image
        work = conversation_work(max(2, tokens // 480), log_mean=5.0, budget=tokens)
    padded = [make_padded(models, work), make_hugging_face(models, work._replace(rows=16))]
    loop = [make_token_loop(models, caption_work(1))] if stage == 1 else []
    return [*loop, *padded, *make_levers(models, work)]


def check_rows(rows: dict[str, Row], device: str) -> float:
    """Return the largest relative difference from the padded recipe's loss. Raises SystemExit if it is too large."""
    done = {name: row for name, row in rows.items() if not row.error and name != "token_loop"}
    worst = 0.0
    for name, row in done.items():
        difference = abs(row.loss / next(iter(done.values())).loss - 1)
        if difference > LOSS_TOLERANCE:
            raise SystemExit(f"{name}: the loss differs by {difference:.2g}")
        worst = max(worst, difference)
    packs = rows.get("all on")
    if device == "cuda" and packs is not None and not packs.error and not packs.varlen_calls:
        raise SystemExit("packs did not use torch.nn.attention.varlen")
    return worst


def print_rows(title: str, rows: dict[str, Row]) -> None:
    print(f"\n{title}\n{'':18}{'samples/s':>10}{'tokens/sample':>15}{'TFLOP/sample':>14}{'MFU':>8}{'peak GB':>9}")
    for name, row in rows.items():
        if row.error:
            print(f"{name:18} {row.error}")
            continue
        mfu = "-" if row.mfu is None else f"{row.mfu:.1%}"
        memory = "-" if row.peak_gb is None else f"{row.peak_gb:.1f}"
        print(
            f"{name:18}{row.samples_per_second:10.2f}{row.tokens_per_sample:15.1f}{row.tflops_per_sample:14.4f}"
            f"{mfu:>8}{memory:>9}",
            flush=True,
        )


def run_stage(
    stage: int, size: Size, budgets: Sequence[int], options: argparse.Namespace, stop: float
) -> dict[str, dict[str, Any]]:
    """Measure a stage. Returns, by tokens in a step, the figures by contender and the largest difference of a loss."""
    models = make_models(size, lora_r=64 if stage == 2 else 0, device=options.device, dtype=torch.bfloat16)
    results = {}
    for tokens in budgets:
        rows: dict[str, Row] = {}
        for contender in contenders_of(models, stage, tokens):
            if time.monotonic() > stop:
                rows[contender.name] = Row(error="out of time")
            else:
                rows[contender.name] = measure(contender, models, options.device, options.peak_tflops, options.seconds)
        difference = check_rows(rows, options.device)
        print_rows(f"stage {stage}, {tokens} tokens in a step of ours", rows)
        results[str(tokens)] = {"loss_rel_diff": difference, "rows": {name: asdict(row) for name, row in rows.items()}}
    return results


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu needs --tiny (default: %(default)s)"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny backbones and steps, as a check of the script")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="least time of each contender (default: %(default)s)"
    )
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="time after which nothing new starts (default: %(default)s)"
    )
    parser.add_argument("--peak-tflops", type=float, help="dense bfloat16 peak of the device; known for common ones")
    options = parser.parse_args()
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu needs --tiny: true size on a CPU is training.py --true-size")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; '--device cpu --tiny' runs the same script with tiny backbones")
    if options.device == "cuda" and options.peak_tflops is None:
        name = torch.cuda.get_device_name()
        options.peak_tflops = next((peak for part, peak in PEAKS.items() if part in name), None)
    return options


def main() -> None:
    options = parse_options()
    stop = time.monotonic() + 60 * options.minutes
    size, budgets = (TINY_SIZE, (2 * 107,)) if options.tiny else (TRUE_SIZE, (4096, 8192))
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    result: dict[str, Any] = {"device": device, "peak_tflops": options.peak_tflops, "torch": torch.__version__}
    for stage in (1, 2):
        result[f"stage{stage}"] = run_stage(stage, size, budgets, options, stop)
        gc.collect()
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
