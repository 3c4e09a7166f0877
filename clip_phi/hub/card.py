"""The model card: what a run left behind, told in marked blocks between which a person's own text stands untouched."""

import hashlib
import io
import json
import re
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import Image

from ..data.sample import File
from ..environment import without_secrets

MARK = "<!-- clip-phi:{}: what stands between these marks is written anew by each push -->"
END = "<!-- clip-phi:end -->"
BLOCK = re.compile(r"<!-- clip-phi:(\w+):[^>]*-->.*?<!-- clip-phi:end -->", re.S)
# What transformers writes where there is no card: nobody's words.
EMPTY_CARD = "This model card has been automatically generated"
# An absolute path, also behind "coco:" or "images=", but not the end of a URL.
PATH = re.compile(r"(?<![\w.~/\\])(?:~|[A-Za-z]:(?=[\\/]))?[/\\](?![/\\\s])[^\s,;'\"|]+")
NUM_PICTURES = 4
PICTURE_SIZE = 256  # pixels, of the longer side
# The options of a stage that say what was learnt, in the order of the card.
HYPERPARAMETERS = (
    *("optim", "learning_rate", "lora_learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay"),
    *("max_grad_norm", "num_train_epochs", "max_steps", "per_device_train_batch_size", "max_tokens_per_batch"),
    *("gradient_accumulation_steps", "captions_per_image", "max_length", "lora_r", "lora_alpha", "lora_dropout"),
    *("lora_targets", "tune_decoder", "quantization", "seed"),
)
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16"}
# What is known of data sets by the names of their official files.
HUB_DATASETS = {"llava_instruct_150k.json": "liuhaotian/LLaVA-Instruct-150K"}
DATA_LICENSES = {
    "coco": "COCO's own annotations are CC BY 4.0, its images have the licenses that their photographers chose",
    "karpathy": "COCO's own annotations are CC BY 4.0, its images have the licenses that their photographers chose",
    "llava": "LLaVA-Instruct-150K itself is CC BY 4.0 and was made with GPT-4, so that OpenAI's terms of use apply",
    "vqa": "VQA's own questions and answers are CC BY 4.0, its images are COCO's",
    "dataset": "its license is on its own page",
}


@dataclass
class Run:
    """What a run left in its folder. stages: the run.json of each stage, the first one first, as far as they are
    there. evaluations: what `clip-phi evaluate` wrote. Raises ValueError if a file is not what it should be."""

    folder: Path
    config: dict[str, Any]
    stages: list[dict[str, Any]] = field(default_factory=list)
    report: dict[str, Any] | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> "Run":
        run = cls(folder, _read_json(folder / "config.json"))
        at, seen = folder, set()
        while (at / "run.json").is_file() and at not in seen:  # stage 2 began from the folder of stage 1
            seen.add(at)
            stage = _read_json(at / "run.json")
            run.stages.insert(0, stage)
            at = Path(stage["options"].get("init_from") or "/nowhere")
        if (folder / "data_report.json").is_file():
            run.report = _read_json(folder / "data_report.json")
        if (folder / "samples.jsonl").is_file():
            lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
            texts = [json.loads(line) for line in lines if line.strip()]
            run.samples = [text for text in texts if text["step"] == texts[-1]["step"]][:NUM_PICTURES]
        for path in sorted((folder / "evaluation").glob("*.json")):
            evaluation = _read_json(path)
            if "task" in evaluation and "score" in evaluation:
                run.evaluations.append(evaluation)
        return run

    def sources(self) -> list[tuple[int, str, str]]:
        """(stage, kind, path) of all training data."""
        pairs = [(stage["options"]["stage"], text) for stage in self.stages for text in stage["options"]["data"]]
        return [(stage, *_kind_and_path(text)) for stage, text in pairs]


def scrub(text: str) -> str:
    """The text with the last part alone of each absolute path, and without access tokens."""
    return PATH.sub(lambda found: re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], without_secrets(text))


def make_pictures(run: Run) -> dict[str, bytes]:
    """Files that the card shows: the curve, and the pictures that texts were generated for, small, as jpeg.

    They are encoded anew, so that what cameras write into files (places, names) stays behind."""
    files = {}
    if (run.folder / "curve.png").is_file():
        files["curve.png"] = (run.folder / "curve.png").read_bytes()
    for number, sample in enumerate(run.samples, start=1):
        try:
            image = Image.open(io.BytesIO(File(*sample["image"].split("!", 1)).read())).convert("RGB")
        except (OSError, KeyError, ValueError):  # moved since: its texts are shown without it
            continue
        image.thumbnail((PICTURE_SIZE, PICTURE_SIZE))
        encoded = io.BytesIO()
        Image.frombytes("RGB", image.size, image.tobytes()).save(encoded, "JPEG", quality=85)
        files[f"samples/{number}.jpg"] = encoded.getvalue()
    return files


