"""The model card, made from the files of a run. Text that a person writes outside its marked blocks is kept."""

import io
import json
import os
import re
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from PIL import Image

from ..data.files import read_object
from ..data.report import plain
from ..data.sample import File
from ..data.source import split_source
from ..environment import requirements, without_secrets
from ..templates import render

BLOCK = re.compile(r"<!-- clip-phi:(\w+):[^>]*-->.*?<!-- clip-phi:end -->", re.S)
# From the card that transformers writes where there is none.
EMPTY_CARD = "This model card has been automatically generated"
# A path that is absolute or goes up, also behind "coco:" or "images=", but not the end of a URL.
PATH = re.compile(r"(?<![\w.~/\\])(?:~\w*(?=[/\\])|\.\.(?=[/\\])|[A-Za-z]:(?=[\\/]))?[/\\](?![/\\\s])[^\s,;'\"|]+")
KIND = r"(?:file|coco|karpathy|llava|vqa|dataset):"  # what precedes a path, and is not the scheme of a URL
NUM_SAMPLES = 4
IMAGE_SIZE = 256  # pixels, of the longer side
# hyperparameters: the training options that the card shows, in this order. hub_datasets: data sets on the Hub, by the
# names of their official files.
TABLES: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


@dataclass
class Run:
    """The files of a run, as far as they exist."""

    folder: Path
    config: dict[str, Any]
    stages: list[dict[str, Any]] = field(default_factory=list)  # run.json of each stage, in order
    report: dict[str, Any] | None = None  # data_report.json
    samples: list[dict[str, Any]] = field(default_factory=list)  # of the last evaluation during training
    evaluations: list[dict[str, Any]] = field(default_factory=list)  # by clip-phi evaluate

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Raises ValueError if a file is not a json object."""
        run = cls(folder, read_object(folder / "config.json"))
        at, seen = folder, set()
        while (at / "run.json").is_file() and at not in seen:  # stage 2 started from the folder of stage 1
            seen.add(at)
            stage = read_object(at / "run.json")
            run.stages.insert(0, stage)
            at = Path(stage["options"].get("init_from") or "/nowhere")
        if (folder / "data_report.json").is_file():
            run.report = read_object(folder / "data_report.json")
        if (samples := folder / "samples.jsonl").is_file():
            texts = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines() if line.strip()]
            run.samples = [text for text in texts if text["step"] == texts[-1]["step"]][:NUM_SAMPLES]
        results = sorted((folder / "evaluation").glob("*.json"))
        found = [read_object(each) for each in results if not each.name.endswith(".results.json")]
        run.evaluations = [each for each in found if "task" in each and "score" in each]
        return run

    def sources(self) -> list[tuple[int, str, str]]:
        """(stage, kind, path) of all training data."""
        pairs = [(stage["options"]["stage"], text) for stage in self.stages for text in stage["options"]["data"]]
        parts = [(stage, *split_source(text)) for stage, text in pairs]
        return [(stage, kind or "dataset", path) for stage, kind, path, _ in parts]


def scrub(text: str) -> str:
    """The text with only the last part of each path that is absolute or goes up, and without access tokens."""
    text = re.sub(rf"(?<!\w)({KIND}|(?<![:/])(?=//))/{{2,}}(?=[^/\s])", r"\1/", without_secrets(text))
    return PATH.sub(lambda found: re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], text)


def portable(word: str) -> str:
    """A word of a command line, or data as --data names it, without access tokens. Paths are relative to the working
    folder. Of paths elsewhere only the last part is left, whatever characters they have."""

    def value(text: str) -> str:
        path = os.path.expanduser(re.sub("^file:(//)?", "", text))
        may_leave = re.match(r"[/\\~]|[A-Za-z]:[/\\]", path) or ".." in re.split(r"[/\\]", path)
        if not may_leave or re.match(r"[a-z][a-z0-9+.-]*://", path):
            return scrub(text)
        relative = os.path.relpath(path)
        is_here = not (relative.startswith("..") or path[1:2] == ":")
        return relative if is_here else re.split(r"[/\\]", path.rstrip("/\\"))[-1]

    pieces = re.split(rf"(^--\w+=(?:{KIND})?|^{KIND}|[,:][a-z_]+=)", without_secrets(word))
    return "".join(piece if place % 2 else value(piece) for place, piece in enumerate(pieces))


def card_images(run: Run) -> dict[str, bytes]:
    """Files that the card shows, by name: the loss curve, and the images of the run's samples as small JPEGs.

    They are encoded again, so that a camera's metadata (places, names) is not in them."""
    curve = run.folder / "curve.png"
    files = {"curve.png": curve.read_bytes()} if curve.is_file() else {}
    for number, sample in enumerate(run.samples, start=1):
        try:
            image = Image.open(io.BytesIO(File(*sample["image"].split("!", 1)).read())).convert("RGB")
        except (OSError, KeyError, ValueError):  # moved since: the card shows its texts alone
            continue
        image.thumbnail((IMAGE_SIZE, IMAGE_SIZE))
        encoded = io.BytesIO()
        Image.frombytes("RGB", image.size, image.tobytes()).save(encoded, "JPEG", quality=85)
        files[f"samples/{number}.jpg"] = encoded.getvalue()
    return files


