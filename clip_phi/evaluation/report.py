"""What an evaluation writes: its result, every sample, a page and a sheet of images. And two results compared."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..batching.images import load_beside
from ..data.files import replace_file
from ..data.report import plain, plain_json
from ..hub.card import portable
from ..templates import render
from ..templates.sheet import draw_images, save_png
from .bootstrap import by_group, margin_interval
from .evaluate import EvalResult
from .tasks import OFFICIAL, EvalSet

SHOWN = 8  # samples of each kind: best, worst, random
THUMBNAIL = 224  # pixels
NAMES = {"score": "model", "blind": "blind (no image)", "shuffled": "shuffled images"}
# The files that a model's answers depend on.
WEIGHTS = ["*.safetensors", "config.json", "generation_config.json", "tokenizer*.json", "*processor*.json", "*.jinja"]
WEIGHTS += ["adapter/*.safetensors", "adapter/*.json"]


def model_sha256(folder: Path) -> str:
    """Of the files that a model's answers depend on: weights, adapter, configs, tokenizer."""
    digest = hashlib.sha256()
    for path in sorted({path for name in WEIGHTS for path in folder.glob(name)}):
        with open(path, "rb") as file:
            digest.update(f"{path.relative_to(folder)}\0".encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def write(evaluation: EvalResult, eval_set: EvalSet, folder: Path, extra: Path | None = None) -> list[Path]:
    """Write TASK.json, TASK.samples.jsonl, TASK.html and TASK.png into the folder, and the json to `extra` as well;
    and TASK.results.json (or jsonl), if the task has official results. Without scores these alone.

    Returns the files."""
    result, samples, official = evaluation
    task, record = result["task"], plain_json(result, indent=2) + "\n"
    texts = {extra: record} if extra else {}
    if task in OFFICIAL:
        path, lines = folder / f"{task}.results.{OFFICIAL[task]}", [plain_json(row) for row in official]
        path.unlink(missing_ok=True)  # that of other data
        if official:
            texts[path] = "[" + ",\n".join(lines) + "]\n" if path.suffix == ".json" else "\n".join([*lines, ""])
    sheets = [folder / f"{task}.png"] if samples else []
    if samples:
        chosen = choose(evaluation)
        shown = {sample["image_digest"] for group in chosen.values() for sample in group}
        images = {}
        for digest, source in zip(eval_set.digests, eval_set.images, strict=True):
            if digest in shown:
                images[digest] = load_beside(source)
                images[digest].thumbnail((THUMBNAIL, THUMBNAIL))
        texts[folder / f"{task}.json"] = record
        texts[folder / f"{task}.samples.jsonl"] = "".join(plain_json(sample) + "\n" for sample in samples)
        texts[folder / f"{task}.html"] = plain(page(result, chosen, images))
        folder.mkdir(parents=True, exist_ok=True)
        draw_sheet(sheets[0], result, chosen, images)
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text)
    return [*texts, *sheets]