def make_card(
    run: Run, repo_id: str, revision: str, merged: bool, pictures: dict[str, bytes], licenses: dict[str, str | None]
) -> str:
    """The whole card. revision: what the snippet is pinned to. licenses: of each backbone, None if it is not stated."""
    blocks = {
        "about": _about(run, repo_id, merged),
        "use": _usage(repo_id, revision, merged),
        "training": _training(run, licenses),
        "results": _results(run),
        "samples": _samples(run, pictures),
        "limits": LIMITS,
    }
    text = "\n\n".join(f"{MARK.format(name)}\n{scrub(body).strip()}\n{END}" for name, body in blocks.items())
    metadata = _metadata(run, repo_id, licenses)
    return f"---\n{metadata.to_yaml()}\n---\n\n{text}\n"


def merge_cards(old: str | None, new: str) -> str:
    """Our new card put into the one that is there: its marked blocks are replaced, all other text stays as it is.

    A block that a person took out stays out. A card without any mark gets our blocks behind its text. In the front
    matter ours are the facts of the weights (library, pipeline, backbones, results of our tasks); lists are united;
    everything else a person wrote there stays."""
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
            both[name] = _merge_results(theirs.get(name), value)
        elif name in ("library_name", "pipeline_tag", "base_model"):
            both[name] = value
        elif isinstance(value, list):
            before = theirs.get(name) or []
            before = before if isinstance(before, list) else [before]
            both[name] = before + [item for item in value if item not in before]
        else:
            both.setdefault(name, value)
    if both != theirs:  # else their own spelling and comments stay
        head = yaml.safe_dump(both, sort_keys=False, allow_unicode=True).rstrip("\n")
    return f"---\n{head}\n---\n{body}"


def _split(card: str) -> tuple[str, str]:
    """Front matter and body."""
    found = re.match(r"\s*---\r?\n(.*?)\r?\n?---[ \t]*\r?\n", card, re.S)
    return (found[1], card[found.end() :]) if found else ("", "\n" + card)


def _merge_results(old: list[dict] | None, new: list[dict]) -> list[dict]:
    """Results of data sets that we did not judge now stay."""
    results = new[0]["results"]
    mine = [result["dataset"] for result in results]
    kept = [result for model in old or [] for result in model.get("results", []) if result.get("dataset") not in mine]
    return [{**new[0], "results": results + kept}]


def _metadata(run: Run, repo_id: str, licenses: dict[str, str | None]) -> ModelCardData:
    known = set(licenses.values())
    license_of_all = known.pop() if len(known) == 1 and None not in known else None
    datasets = []
    for _, kind, path in run.sources():
        found = HUB_DATASETS.get(Path(path).name)
        found = (
            path if kind == "dataset" and re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).exists() else found
        )
        datasets += [found] if found and found not in datasets else []
    more: dict[str, Any] = {}
    if license_of_all is None:
        more = {"license_name": "see-card", "license_link": "README.md"}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        license=license_of_all or "other",
        language="en",
        base_model=list(licenses) or None,
        datasets=datasets or None,
        tags=["clip-phi", "custom_code", "vision-language", "llava"],
        model_name=repo_id.split("/")[-1],
        eval_results=[result for each in run.evaluations for result in _eval_results(each)] or None,
        **more,
    )


def _eval_results(evaluation: dict[str, Any]) -> list[EvalResult]:
    data = evaluation["data"]
    return [
        EvalResult(
            task_type="image-text-to-text",
            task_name={"vqa": "Visual question answering", "captions": "Image captioning"}.get(evaluation["task"]),
            dataset_type=evaluation["task"],
            dataset_name=scrub(data["source"]),
            dataset_args={key: data[key] for key in ("images", "samples", "fingerprint")},
            metric_type=evaluation["metric"],
            metric_name=evaluation["metric"] + suffix,
            metric_value=round(evaluation[key], 6),
        )
        for key, suffix in (("score", ""), ("blind", " without the image"), ("shuffled", " with another's image"))
        if evaluation.get(key) is not None
    ]


# ------------------------------------------------------------------ the blocks


