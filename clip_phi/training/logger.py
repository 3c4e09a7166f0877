"""The log of a run: progress bar or lines, metrics.jsonl, samples.jsonl, curve.png."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from ..batching.packing import PackedBatch
from ..data.report import Report
from ..environment import peak_memory_bytes
from .evaluate import Evaluation
from .model import is_linear


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
    def of(cls, model: Any) -> "FlopsPerToken":
        parts = model.model
        tower = 2 * sum(_weights(module) for module in parts.vision_tower.modules())
        projector = sum((2 + 2 * _is_trained(module)) * _weights(module) for module in parts.projector.modules())
        patches = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
        decoder = sum((4 + 2 * _is_trained(module)) * _weights(module) for module in parts.language_model.modules())
        head = (4 + 2 * _is_trained(model.lm_head)) * _weights(model.lm_head)
        return cls(decoder, head, (tower + projector) * patches)

    def counts_of(self, pack: PackedBatch) -> StepCounts:
        tokens = pack.inputs["input_ids"].numel()
        images = len(pack.inputs.get("pixel_values", ()))
        flops = self.token * tokens + self.supervised * pack.num_supervised + self.image * images
        return StepCounts(pack.num_conversations, pack.num_supervised, tokens, flops)


def _weights(module: torch.nn.Module) -> int:
    """Elements of a layer's matrix, 0 for other layers; a quantised matrix counts with its original size."""
    if isinstance(module, torch.nn.Linear):
        return module.in_features * module.out_features
    return module.weight.numel() if is_linear(module) or isinstance(module, torch.nn.Conv2d) else 0


def _is_trained(module: torch.nn.Module) -> bool:
    return is_linear(module) and module.weight.requires_grad