def make_card(
    run: Run, repo_id: str, revision: str, merged: bool, images: dict[str, bytes], licenses: dict[str, str | None]
) -> str:
    """The whole card, without absolute paths and access tokens.

    repo_id: user/name. revision: what the code in the card pins. merged: whether the repository contains all weights.
    images: of card_images. licenses: of each backbone, None if it states none."""
    needed = requirements()
    names = ["torch", "transformers", "pillow", *(["peft"] if run.config.get("adapter") and not merged else [])]
    packages = run.stages[-1]["environment"]["packages"] if run.stages else {}
    values = {
        **{"run": run, "repo_id": repo_id, "revision": revision, "merged": merged, "images": images},
        **{"licenses": licenses, "tables": TABLES, "hub_dataset": _hub_dataset, "portable": portable},
        "duration": _duration,
        "requirements": " ".join(f'"{needed[name]}"' for name in names),
        "versions": [f"{name} {packages[name]}" for name in (*names[:2], "accelerate", "peft") if name in packages],
        "show": lambda value: "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value),
        "cell": lambda text: " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;"),
    }
    body = plain(scrub("".join(render("card.md", **values))))
    return f"---\n{_metadata(run, repo_id, licenses).to_yaml()}\n---\n\n{body}"


def merge_cards(old: str | None, new: str) -> str:
    """Update the card of a repository with a new one.

    The marked blocks are replaced, and all other text stays. A removed block stays removed. A card without marks gets
    all blocks at its end. In the front matter, library, pipeline, backbones and results are set, lists are united, and
    all other values stay."""
    if old is None or EMPTY_CARD in old:
        return new
    ours = {found[1]: found[0] for found in BLOCK.finditer(new)}
    head, body = _split(old)
    if BLOCK.search(body):
        body = BLOCK.sub(lambda found: ours.get(found[1], found[0]), body)
    else:
        body = body.rstrip("\n") + "\n\n" + "\n\n".join(ours.values()) + "\n"
    theirs, mine = (yaml.safe_load(text) or {} for text in (head, _split(new)[0]))
    both = dict(theirs)
    for name, value in mine.items():
        if name == "model-index":
            before = [result for model in theirs.get(name) or [] for result in model.get("results", [])]
            measured = [result["dataset"] for result in value[0]["results"]]
            kept = [result for result in before if result.get("dataset") not in measured]  # on other data sets
            both[name] = [{**value[0], "results": value[0]["results"] + kept}]
        elif name in ("library_name", "pipeline_tag", "base_model"):
            both[name] = value
        elif isinstance(value, list):
            before = theirs.get(name) or []
            before = before if isinstance(before, list) else [before]
            both[name] = before + [item for item in value if item not in before]
        else:
            both.setdefault(name, value)
    if both != theirs:  # otherwise its spelling and comments stay
        head = yaml.safe_dump(both, sort_keys=False, allow_unicode=True).rstrip("\n")
    return f"---\n{head}\n---\n{body}"


def _split(card: str) -> tuple[str, str]:
    """(front matter, body)"""
    found = re.match(r"\s*---\r?\n(.*?)\r?\n?---[ \t]*\r?\n", card, re.S)
    return (found[1], card[found.end() :]) if found else ("", "\n" + card)


def _metadata(run: Run, repo_id: str, licenses: dict[str, str | None]) -> ModelCardData:
    license = next(iter(licenses.values())) if len(set(licenses.values())) == 1 else None
    datasets = dict.fromkeys(found for _, kind, path in run.sources() if (found := _hub_dataset(kind, path)))
    scores = (("score", ""), ("blind", " without the image"), ("shuffled", " with another's image"))
    results = [
        EvalResult(
            task_type="image-text-to-text",
            task_name={"vqa": "Visual question answering", "captions": "Image captioning"}.get(each["task"]),
            dataset_type=each["task"],
            dataset_name=scrub(each["data"]["source"]),
            dataset_args={key: each["data"][key] for key in ("images", "samples", "fingerprint")},
            metric_type=each["metric"],
            metric_name=each["metric"] + suffix,
            metric_value=round(each[key], 6),
        )
        for each in run.evaluations
        for key, suffix in scores
        if each.get(key) is not None
    ]
    more = {} if license else {"license_name": "see-card", "license_link": "README.md"}
    more |= {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    return ModelCardData(
        license=license or "other",
        language="en",
        base_model=list(licenses) or None,
        datasets=list(datasets) or None,
        tags=["clip-phi", "custom_code", "vision-language", "llava"],
        model_name=repo_id.split("/")[-1],
        eval_results=results or None,
        **more,
    )


def _hub_dataset(kind: str, path: str) -> str | None:
    is_hub_id = kind == "dataset" and re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).exists()
    return path if is_hub_id else TABLES["hub_datasets"].get(Path(path).name)


def _duration(stage: dict[str, Any]) -> str:
    if "ended" not in stage:
        return "not finished"
    began, ended = (datetime.strptime(stage[name], "%Y-%m-%dT%H:%M:%S%z") for name in ("began", "ended"))
    return str(ended - began)  # hours:minutes:seconds