def _about(run: Run, repo_id: str, merged: bool) -> str:
    config = run.config
    vision, text = config["vision_config"], config["text_config"]
    tower, decoder = (_link(config.get(f"{part}_backbone"), config.get(f"{part}_backbone_revision"))
                      for part in ("vision", "text"))  # fmt: skip
    projector = {"linear": "one linear layer", "mlp": "two linear layers with GELU between"}[config["projector_type"]]
    tuned = _tuned(run)
    parts = [
        f"# {repo_id.split('/')[-1]}",
        "A small vision-language model made with Clip-Phi: it looks at a picture and answers in text, by the method of "
        "LLaVA ([arXiv 2304.08485](https://arxiv.org/abs/2304.08485)).",
        "| part | what it is | trained? |\n| --- | --- | --- |\n"
        f"| vision tower | {tower}, {vision.get('num_hidden_layers')} layers of width {vision.get('hidden_size')}, "
        f"{vision.get('image_size')} pixels | frozen |\n"
        f"| projector | {projector}, {vision.get('hidden_size')} -> {text.get('hidden_size')} | trained |\n"
        f"| decoder | {decoder}, {text.get('num_hidden_layers')} layers of width {text.get('hidden_size')} | {tuned} |",
    ]
    if run.stages:
        last = run.stages[-1]
        parts.append(
            f"{last['trainable_parameters']:,} of {last['parameters']:,} parameters were trained in the last stage."
        )
    return "\n\n".join(parts)


def _tuned(run: Run) -> str:
    options = run.stages[-1]["options"] if run.stages else {}
    if options.get("tune_decoder") == "full":
        return "trained in stage 2"
    if run.config.get("adapter") or options.get("tune_decoder") == "lora":
        return "frozen; LoRA trained in stage 2"
    return "frozen" if run.config.get("delta") or run.stages else "see below"


def _usage(repo_id: str, revision: str, merged: bool) -> str:
    form = (
        "This repository is whole: no other one is needed."
        if merged
        else "This repository holds the trained weights; the two backbones are fetched once, at the commits that the "
        "configuration names, and put together. Nothing is ever left at random values."
    )
    return f"""## How to use it

```python
from transformers import pipeline

chat = pipeline("image-text-to-text", model="{repo_id}", revision="{revision}", trust_remote_code=True)
content = [{{"type": "image", "path": "picture.jpg"}}, {{"type": "text", "text": "Describe the image."}}]
messages = [{{"role": "user", "content": content}}]
print(chat(text=messages, max_new_tokens=64, return_full_text=False)[0]["generated_text"])
```

`AutoModelForImageTextToText` and `AutoProcessor` load it as well. {form} `trust_remote_code=True` runs the three
Python files of this repository, and a fixed `revision` keeps them from changing under you; with the package `clip-phi`
installed, `import modeling_clip_phi` first, and no remote code runs."""


