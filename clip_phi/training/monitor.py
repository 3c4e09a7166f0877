"""What a run shows and writes down: progress bar, metrics.jsonl, samples.jsonl, curve.png."""

import json
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..sources.report import Report


class Monitor:
    """The log of one run, kept by the main process; the others hold one that writes nothing.

    metrics.jsonl: one json object a line; {"step", "loss", "samples_per_second", ...} from training, {"step",
    "eval_loss"} from evaluations, with "eval_loss/NAME" where there are several validation sets. A sample is a caption
    or a conversation. samples.jsonl: texts generated for held-out images. data_report.json: what was wrong with the
    data."""

    def __init__(self, folder: Path, num_steps: int, active: bool, first_step: int = 0):
        """first_step: the step that the run goes on from; what is written about later ones is dropped."""
        self.folder = folder
        self.active = active
        self.num_steps = num_steps
        self.losses: list[tuple[int, float]] = []
        self.eval_losses: list[tuple[int, float]] = []
        self._since = time.perf_counter()
        self._samples = self._tokens = 0
        self._waited = 0.0
        self._bar = tqdm(total=num_steps, initial=first_step, unit="step", disable=not active, dynamic_ncols=True)
        if active:
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("metrics.jsonl", "samples.jsonl"):
                self._keep_until(name, first_step)

    def count(self, num_samples: int, num_tokens: int, waited: float) -> None:
        """One step over so many samples and supervised tokens, all ranks together, is done.

        waited: seconds of it that this process waited for its data."""
        self._samples += num_samples
        self._tokens += num_tokens
        self._waited += waited
        self._bar.update()

    def log(self, step: int, loss: float, **values: float) -> None:
        """Write down the loss of this step, and the speed since the last line."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        samples, tokens, self._samples, self._tokens = self._samples / seconds, self._tokens / seconds, 0, 0
        waiting, self._waited = self._waited / seconds, 0.0
        self.losses.append((step, loss))
        self._bar.set_postfix_str(f"loss {loss:.3f}, {samples:.1f} samples/s, {tokens:.0f} supervised tokens/s")
        speed = {"samples_per_second": round(samples, 2), "supervised_tokens_per_second": round(tokens, 1)}
        speed["data_wait_share"] = round(waiting, 4)
        self._write("metrics.jsonl", {"step": step, "loss": loss, **speed, **values})

    def log_evaluation(self, step: int, sums: dict[str, tuple[float, float]], texts: list[dict[str, Any]]) -> None:
        """Write down the held-out loss, over all and by name, and the generated texts, and draw the curve anew.

        sums: of each validation set, its summed loss and number of supervised tokens."""
        eval_loss = sum(loss for loss, _ in sums.values()) / sum(tokens for _, tokens in sums.values())
        by_name = {f"eval_loss/{name}": loss / tokens for name, (loss, tokens) in sums.items()} if len(sums) > 1 else {}
        self.eval_losses.append((step, eval_loss))
        self._write("metrics.jsonl", {"step": step, "eval_loss": eval_loss, **by_name})
        for text in texts:
            self._write("samples.jsonl", {"step": step, **text})
        if self.active:
            tqdm.write(f"step {step}: held-out loss {eval_loss:.4f}")
            for text in texts:
                tqdm.write(f"  {text['image']}: {text['generated']!r} (a person wrote {text['written']!r})")
            draw_curve(self.folder / "curve.png", self.losses, self.eval_losses)

    def pause(self, seconds: float) -> None:
        """Leave so many seconds, spent on something else than training, out of the speed."""
        self._since += seconds

    def close(self, report: Report) -> None:
        """Write data_report.json: all that was skipped or mended, before and in training."""
        self._bar.close()
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
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


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
