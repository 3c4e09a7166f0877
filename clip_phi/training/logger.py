"""What a run shows and writes down: progress bar, metrics.jsonl, samples.jsonl, curve.png."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from ..batching.packing import PackedBatch
from ..data.report import Report
from ..environment import EnergyMeter, peak_memory_bytes
from .model import is_linear


class StepCounts(NamedTuple):
    """What steps went over. samples: captions or conversations. tokens: of the decoder, images included."""

    samples: int = 0
    supervised: int = 0
    tokens: int = 0
    flops: int = 0


class FlopsPerToken(NamedTuple):
    """FLOPs of a training step for each token of the decoder, each supervised token, and each image that the tower
    sees.

    Two for each weight in the forward pass, two for the gradient that goes back through it, two more if it is trained.
    What attention computes between tokens, and what is computed again, is left out: so does the usual MFU (PaLM,
    arXiv 2204.02311, without its attention term)."""

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

    def work(self, pack: PackedBatch) -> StepCounts:
        tokens = pack.inputs["input_ids"].numel()
        images = len(pack.inputs.get("pixel_values", ()))
        flops = self.token * tokens + self.supervised * pack.num_supervised + self.image * images
        return StepCounts(pack.num_conversations, pack.num_supervised, tokens, flops)


def _weights(module: torch.nn.Module) -> int:
    """Of one layer that multiplies with a matrix; a quantised one is counted as what it stands for."""
    if isinstance(module, torch.nn.Linear):
        return module.in_features * module.out_features
    return module.weight.numel() if is_linear(module) or isinstance(module, torch.nn.Conv2d) else 0


def _is_trained(module: torch.nn.Module) -> bool:
    return is_linear(module) and module.weight.requires_grad


class Monitor:
    """The log of one run, kept by the main process; the others hold one that writes nothing.

    metrics.jsonl: one json object a line; {"step", "loss", "samples_per_second", ...} from training, {"step",
    "loss_spike", "origins"} where the loss jumped, {"step", "eval_loss"} from evaluations, with "eval_loss/NAME" where
    there are several validation sets. A sample is a caption or a conversation. samples.jsonl: texts generated for
    held-out images. data_report.json: what was wrong with the data."""

    def __init__(
        self,
        folder: Path,
        num_steps: int,
        active: bool,
        device: torch.device,
        *,
        first_step: int = 0,
        steps_per_epoch: float | None = None,
        peak: float | None = None,
        track: Callable[..., Any] = lambda values, step: None,
    ):
        """first_step: the step that the run goes on from; what is written about later ones is dropped. steps_per_epoch:
        None for a stream. peak: FLOP/s that all devices together could do. track: Accelerator.log."""
        self.folder = folder
        self.active = active
        self.num_steps = num_steps
        self.device = device
        self.steps_per_epoch = steps_per_epoch
        self.peak = peak
        self.track = track
        self.energy = EnergyMeter(device)
        self.losses: list[tuple[int, float]] = []
        self.eval_losses: list[tuple[int, float]] = []
        self.seen = StepCounts()  # since the beginning of the run; a resumed one gets it from its checkpoint
        self.lost_lines = 0
        self._since = time.perf_counter()
        self._last = StepCounts()
        self._waited = 0.0
        self._bar = tqdm(total=num_steps, initial=first_step, unit="step", disable=not active, dynamic_ncols=True)
        if active:
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("metrics.jsonl", "samples.jsonl"):
                self._keep_until(name, first_step)

    def count(self, work: StepCounts, waited: float) -> None:
        """One step, all ranks together, is done. waited: seconds of it that this process waited for its data."""
        self.seen = StepCounts(*map(sum, zip(self.seen, work, strict=True)))
        self._waited += waited
        self._bar.update()

    def go_on(self, seen: Sequence[int]) -> None:
        """From what a checkpoint says was seen."""
        self.seen = self._last = StepCounts(*seen)

    def log(self, step: int, loss: float, **values: float) -> None:
        """Write down the loss of this step, what was seen until now, and the speed since the last line."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        rate = StepCounts(*((after - before) / seconds for after, before in zip(self.seen, self._last, strict=True)))  # type: ignore[arg-type]
        waiting, self._waited, self._last = self._waited / seconds, 0.0, self.seen
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
        if (joules := self.energy.joules()) is not None:
            line["energy_kwh"] = round(joules / 3.6e6, 6)
        utilisation = f", MFU {line['mfu']:.0%}" if self.peak else ""
        self._bar.set_postfix_str(
            f"loss {loss:.3f}, {rate.samples:.1f} samples/s, {rate.supervised:.0f} supervised tokens/s{utilisation}, "
            f"data wait {waiting:.0%}, {line['peak_memory_gb']:.1f} GB"
        )
        self._write("metrics.jsonl", line)
        self.track({name: value for name, value in line.items() if name != "step"}, step=step)

    def log_spike(self, step: int, loss: float, origins: Sequence[str]) -> None:
        """Write down that a loss stands out, and what this process saw in that step."""
        self._write("metrics.jsonl", {"step": step, "loss_spike": loss, "origins": list(origins)})
        if self.active:
            tqdm.write(f"step {step}: the loss jumped to {loss:.4f}; the samples are named in metrics.jsonl")

    def log_evaluation(
        self,
        step: int,
        sums: dict[str, tuple[float, float]],
        texts: list[dict[str, Any]],
        judged: dict[str, dict[str, float]],
    ) -> dict[str, float]:
        """Write down the held-out loss, over all and by name, the metrics and the generated texts; draw the curve.

        sums: of each validation set, its summed loss and number of supervised tokens. judged: {metric: {score, blind,
        shuffled}}. Returns loss and metrics by name."""
        eval_loss = sum(loss for loss, _ in sums.values()) / sum(tokens for _, tokens in sums.values())
        by_name = {f"eval_loss/{name}": loss / tokens for name, (loss, tokens) in sums.items()} if len(sums) > 1 else {}
        self.eval_losses.append((step, eval_loss))
        for metric, values in judged.items():
            by_name |= {
                f"eval/{metric}{'' if kind == 'score' else f'/{kind}'}": value for kind, value in values.items()
            }
        self._write("metrics.jsonl", {"step": step, "eval_loss": eval_loss, **by_name})
        self.track({"eval_loss": eval_loss, **by_name}, step=step)
        for text in texts:
            self._write("samples.jsonl", {"step": step, **text})
        if self.active:
            told = ", ".join(
                f"{metric} {values['score']:.4f} (blind {values['blind']:.4f}, shuffled {values['shuffled']:.4f})"
                for metric, values in list(judged.items())[:1]
            )
            tqdm.write(f"step {step}: held-out loss {eval_loss:.4f}{told and f', {told}'}")
            for text in texts:
                tqdm.write(f"  {text['image']}: {text['generated']!r} (a person wrote {text['written']!r})")
            try:
                draw_curve(self.folder / "curve.png", self.losses, self.eval_losses)
            except OSError as error:
                self._lost("curve.png", error)
        return {"loss": eval_loss, **{metric: values["score"] for metric, values in judged.items()}}

    def pause(self, seconds: float) -> None:
        """Leave so many seconds, spent on something else than training, out of the speed."""
        self._since += seconds

    def close(self, report: Report) -> None:
        """Write data_report.json: all that was skipped or mended, before and in training."""
        self._bar.close()
        if self.lost_lines:
            print(f"{self.lost_lines:,} lines of the log were lost: the disk was full", file=sys.stderr)
        if self.active:
            text = json.dumps(report.as_dict(), indent=2, ensure_ascii=False)
            (self.folder / "data_report.json").write_text(text + "\n", encoding="utf-8")
            if report.num_skipped:
                print(f"{report.num_skipped:,} of {report.records:,} records were skipped:\n{report.table()}")

    def _keep_until(self, name: str, step: int) -> None:
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
                if "loss" in record:
                    self.losses.append((record["step"], record["loss"]))
                if "eval_loss" in record:
                    self.eval_losses.append((record["step"], record["eval_loss"]))
        path.write_text("".join(kept), encoding="utf-8")

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


def draw_curve(path: Path, losses: list[tuple[int, float]], eval_losses: list[tuple[int, float]]) -> None:
    """Draw training and held-out loss (nats per supervised token) over the steps, as a png."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*losses, strict=True) if losses else ([], []), color="0.6", label="training, one step")
    axes.plot(*zip(*eval_losses, strict=True), "o-", color="tab:blue", label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per supervised token)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