def _training(run: Run, licenses: dict[str, str | None]) -> str:
    parts = ["## Training"]
    if run.stages:
        numbers = [str(stage["options"]["stage"]) for stage in run.stages]
        rows = [
            f"| {name} | " + " | ".join(_show(stage["options"].get(name, "")) for stage in run.stages) + " |"
            for name in HYPERPARAMETERS
            if any(name in stage["options"] for stage in run.stages)
        ]
        facts = [
            ("steps", [f"{stage['num_steps']:,}" for stage in run.stages]),
            ("trained parameters", [f"{stage['trainable_parameters']:,}" for stage in run.stages]),
            ("precision", [PRECISIONS.get(stage["mixed_precision"], "float32") for stage in run.stages]),
            ("hardware", [_hardware(stage) for stage in run.stages]),
            ("time", [_duration(stage) for stage in run.stages]),
            ("held-out loss, nats per token", [_show(stage.get("held_out_loss", "")) for stage in run.stages]),
        ]
        rows += [f"| {name} | " + " | ".join(values) + " |" for name, values in facts]
        head = "| | " + " | ".join(f"stage {number}" for number in numbers) + " |\n| --- |" + " --- |" * len(numbers)
        parts += ["\n".join([head, *rows])]
        packages = run.stages[-1]["environment"]["packages"]
        versions = (
            f"{name} {packages[name]}" for name in ("torch", "transformers", "accelerate", "peft") if name in packages
        )
        parts.append(f"Made with {', '.join(versions)}.")
        parts.append("### Data\n\n" + "\n".join(_data_lines(run)))
    else:
        parts.append("How it was trained is not recorded in its folder.")
    if licenses:
        lines = [f"- {_link(name)}: {found or 'not stated there'}" for name, found in licenses.items()]
        parts.append("### Licenses of the backbones\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _data_lines(run: Run) -> list[str]:
    lines = []
    for stage, kind, path in run.sources():
        on_hub = HUB_DATASETS.get(Path(path).name)
        shown = f"[{on_hub}](https://huggingface.co/datasets/{on_hub})" if on_hub else f"`{scrub(path)}`"
        lines.append(f"- stage {stage}: {shown}, read as `{kind}` ({DATA_LICENSES[kind]})")
    for each in run.stages:
        data = each["data"]
        records = f"{data['records']:,} records, " if data.get("records") else ""
        lines.append(f"- stage {each['options']['stage']}: {records}fingerprint `{data['fingerprint']}`")
    if run.report and run.report["skipped"]:
        skipped = ", ".join(f"{count:,} {kind}" for kind, count in run.report["skipped"].items())
        lines.append(f"- left out of the last stage as damaged: {skipped}")
    return lines


def _results(run: Run) -> str:
    if not run.evaluations:
        return "## Results\n\nNot evaluated yet."
    rows = [
        "| task | metric | model | blind (no image) | another's image | margin (95 % interval) | judged on |",
        "| --- " * 7 + "|",
    ]
    commands = []
    for each in run.evaluations:
        low, high = each.get("margin_ci95") or (None, None)
        data = each["data"]
        rows.append(
            f"| {each['task']} | {each['metric']} | **{_show(each['score'])}** | {_show(each.get('blind'))} | "
            f"{_show(each.get('shuffled'))} | {_show(each.get('margin'))} ({_show(low)} to {_show(high)}) | "
            f"{data['samples']:,} samples of {data['images']:,} images of `{scrub(data['source'])}`, fingerprint "
            f"`{str(data['fingerprint'])[:12]}` |"
        )
        commands.append(" ".join(Path(word).name if index == 0 else word for index, word in enumerate(each["command"])))
    table = "\n".join(rows)
    made_by = scrub("\n".join(commands))
    return (
        f"## Results\n\n{table}\n\nThe margin is what looking at the picture brings. Made by:\n\n"
        f"```bash\n{made_by}\n```"
    )


def _samples(run: Run, pictures: dict[str, bytes]) -> str:
    parts = []
    if "curve.png" in pictures:
        parts.append("## Curve and samples\n\n![training and held-out loss](curve.png)")
    else:
        parts.append("## Samples")
    if run.samples:
        rows = ["| picture | asked | the model | a person |", "| --- | --- | --- | --- |"]
        for number, sample in enumerate(run.samples, start=1):
            name = f"samples/{number}.jpg"
            picture = f"![]({name})" if name in pictures else f"{number}"
            texts = (sample.get("question") or "(a caption)", sample["generated"], sample["written"])
            rows.append(f"| {picture} | " + " | ".join(_cell(text) for text in texts) + " |")
        parts.append("Held-out pictures, not chosen:\n\n" + "\n".join(rows))
    return "\n\n".join(parts) if run.samples or len(parts[0]) > 20 else "## Samples\n\nNone were kept."


LIMITS = """## Limits

- It can be wrong, and says so with the same confidence: check what matters. It names what it did not see, above all in
  pictures unlike its training data.
- It sees each picture at the tower's resolution, so small text and small things are lost.
- Its answers carry the biases of the picture and text data that it and its backbones were trained on. It was not
  tuned to refuse anything.
- It was trained in English."""


def _link(backbone: str | None, revision: str | None = None) -> str:
    if backbone is None or Path(backbone).is_absolute():
        return "a backbone of its own"
    at = f" at commit `{revision[:12]}`" if revision else ""
    return f"[{backbone}](https://huggingface.co/{backbone}){at}"


def _kind_and_path(text: str) -> tuple[str, str]:
    kind, separator, rest = text.partition(":")
    if not separator or kind not in DATA_LICENSES:
        kind, rest = "dataset", text
    return kind, re.split(r"[,:](?=[a-z]+=)", rest)[0]


def _hardware(stage: dict[str, Any]) -> str:
    environment = stage["environment"]
    devices = [device["name"] for device in environment["devices"]]
    device = devices[0] if devices else f"CPU ({environment['cpu']}, {environment['cores']} cores)"
    return f"{stage['processes']} x {device}"


def _duration(stage: dict[str, Any]) -> str:
    if "ended" not in stage:
        return "not finished"
    began, ended = (datetime.strptime(stage[name], "%Y-%m-%dT%H:%M:%S%z") for name in ("began", "ended"))
    seconds = (ended - began).total_seconds()
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _show(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not json: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a json object")
    return found


def weights_name(hashes: list[str]) -> str:
    """The tag of weights that have these hashes, so that a card can name them before their commit is there."""
    return f"weights-{hashlib.sha256(''.join(sorted(hashes)).encode()).hexdigest()[:12]}"


__all__ = ["Run", "ModelCard", "make_card", "make_pictures", "merge_cards", "scrub", "weights_name"]
