"""The log of a run: progress bar or lines, metrics.jsonl, samples.jsonl, curve.png."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from ..batching.packing import PackedBatch
from ..data.report import Report, plain, plain_json
from ..environment import peak_memory_bytes
from .evaluate import Evaluation
from .guards import tolerate_write_errors
from .model import LINEAR


class StepCounts(NamedTuple):
    """Counts of one or several steps.

    samples: captions or conversations. supervised: tokens. tokens: of the decoder, images included."""

    samples: int = 0
    supervised: int = 0
    tokens: int = 0
    flops: int = 0


class FlopsPerToken(NamedTuple):
    """FLOPs of a training step for each token of the decoder, each supervised token, and each image of the tower.

    Two for each weight in the forward pass, two for the gradient with respect to its input, two more if it is trained.
    Attention between tokens and recomputation are left out, as in the usual MFU (PaLM, arXiv 2204.02311, without its
    attention term)."""

    token: int
    supervised: int
    image: int

    @classmethod
    def of(cls, model: Any, num_image_tokens: int) -> "FlopsPerToken":
        """num_image_tokens: features of an image. A tower's weights are counted once for each, CLS left out."""
        parts = model.model
        image = _flops(parts.vision_tower, 2, 2) + _flops(parts.projector, 2, 4)
        return cls(_flops(parts.language_model, 4, 6), _flops(model.lm_head, 4, 6), image * num_image_tokens)

    def counts_of(self, pack: PackedBatch) -> StepCounts:
        tokens = pack.inputs["input_ids"].numel()
        images = len(pack.inputs.get("pixel_values", ()))
        flops = self.token * tokens + self.supervised * pack.num_supervised + self.image * images
        return StepCounts(pack.num_conversations, pack.num_supervised, tokens, flops)


def _flops(part: torch.nn.Module, frozen: int, trained: int) -> int:
    """Of a token: so many for each weight of the part's layers. A quantised matrix counts with its original size."""
    total = 0
    for layer in filter(lambda each: isinstance(each, (*LINEAR, torch.nn.Conv2d)), part.modules()):
        is_plain = isinstance(layer, torch.nn.Linear)
        size = layer.in_features * layer.out_features if is_plain else layer.weight.numel()
        total += size * (trained if layer.weight.requires_grad else frozen)
    return total


