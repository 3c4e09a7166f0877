"""How sure an answer is: its likelihood, what the image adds to it, and a calibrated confidence.

The likelihood is the product of the probabilities of all its tokens and the end token: the model's probability of
exactly this answer. Their geometric mean is no probability of anything, so it has no calibration. A long answer has
many wordings, and so a small likelihood. The gain is the likelihood minus that of the same answer without the image."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils.hub import cached_file

from ..data.files import read_json, replace_file
from ..data.report import plain_json

FILE = "confidence.json"  # beside a model's weights
ABSTENTION = "I can't tell from the picture"
BINS = 15  # of equal width
COVERAGES = (1.0, 0.9, 0.8, 0.5)
ITERATIONS = 5000


def logit(likelihood: Any) -> Any:
    clipped = np.clip(likelihood, 1e-6, 1 - 1e-6)
    return np.log(clipped / (1 - clipped))


def scale(values: Any, slope: float, bias: float) -> Any:
    """The confidence for logits of likelihoods. 1 / slope is a temperature (arXiv 1706.04599), the bias Platt's."""
    return 1 / (1 + np.exp(-slope * values - bias))


def fit_scaling(values: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """The likeliest slope and bias for scale(). right: scores of the answers in 0 to 1, smoothed as in Platt 1999, so
    that both are finite. Each step takes the upper bound of the Hessian, and so none overshoots (Boehning 1992)."""
    design, line = np.stack([values, np.ones_like(values)]), np.array([1.0, 0.0])
    wrong = len(right) - right.sum()
    targets = right * (1 - 1 / (right.sum() + 2)) + (1 - right) / (wrong + 2)
    step = 4 * np.linalg.pinv(design @ design.T) @ design
    for _ in range(ITERATIONS):
        line -= step @ (scale(values, *line) - targets)
    return dict(zip(("slope", "bias"), line.tolist(), strict=True))


def calibration(confidence: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """The expected calibration error with BINS bins (arXiv 1706.04599, equation 3), and the Brier score."""
    gaps = np.bincount(np.maximum(np.ceil(confidence * BINS).astype(int) - 1, 0), weights=confidence - right)
    return {"ece": float(np.abs(gaps).sum() / len(right)), "brier": float(np.mean((confidence - right) ** 2))}


def risk_coverage(sureness: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """Accuracy of the surest answers by their share of all, and the area under the curve of risk (1 - accuracy) against
    that share (arXiv 1805.08206). Answers that are equally sure share their scores."""
    groups = np.unique(-sureness, return_inverse=True)[1]
    shared = (np.bincount(groups, weights=right) / np.bincount(groups))[groups]
    accuracy = np.cumsum(shared[np.argsort(groups)]) / np.arange(1, len(right) + 1)
    at = {f"{share:.1f}": float(accuracy[math.ceil(share * len(right)) - 1]) for share in COVERAGES}
    return {"accuracy_at_coverage": at, "risk_coverage_area": float(1 - accuracy.mean())}


def assess(likelihoods: np.ndarray, gains: np.ndarray, right: np.ndarray, digests: Sequence[str]) -> dict[str, Any]:
    """For a result. Half of the images, by their digests, fit the scaling; all figures are of the answers about the
    others. Empty if a half is. right: the score of each answer in 0 to 1."""
    fit = np.array([int(digest[0], 16) % 2 == 0 for digest in digests])
    if fit.all() or not fit.any():
        return {}
    found: dict[str, Any] = {"answers": int((~fit).sum()), "fitted_on": int(fit.sum()), "bins": BINS}
    for name, sureness, values in (("likelihood", likelihoods, logit(likelihoods)), ("gain", gains, gains)):
        scaling = fit_scaling(values[fit], right[fit])
        found[name] = calibration(sureness[~fit], right[~fit]) if name == "likelihood" else {}
        found[name] |= risk_coverage(sureness[~fit], right[~fit])
        found[name]["scaled"] = calibration(scale(values[~fit], **scaling), right[~fit]) | scaling
    return found


def describe(found: dict[str, Any]) -> str:
    """Engine.confidence in one line, for people."""
    gain = "" if found["gain"] is None else f", {found['gain']:+.2f} by the image"
    confidence = "not calibrated" if found["confidence"] is None else f"confidence {found['confidence']:.2f}"
    return f"likelihood {found['likelihood']:.2g}{gain}; {confidence}"


def save_scaling(folder: Path, model: Any, result: dict[str, Any]) -> None:
    """Keep the scaling of a result's likelihoods beside the weights, where load_scaling finds it."""
    if not (found := result.get("confidence")):
        raise ValueError("--calibrate needs answers about more images: half of them fit the scaling")
    if (slope := found["likelihood"]["scaled"]["slope"]) <= 0:  # it would call the unlikely answers sure
        why = f"in {found['fitted_on']:,} answers the likelier ones are no better (slope {slope:.2g}): give more data"
        raise ValueError(f"--calibrate: nothing is kept, since {why}")
    about = {"weights": _weights_hash(model), "task": result["task"], "data": result["data"], **found}
    replace_file(folder / FILE, plain_json(found["likelihood"]["scaled"] | about, indent=2) + "\n")


def load_scaling(model: str, weights: Any) -> dict[str, float] | None:
    """The slope and bias kept with a model, a folder or Hub id; None without them, or if they are of other weights."""
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    path = cached_file(model, FILE, **quiet)
    found = {} if path is None else read_json(Path(path))
    return {name: found[name] for name in ("slope", "bias")} if found.get("weights") == _weights_hash(weights) else None


def _weights_hash(model: Any) -> str:
    """Of the projector, which every training changes, in bfloat16: a delta and its merged model have the same."""
    tensors = model.model.projector.state_dict().values()
    data = b"".join(tensor.bfloat16().view(torch.int16).cpu().numpy().tobytes() for tensor in tensors)
    return hashlib.blake2b(data, digest_size=16).hexdigest()