def choose(evaluation: EvalResult) -> dict[str, list[dict[str, Any]]]:
    """The best, the worst, and random samples, each once, by the result's seed."""
    rng = random.Random(evaluation.result["seed"])
    samples = rng.sample(evaluation.samples, len(evaluation.samples))  # equal scores: a random order
    upside = -1 if evaluation.result.get("lower_is_better") else 1
    ranked = sorted(samples[SHOWN:], key=lambda sample: upside * sample["score"])
    worst = ranked[: min(SHOWN, len(ranked) // 2)]
    return {"random": samples[:SHOWN], "best": ranked[len(worst) :][::-1][:SHOWN], "worst": worst}


def summary(result: dict[str, Any]) -> list[list[str]]:
    """Rows of the table of a result, the first its header."""
    return [row.split("\t") for row in "".join(render("result.txt", result=result, names=NAMES)).splitlines()]


def format_result(result: dict[str, Any]) -> str:
    """For the terminal."""
    data = result["data"]
    head = f"{result['task']} on {data['images']:,} images"
    if "score" not in result:
        return f"{head}: {data['without_reference']:,} samples without a reference: no score"
    rows = summary(result)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(filter(None, [f"{head}, {data['samples']:,} samples", *lines, no_margin(result)]))


def no_margin(result: dict[str, Any]) -> str | None:
    """The warning for a result whose margin may be 0."""
    if result["margin_ci95"][0] > 0:
        return None
    return f"NO MARGIN: the model reaches this {result['metric']} without the image, or with another image"


def page(result: dict[str, Any], chosen: dict[str, list[dict[str, Any]]], images: dict[str, Image.Image]) -> str:
    """One HTML page that needs no other file. chosen: samples by kind. images: small ones, by digest."""
    settings = {key: value for key, value in result.items() if key not in ("metrics", "tables", "answers")}
    values: dict[str, Any] = {"result": result, "chosen": chosen, "images": images, "columns": NAMES}
    values |= {"warning": no_margin(result), "summary": summary(result), "settings": plain_json(settings, indent=2)}
    values["title"] = f"{result['task']}: {result.get('checkpoint', {}).get('name', 'a model')}"
    return "".join(render("evaluation.html", **values))


def draw_sheet(
    path: Path, result: dict[str, Any], chosen: dict[str, list[dict[str, Any]]], images: dict[str, Image.Image]
) -> None:
    """The chosen samples as one PNG, a band for each kind."""
    from matplotlib.figure import Figure

    bands = {kind: samples for kind, samples in chosen.items() if samples}
    heights = [-(-len(samples) // 4) for samples in bands.values()]
    figure = Figure(figsize=(12.8, 3.4 * sum(heights) + 0.6), layout="constrained")
    controls = f"blind {result['blind']:.3f}, shuffled {result['shuffled']:.3f}"
    figure.suptitle(f"{result['task']}: {result['metric']} {result['score']:.3f}, {controls}")
    panels: Any = np.atleast_1d(np.asarray(figure.subfigures(len(bands), 1, height_ratios=heights), dtype=object))
    for panel, (kind, samples) in zip(panels, bands.items(), strict=True):
        panel.suptitle(kind, x=0.01, ha="left", fontsize=10, weight="bold")
        texts = ["\n".join(filter(None, (each.get("question"), each.get("answer")))) for each in samples]
        texts = [f"{text}\n(score {each['score']:.2f})" for text, each in zip(texts, samples, strict=True)]
        draw_images(panel, [images[each["image_digest"]] for each in samples], texts)
    save_png(figure, path, dpi=80)


# Comparing two results


def find_result(place: str, task: str | None) -> Path:
    """The result of an evaluation: a json file, or the one in the evaluation folder of a model.

    Raises ValueError if there is none, or if there are several and no task is given."""
    path = Path(place)
    if path.is_file():
        return path
    for folder in (path / "evaluation", path):
        found = sorted(folder.glob(f"{task or '*'}.json"))
        found = [each for each in found if each.with_suffix(".samples.jsonl").exists()]
        if len(found) > 1:
            raise ValueError(f"{place} has several results ({', '.join(each.stem for each in found)}): give --task")
        if found:
            return found[0]
    raise ValueError(f"no result {f'of {task} ' if task else ''}in {place}: run clip-phi evaluate first")


def read_result(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A result and its samples. Raises ValueError if they do not exist, or are not of an evaluation."""
    samples = path.with_suffix(".samples.jsonl")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
        result["metric"], result["data"]["fingerprint"], rows[0]["score"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} and {samples.name} are no result of clip-phi evaluate: {error}") from error
    return result, rows


def compare(first: Path, second: Path, seed: int = 0) -> dict[str, Any]:
    """How much better the first result is, for json: sample by sample, with a paired bootstrap over the images.

    Raises ValueError if they are of different tasks or data."""
    (a, a_rows), (b, b_rows) = read_result(first), read_result(second)
    for what in ("task", "data"):
        one, other = (f"{each[what]['fingerprint'] if what == 'data' else each[what]}" for each in (a, b))
        if one != other:
            raise ValueError(f"{first} and {second} are of different {what} ({one} and {other}) and cannot be compared")
    upside = -1 if a.get("lower_is_better") else 1
    scores = upside * np.array([[one["score"], other["score"]] for one, other in zip(a_rows, b_rows, strict=True)])
    weights = np.array([row.get("tokens", 1) for row in a_rows], dtype=np.float64)
    sums, counts = by_group(scores * weights[:, None], [row["image_digest"] for row in a_rows], weights)
    better = scores[:, 0] - scores[:, 1]
    samples = {"a_better": better > 0, "equal": better == 0, "b_better": better < 0}
    return {
        "task": a["task"],
        "metric": a["metric"],
        "a": a.get("checkpoint", {}).get("name") or portable(str(first)),
        "b": b.get("checkpoint", {}).get("name") or portable(str(second)),
        "score_a": a["score"],
        "score_b": b["score"],
        "difference": upside * (a["score"] - b["score"]),
        "difference_ci95": list(margin_interval(sums, counts, seed)),
        "samples": {name: int(found.sum()) for name, found in samples.items()},
        "same_prompt": a["prompt"] == b["prompt"],
        "seed": seed,
    }


def format_comparison(found: dict[str, Any]) -> str:
    """For the terminal."""
    sign = -1 if found["difference"] < 0 else 1
    low, high = sorted(sign * bound for bound in found["difference_ci95"])
    values = {"difference": sign * found["difference"], "low": low, "high": high, "better": "B" if sign < 0 else "A"}
    return "".join(render("comparison.txt", **found | values)).rstrip("\n")