@dataclass
class TrainingLogger:
    """The log of one run, written by the main process; the loggers of the others write nothing.

    metrics.jsonl has one json object a line. From training: {"step", "loss", "samples_per_second", ...}, where loss is
    the mean over the supervised tokens since the last such line, and a sample is a caption or a conversation. Where
    the loss jumps: {"step", "loss_spike", "origins"}. From evaluations: {"step", "eval_loss"}, with "eval_loss/NAME" if
    there are several validation sets. samples.jsonl: texts generated for held-out images. data_report.json: the damaged
    records. On a terminal a progress bar shows the last line; elsewhere each line is printed.

    active: whether this is the main process. device: whose peak memory is logged. steps_per_epoch: None for a stream.
    peak: FLOP/s of all devices together, for the MFU; None if unknown. track: Accelerator.log. advice: printed once, if
    training waits for its data for more than 5 % of the time."""

    folder: Path
    num_steps: int
    active: bool
    device: torch.device
    steps_per_epoch: float | None = None
    peak: float | None = None
    track: Callable[..., Any] = lambda values, step: None
    advice: str = ""

    def __post_init__(self) -> None:
        self.losses: list[tuple[int, float]] = []
        self.eval_losses: list[tuple[int, float]] = []
        self.seen = self._last = StepCounts()  # since the beginning of the run, and until the last line
        self._loss_sum, self._tokens = 0.0, 0  # since the last line
        self._step = 0  # of the last line, or the one that the run is resumed after
        self._since, self._waited = time.perf_counter(), 0.0
        self._bar = tqdm(disable=True)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "loss_sum": self._loss_sum, "tokens": self._tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = self._last = StepCounts(*state["seen"])
        self._loss_sum, self._tokens = state["loss_sum"], state["tokens"]

    def start(self, first_step: int) -> None:
        """Begin the log after a step, 0 in a new run. Lines about later steps are dropped from the files."""
        self._step = first_step
        if self.active:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in (self.folder / "metrics.jsonl", self.folder / "samples.jsonl"):
                records = []
                for line in path.read_text(encoding="utf-8").splitlines() if first_step and path.exists() else []:
                    with suppress(ValueError):  # torn, where a run was killed or the disk was full
                        records.append(json.loads(line))
                kept = [record for record in records if record["step"] <= first_step]
                path.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
                for key, points in (("loss", self.losses), ("eval_loss", self.eval_losses)):
                    points += [(record["step"], record[key]) for record in kept if key in record]
            self._bar = tqdm(total=self.num_steps, initial=first_step, unit="step", disable=None, dynamic_ncols=True)
        self._since = time.perf_counter()

    def count(self, work: StepCounts, loss: float | None, waited: float) -> None:
        """Count a step of all ranks.

        loss: its mean over its supervised tokens in nats, or None if it was left out. waited: seconds that this process
        waited for its data."""
        self.seen = StepCounts(*map(sum, zip(self.seen, work, strict=True)))
        if loss is not None:
            self._loss_sum += loss * max(work.supervised, 1)
            self._tokens += max(work.supervised, 1)
        self._waited += waited
        self._bar.update()

    def log(self, step: int, **values: float) -> None:
        """Log a line: the loss and the speed since the last one, what was seen until now, and the values."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        rate = StepCounts._make((after - before) / seconds for after, before in zip(self.seen, self._last, strict=True))
        left = (self.num_steps - step) * seconds / max(step - self._step, 1)
        is_first, waiting = not self._step, self._waited / seconds
        self._waited, self._last, self._step = 0.0, self.seen, step
        loss, self._loss_sum, self._tokens = self._loss_sum / max(self._tokens, 1), 0.0, 0
        self.losses.append((step, loss))
        line = {
            **({"epoch": round(step / self.steps_per_epoch, 4)} if self.steps_per_epoch else {}),
            "loss": loss,
            **values,
            "samples_seen": self.seen.samples,
            "tokens_seen": self.seen.tokens,
            "samples_per_second": round(rate.samples, 2),
            "supervised_tokens_per_second": round(rate.supervised, 1),
            "data_wait_share": round(waiting, 4),
            "tflops": round(rate.flops / 1e12, 4),
            **({"mfu": round(rate.flops / self.peak, 4)} if self.peak else {}),
            "peak_memory_gb": round(peak_memory_bytes(self.device) / 1e9, 3),
        }
        self._write("metrics.jsonl", {"step": step, **line})
        self.track(line, step=step)
        mfu = f", MFU {line['mfu']:.0%}" if self.peak else ""
        speed = f"{rate.samples:.1f} samples/s, {rate.supervised:.0f} supervised tokens/s{mfu}"
        text = f"loss {loss:.3f}, {speed}, data wait {waiting:.0%}, {line['peak_memory_gb']:.1f} GB"
        self._bar.set_postfix_str(text)
        if self._bar.disable:
            self._print(f"step {step:,}/{self.num_steps:,}: {text}, ETA {timedelta(seconds=round(left))}")
        if self.advice and waiting > 0.05 and not is_first:  # the first line has the start of the processes in it
            self._print(f"training waits for its data {waiting:.0%} of the time: {self.advice}")
            self.advice = ""

    def log_spike(self, step: int, loss: float, origins: Sequence[str]) -> None:
        """Log a loss that jumps, with this process' samples of that step."""
        self._write("metrics.jsonl", {"step": step, "loss_spike": loss, "origins": list(origins)})
        self._print(f"step {step}: the loss jumped to {loss:.4f}; the samples are named in metrics.jsonl")

    def log_evaluation(self, step: int, evaluation: Evaluation) -> dict[str, float]:
        """Log losses, metrics and generated texts, and draw the curve. Returns loss and metrics by name."""
        losses, texts, scores = evaluation
        eval_loss = sum(loss for loss, _ in losses.values()) / sum(tokens for _, tokens in losses.values())
        self.eval_losses.append((step, eval_loss))
        line = {"eval_loss": eval_loss}
        if len(losses) > 1:
            line |= {f"eval_loss/{name}": loss / tokens for name, (loss, tokens) in losses.items()}
        for metric, values in scores.items():
            line |= {f"eval/{metric}{'' if kind == 'score' else f'/{kind}'}": each for kind, each in values.items()}
        self._write("metrics.jsonl", {"step": step, **line})
        self.track(line, step=step)
        text = f"step {step}: held-out loss {eval_loss:.4f}"
        for metric, values in list(scores.items())[:1]:
            text += f", {metric} {values['score']:.4f} (blind {values['blind']:.4f}, shuffled {values['shuffled']:.4f})"
        self._print(text)
        for sample in texts:
            self._write("samples.jsonl", {"step": step, **sample})
            self._print(f"  {sample['image']}: {sample['generated']!r} (reference: {sample['written']!r})")
        if self.active:
            with tolerate_write_errors(f"{self.folder}/curve.png"):
                draw_curve(self.folder / "curve.png", self.losses, self.eval_losses)
        return {"loss": eval_loss, **{metric: values["score"] for metric, values in scores.items()}}

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time that something else than training takes out of the speed."""
        started = time.perf_counter()
        yield
        self._since += time.perf_counter() - started

    def close(self, report: Report) -> None:
        """Write data_report.json: all that was skipped or repaired, before and during training."""
        self._bar.close()
        if self.active:
            text = plain_json(report.as_dict(), indent=2)
            (self.folder / "data_report.json").write_text(text + "\n", encoding="utf-8")
            if report.num_skipped:
                print(f"{report.num_skipped:,} of {report.records:,} records were skipped:\n{report.table()}")

    def _print(self, text: str) -> None:
        if self.active:
            tqdm.write(plain(text))
            sys.stdout.flush()

    def _write(self, name: str, record: dict[str, Any]) -> None:
        if self.active:
            path = self.folder / name
            with tolerate_write_errors(f"a line of {path}"), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def draw_curve(path: Path, losses: list[tuple[int, float]], eval_losses: list[tuple[int, float]]) -> None:
    """Draw training and held-out loss (nats per supervised token) over the steps, as a png.

    The smoothed loss is an exponential moving average, without a bias to the first values."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps, values = zip(*losses, strict=True) if losses else ((), ())
    decay, total, weights, smoothed = 1 - 1 / max(1, len(values) / 20), 0.0, 0.0, []
    for value in values:
        total, weights = total * decay + value, weights * decay + 1
        smoothed.append(total / weights)
    axes.plot(steps, values, color="0.7", label="training")
    if len(values) > 20:  # of fewer, the smoothed line is the line itself
        axes.plot(steps, smoothed, color="tab:orange", label="training, smoothed")
    axes.plot(*zip(*eval_losses, strict=True), "o-", color="tab:blue", label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per supervised token)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