class TrainingLogger:
    """The log of one run, written by the main process; the loggers of the others write nothing.

    metrics.jsonl has one json object a line. From training: {"step", "loss", "samples_per_second", ...}, where loss is
    the mean over the supervised tokens since the last such line, and a sample is a caption or a conversation. Where
    the loss jumps: {"step", "loss_spike", "origins"}. From evaluations: {"step", "eval_loss"}, with "eval_loss/NAME" if
    there are several validation sets. samples.jsonl: texts generated for held-out images. data_report.json: the damaged
    records. On a terminal a progress bar shows the last line; elsewhere each line is printed.

    Args:
        folder: of the run.
        num_steps: of the run.
        active: whether this is the main process.
        device: whose peak memory is logged.
        steps_per_epoch: None for a stream.
        peak: FLOP/s of all devices together, for the MFU; None if unknown.
        track: Accelerator.log.
    """

    def __init__(
        self,
        folder: Path,
        num_steps: int,
        active: bool,
        device: torch.device,
        steps_per_epoch: float | None = None,
        peak: float | None = None,
        track: Callable[..., Any] = lambda values, step: None,
    ):
        self.folder, self.num_steps, self.active, self.device = folder, num_steps, active, device
        self.steps_per_epoch, self.peak, self.track = steps_per_epoch, peak, track
        self.losses: list[tuple[int, float]] = []
        self.eval_losses: list[tuple[int, float]] = []
        self.seen = self._last = StepCounts()  # since the beginning of the run, and until the last line
        self._loss_sum, self._tokens = 0.0, 0  # since the last line
        self._step = 0  # of the last line, or the one that the run is resumed after
        self._since, self._waited = time.perf_counter(), 0.0
        self.lost_lines = 0
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
            for name in ("metrics.jsonl", "samples.jsonl"):
                self._truncate(name, first_step)
            hidden = not sys.stderr.isatty()
            self._bar = tqdm(total=self.num_steps, initial=first_step, unit="step", disable=hidden, dynamic_ncols=True)
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
        new: Any = [after - before for after, before in zip(self.seen, self._last, strict=True)]
        rate = StepCounts(*(count / seconds for count in new))
        left = (self.num_steps - step) * seconds / max(step - self._step, 1)
        waiting, self._waited, self._last, self._step = self._waited / seconds, 0.0, self.seen, step
        loss, self._loss_sum, self._tokens = self._loss_sum / max(self._tokens, 1), 0.0, 0
        self.losses.append((step, loss))
        line: dict[str, Any] = {"step": step}
        if self.steps_per_epoch:
            line["epoch"] = round(step / self.steps_per_epoch, 4)
        line |= {"loss": loss, **values, "samples_seen": self.seen.samples, "tokens_seen": self.seen.tokens}
        line["samples_per_second"] = round(rate.samples, 2)
        line["supervised_tokens_per_second"] = round(rate.supervised, 1)
        line["data_wait_share"] = round(waiting, 4)
        line["tflops"] = round(rate.flops / 1e12, 4)
        if self.peak:
            line["mfu"] = round(rate.flops / self.peak, 4)
        line["peak_memory_gb"] = round(peak_memory_bytes(self.device) / 1e9, 3)
        self._write("metrics.jsonl", line)
        self.track({name: value for name, value in line.items() if name != "step"}, step=step)
        mfu = f", MFU {line['mfu']:.0%}" if self.peak else ""
        text = (
            f"loss {loss:.3f}, {rate.samples:.1f} samples/s, {rate.supervised:.0f} supervised tokens/s{mfu}, "
            f"data wait {waiting:.0%}, {line['peak_memory_gb']:.1f} GB"
        )
        self._bar.set_postfix_str(text)
        if self._bar.disable:
            self._print(f"step {step:,}/{self.num_steps:,}: {text}, ETA {timedelta(seconds=round(left))}")

    def log_spike(self, step: int, loss: float, origins: Sequence[str]) -> None:
        """Log a loss that jumps, with this process' samples of that step."""
        self._write("metrics.jsonl", {"step": step, "loss_spike": loss, "origins": list(origins)})
        self._print(f"step {step}: the loss jumped to {loss:.4f}; the samples are named in metrics.jsonl")

    def log_evaluation(self, step: int, evaluation: Evaluation) -> dict[str, float]:
        """Log losses, metrics and generated texts, and draw the curve. Returns loss and metrics by name."""
        losses, scores = evaluation.losses, evaluation.scores
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
        for sample in evaluation.texts:
            self._write("samples.jsonl", {"step": step, **sample})
            self._print(f"  {sample['image']}: {sample['generated']!r} (reference: {sample['written']!r})")
        if self.active:
            try:
                draw_curve(self.folder / "curve.png", self.losses, self.eval_losses)
            except OSError as error:
                self._lost("curve.png", error)
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
        if self.lost_lines:
            print(f"{self.lost_lines:,} lines of the log were lost: the disk was full", file=sys.stderr)
        if self.active:
            text = json.dumps(report.as_dict(), indent=2, ensure_ascii=False)
            (self.folder / "data_report.json").write_text(text + "\n", encoding="utf-8")
            if report.num_skipped:
                print(f"{report.num_skipped:,} of {report.records:,} records were skipped:\n{report.table()}")

    def _truncate(self, name: str, step: int) -> None:
        path = self.folder / name
        lines = path.read_text(encoding="utf-8").splitlines() if step and path.exists() else []
        kept = []
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:  # the last one, of a run that was killed
                continue
            if record["step"] <= step:
                kept.append(line + "\n")
                for key, points in (("loss", self.losses), ("eval_loss", self.eval_losses)):
                    if key in record:
                        points.append((record["step"], record[key]))
        path.write_text("".join(kept), encoding="utf-8")

    def _print(self, text: str) -> None:
        if self.active:
            tqdm.write(text)
            sys.stdout.flush()

    def _write(self, name: str, record: dict[str, Any]) -> None:
        if self.active:
            try:
                with open(self.folder / name, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError as error:
                self._lost(name, error)

    def _lost(self, name: str, error: OSError) -> None:
        if not self.lost_lines:
            print(f"{self.folder / name} was not written, and training goes on: {error}", file=sys.stderr, flush=True)
        self.lost_lines += 1


def smoothed(values: Sequence[float], span: float) -> list[float]:
    """The exponential moving average of about so many values, each weighted as if there were none before the first."""
    found, total, weights = [], 0.0, 0.0
    for value in values:
        total, weights = total * (1 - 1 / span) + value, weights * (1 - 1 / span) + 1
        found.append(total / weights)
    return found


def draw_curve(path: Path, losses: list[tuple[int, float]], eval_losses: list[tuple[int, float]]) -> None:
    """Draw training and held-out loss (nats per supervised token) over the steps, as a png."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps, values = zip(*losses, strict=True) if losses else ((), ())
    axes.plot(steps, values, color="0.8", label="training")
    axes.plot(steps, smoothed(values, max(1, len(values) / 20)), color="tab:orange", label="training, smoothed")
    axes.plot(*zip(*eval_losses, strict=True), "o-", color="tab:blue", label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per supervised token)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
