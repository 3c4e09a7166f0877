"""What an evaluation writes: its result, every sample, a page and a sheet of images. And two results compared."""

import hashlib
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..batching.images import load_image
from ..environment import describe_environment
from ..templates import render
from ..templates.sheet import draw_images, save_png
from .bootstrap import by_group, margin_interval
from .evaluate import EvalResult
from .tasks import EvalSet

SHOWN = 8  # samples of each kind: best, worst, random
THUMBNAIL = 224  # pixels
NAMES = {"score": "model", "blind": "blind (no image)", "shuffled": "shuffled images"}
# What decides what a checkpoint says; its card, its logs and its results do not.
WEIGHTS = ("*.safetensors", "config.json", "generation_config.json", "tokenizer*.json", "*processor*.json", "*.jinja")


def checkpoint_sha256(folder: Path) -> str:
    """Of the files of a checkpoint that decide what it says: weights, adapter, configs, tokenizer."""
    digest = hashlib.sha256()
    files = {path for where in (folder, folder / "adapter") for name in WEIGHTS for path in where.glob(name)}
    files |= set((folder / "adapter").glob("*.json"))
    for path in sorted(files):
        digest.update(f"{path.relative_to(folder)}\0".encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def portable(text: str) -> str:
    """A text without the folders of this machine: paths below the working folder relative to it, of others the name."""
    text = text.replace(f"{os.getcwd()}{os.sep}", "")
    return re.sub(r"(?<![\w.:/-])(?:/[^/\s,:=]+)*/(?=[^/\s,:=])", "", text)


def environment() -> dict[str, Any]:
    """Versions and machine, without what names its folders."""
    found = describe_environment()
    return {name: found[name] for name in ("python", "packages", "platform", "cpu", "cores", "devices", "git_commit")}


def write(outcome: EvalResult, eval_set: EvalSet, folder: Path, result_only: Path | None = None) -> list[Path]:
    """Write TASK.json, TASK.samples.jsonl, TASK.html and TASK.png into the folder.

    Args:
        outcome: the result and its samples.
        eval_set: has the images.
        folder: created if it is missing.
        result_only: a file for a second copy of TASK.json.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    task = outcome.result["task"]
    files = [folder / f"{task}{ending}" for ending in (".json", ".samples.jsonl", ".html", ".png")]
    text = json.dumps(outcome.result, indent=2, ensure_ascii=False) + "\n"
    _write(files[0], text)
    _write(files[1], "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in outcome.samples))
    chosen = choose(outcome)
    sources = dict(zip(eval_set.digests, eval_set.images, strict=True))
    shown = {row["image_digest"] for rows in chosen.values() for row in rows}
    images = {digest: _thumbnail(sources[digest]) for digest in shown}
    _write(files[2], page(outcome.result, chosen, images))
    draw_sheet(files[3], outcome.result, chosen, images)
    if result_only is not None:
        result_only.parent.mkdir(parents=True, exist_ok=True)
        _write(result_only, text)
        files.append(result_only)
    return files


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def choose(outcome: EvalResult) -> dict[str, list[dict[str, Any]]]:
    """The best, the worst, and random samples, each once; chance decides between equals. By the result's seed."""
    rng = random.Random(outcome.result["seed"])
    rows = rng.sample(outcome.samples, len(outcome.samples))
    upside = -1 if outcome.result.get("lower_is_better") else 1
    ranked = sorted(rows[SHOWN:], key=lambda row: upside * row["score"])
    worst = ranked[: min(SHOWN, len(ranked) // 2)]
    best = ranked[len(worst) :][::-1][:SHOWN]
    return {"random": rows[:SHOWN], "best": best, "worst": worst}


def _thumbnail(source: Any) -> Image.Image:
    image = load_image(source)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image


def summary(result: dict[str, Any]) -> list[list[str]]:
    """Rows of the table of a result, the first its header."""
    order = sorted(result["metrics"], key=lambda name: name != result["metric"])
    rows = [["", *NAMES.values()]]
    rows += [[name, *(f"{result['metrics'][name][key]:.4f}" for key in NAMES)] for name in order]
    low, high = result["margin_ci95"]
    rows.append([f"margin of {result['metric']}", f"{result['margin']:+.4f}", f"95 %: {low:+.4f} to {high:+.4f}", ""])
    if "question_only" in result:
        rows.append(["best guess from the question", f"{result['question_only']['score']:.4f}", "", ""])
    if "answers" in result:
        for kind in ("empty", "cut", "never_ended"):
            counts = [f"{result['answers'][key][kind]:,}" for key in NAMES]
            rows.append([f"answers {kind.replace('_', ' ')}", *counts])
    return rows


def format_result(result: dict[str, Any]) -> str:
    """For the terminal."""
    data = result["data"]
    head = f"{result['task']} on {data['images']:,} images, {data['samples']:,} samples"
    rows = summary(result)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    verdict = [] if result["margin_ci95"][0] > 0 else [no_margin(result)]
    return "\n".join([head, *lines, *verdict])


def no_margin(result: dict[str, Any]) -> str:
    """The warning for a result whose margin may be 0."""
    return (
        f"NO MARGIN: the model reaches this {result['metric']} without the image, or with the image of another sample"
    )


def page(result: dict[str, Any], chosen: dict[str, list[dict[str, Any]]], images: dict[str, Image.Image]) -> str:
    """One HTML page that needs no other file. chosen: samples by kind. images: small ones, by digest."""
    tables = {}
    for name, rows in result.get("tables", {}).items():
        cells = [[key, f"{row['samples']:,}", f"{row['score']:.4f}"] for key, row in rows.items()]
        title = name.replace("_", " ")
        tables[title] = [[title.removeprefix("by "), "samples", result["metric"]], *cells]
    settings = {key: value for key, value in result.items() if key not in ("metrics", "tables", "answers")}
    values = {
        "title": f"{result['task']}: {result.get('checkpoint', {}).get('name', 'a model')}",
        "warning": no_margin(result) if result["margin_ci95"][0] <= 0 else None,
        "summary": summary(result),
        "tables": tables,
        "chosen": chosen,
        "images": images,
        "columns": NAMES,
        "settings": json.dumps(settings, indent=2, ensure_ascii=False),
    }
    return "".join(render("evaluation.html", **values))


def draw_sheet(
    path: Path, result: dict[str, Any], chosen: dict[str, list[dict[str, Any]]], images: dict[str, Image.Image]
) -> None:
    """The chosen samples as one PNG, a band for each kind."""
    from matplotlib.figure import Figure

    bands = {kind: rows for kind, rows in chosen.items() if rows}
    heights = [-(-len(rows) // 4) for rows in bands.values()]
    figure = Figure(figsize=(12.8, 3.4 * sum(heights) + 0.6), layout="constrained")
    figure.suptitle(
        f"{result['task']}: {result['metric']} {result['score']:.3f}, blind {result['blind']:.3f}, "
        f"shuffled {result['shuffled']:.3f}"
    )
    panels: Any = np.atleast_1d(np.asarray(figure.subfigures(len(bands), 1, height_ratios=heights), dtype=object))
    for panel, (kind, rows) in zip(panels, bands.items(), strict=True):
        panel.suptitle(kind, x=0.01, ha="left", fontsize=10, weight="bold")
        texts = [
            "\n".join([*(row[key] for key in ("question", "answer") if key in row), f"(score {row['score']:.2f})"])
            for row in rows
        ]
        draw_images(panel, [images[row["image_digest"]] for row in rows], texts)
    save_png(figure, path, dpi=80)


# Comparing two


def find_result(place: str, task: str | None) -> Path:
    """The result of an evaluation: a json file, or the one in the evaluation folder of a checkpoint.

    Raises ValueError if there is none, or more than one and no task says which."""
    path = Path(place)
    if path.is_file():
        return path
    for folder in (path / "evaluation", path):
        found = sorted(each for each in folder.glob("*.json") if Path(f"{each.with_suffix('')}.samples.jsonl").exists())
        if task is not None:
            found = [each for each in found if each.stem == task]
        if len(found) > 1:
            raise ValueError(f"{place} has several results ({', '.join(each.stem for each in found)}): give --task")
        if found:
            return found[0]
    raise ValueError(f"no result {f'of {task} ' if task else ''}in {place}: run clip-phi evaluate first")


def read_result(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A result and its samples. Raises ValueError if they are not there, or not of an evaluation."""
    samples = Path(f"{path.with_suffix('')}.samples.jsonl")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
        result["metric"], result["data"]["fingerprint"], rows[0]["score"]
    except OSError as error:
        raise ValueError(f"{samples} is missing: the samples are compared one by one ({error.strerror})") from error
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is no result of clip-phi evaluate: {error}") from error
    return result, rows


def compare(first: Path, second: Path, seed: int = 0) -> dict[str, Any]:
    """For json: how much better the first is, sample by sample, with a paired bootstrap over the images.

    Raises ValueError if they are of other tasks or data, which cannot be compared."""
    (a, a_rows), (b, b_rows) = read_result(first), read_result(second)
    for what, one, other in (
        ("tasks", a["task"], b["task"]),
        ("metrics", a["metric"], b["metric"]),
        ("data", a["data"]["fingerprint"], b["data"]["fingerprint"]),
        ("numbers of samples", len(a_rows), len(b_rows)),
    ):
        if one != other:
            raise ValueError(f"{first} and {second} are of different {what} ({one} and {other}): nothing to compare")
    places: dict[str, int] = {}
    groups = np.array([places.setdefault(row["image_digest"], len(places)) for row in a_rows])
    scores = np.array([[one["score"], other["score"]] for one, other in zip(a_rows, b_rows, strict=True)])
    weights = np.array([row.get("tokens", 1) for row in a_rows], dtype=np.float64)
    upside = -1 if a.get("lower_is_better") else 1
    sums, _ = by_group(upside * scores * weights[:, None], groups)
    counts = np.bincount(groups, weights=weights)
    low, high = margin_interval(sums, counts, seed)
    better = upside * (scores[:, 0] - scores[:, 1])
    return {
        "task": a["task"],
        "metric": a["metric"],
        "a": _name(a, first),
        "b": _name(b, second),
        "score_a": a["score"],
        "score_b": b["score"],
        "difference": upside * (a["score"] - b["score"]),
        "difference_ci95": [low, high],
        "samples": {
            "a_better": int((better > 0).sum()),
            "equal": int((better == 0).sum()),
            "b_better": int((better < 0).sum()),
        },
        "same_prompt": a["prompt"] == b["prompt"],
        "seed": seed,
    }


def _name(result: dict[str, Any], path: Path) -> str:
    return result.get("checkpoint", {}).get("name") or portable(str(path))


def format_comparison(found: dict[str, Any]) -> str:
    low, high = found["difference_ci95"]
    counts = found["samples"]
    lines = [
        f"{found['task']}, {found['metric']}",
        f"  A  {found['score_a']:.4f}  {found['a']}",
        f"  B  {found['score_b']:.4f}  {found['b']}",
        f"  A is better by {found['difference']:+.4f}, 95 %: {low:+.4f} to {high:+.4f}",
        f"  A better in {counts['a_better']:,} samples, equal in {counts['equal']:,}, B better in "
        f"{counts['b_better']:,}",
    ]
    if low <= 0 <= high:
        lines.append("  the interval holds 0: these data do not tell which is better")
    if not found["same_prompt"]:
        lines.append("  they were asked with different prompts")
    return "\n".join(lines)
