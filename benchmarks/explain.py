"""Where a model looked: how often each kind of map points at the object that a question is about.

    python benchmarks/explain.py [--model DIR] [--num_images N] [--json FILE] [--page docs/explain.md] [--picture FILE]

The maps are those of `clip-phi evaluate --task pointing` on the demo's unseen scenes, for questions about one object
that are answered right. The same questions are then explained by occlusion with each of the ways to leave patches out.
ece and accuracy_at_80 are those of MODEL/evaluation/vqa.json, and null without it: run first
`clip-phi evaluate MODEL --task vqa --data DATA`. --page writes the tables between the marks of a page.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from clip_phi.batching.images import load_image
from clip_phi.data.sample import user_message
from clip_phi.evaluation.explain import Target, crop_box, explain
from clip_phi.evaluation.pointing import MAPS, is_hit
from clip_phi.evaluation.run import load
from clip_phi.evaluation.tasks import question_kind
from clip_phi.templates.sheet import draw_images, save_png

ROOT = Path(__file__).parent.parent
LEAVE_OUT = ("mean color, in the image", "mean feature, after the tower", "0, after the tower")
WINDOWS = (1, 2)


class OtherTarget(Target):
    """Leaves patches out in one of the ways of LEAVE_OUT."""

    way = LEAVE_OUT[0]

    def leave_out(self, image: int, masks: torch.Tensor) -> torch.Tensor:
        if self.way == LEAVE_OUT[0]:
            return super().leave_out(image, masks)
        features = self.features.repeat(len(masks), 1, 1, 1)
        patches = features[:, image]
        patches[masks.flatten(1)] = self.features[image].mean(0) * (self.way == LEAVE_OUT[1])
        return features


def evaluate(model: str, data: Path, num_images: int, folder: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    annotations = data / "annotations/captions_val2017.json"
    command = ["-m", "clip_phi.cli", "evaluate", model, "--task", "pointing", "--num_images", str(num_images)]
    command += ["--data", f"coco:{annotations},images={data / 'val2017'}", "--output_dir", folder, "--device", "cpu"]
    subprocess.run(
        [sys.executable, *command], check=True, stdout=sys.stderr, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    lines = Path(folder, "pointing.samples.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(Path(folder, "pointing.json").read_text(encoding="utf-8")), [json.loads(line) for line in lines]


def ways_to_leave_out(model: str, data: Path, samples: list[dict[str, Any]]) -> dict[str, float]:
    """Hit rates of occlusion by what replaces a patch, and by how many rows and columns are left out at once."""
    weights, processor, _ = load(model, "cpu")
    hits: dict[str, list[bool]] = {f"{way}, {size} x {size}": [] for way, size in product(LEAVE_OUT, WINDOWS)}
    for sample in samples:
        image = load_image(data / "val2017" / sample["image"])
        crop = crop_box(processor.image_processor, image.size)
        for way, size in product(LEAVE_OUT, WINDOWS):
            asked = [user_message(sample["question"], 1)], [image], sample["answer"]
            target = OtherTarget(weights, processor, *asked)
            target.way, target.window = way, size
            heat = target.maps("occlusion").sum(0)[0]
            hits[f"{way}, {size} x {size}"].append(is_hit(heat, crop, sample["boxes"]))
    return {name: sum(found) / len(found) for name, found in hits.items()}


def draw(model: str, data: Path, samples: list[dict[str, Any]], path: str) -> None:
    """One question of each of four kinds, with the map of its answer over the image."""
    from matplotlib.figure import Figure

    weights, processor, _ = load(model, "cpu")
    chosen: dict[str, dict[str, Any]] = {}
    for sample in samples:
        if sample["image"] not in {each["image"] for each in chosen.values()}:
            chosen.setdefault(question_kind(sample["question"]), sample)
    images, texts = [], []
    for sample in list(chosen.values())[:4]:
        image = load_image(data / "val2017" / sample["image"])
        images += [image, explain(weights, processor, image, sample["question"], sample["answer"]).draw([image])]
        texts += [sample["question"], sample["answer"]]
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    draw_images(figure, images, texts)
    save_png(figure, path, dpi=70)
    Image.open(path).convert("P", palette=Image.Palette.ADAPTIVE, colors=96).save(path, optimize=True)


def confidence(model: str) -> dict[str, float | None]:
    path = Path(model, "evaluation/vqa.json")
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = result.get("confidence", {}).get("likelihood", {})
    return {
        "ece": found.get("scaled", {}).get("ece"),
        "accuracy_at_80": found.get("accuracy_at_coverage", {}).get("0.8"),
    }


def page(found: dict[str, Any]) -> str:
    about = f"{found['questions']} questions about {found['images']} scenes, of which none was in training."
    rows = [about, "", "| map | hit rate | 95 % | insertion | deletion |", "| --- | --- | --- | --- | --- |"]
    for name, its in found["methods"].items():
        interval = "{:.3f} to {:.3f}".format(*its["hit_rate_ci95"])
        rows.append(f"| {name} | {its['hit_rate']:.3f} | {interval} | {its['insertion']:.3f} | {its['deletion']:.3f} |")
    rows += ["", "| question | questions | hit rate of the default |", "| --- | --- | --- |"]
    kinds = sorted(found["by_question_type"].items())
    rows += [f"| {kind} ... | {its['samples']} | {its['score']:.3f} |" for kind, its in kinds]
    rows += ["", "| occlusion: a patch becomes | " + " | ".join(f"{size} x {size} patches at once" for size in WINDOWS)]
    rows[-1] += " |"
    rows.append("| --- " * (len(WINDOWS) + 1) + "|")
    for way in LEAVE_OUT:
        rates = (f"{found['leave_out'][f'{way}, {size} x {size}']:.3f}" for size in WINDOWS)
        rows.append(f"| {way} | {' | '.join(rates)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/demo/model", help="folder of a model of the demo")
    parser.add_argument("--data", type=Path, default=Path("outputs/demo/data"), help="folder of drawn scenes")
    parser.add_argument("--num_images", type=int, default=60, help="scenes that are asked about")
    parser.add_argument("--json", metavar="FILE", help="file to write the figures to, as json")
    parser.add_argument("--picture", metavar="FILE", help="file for four images with their maps, as PNG")
    parser.add_argument("--page", metavar="FILE", help="page whose tables are written")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result, samples = evaluate(arguments.model, arguments.data, arguments.num_images, folder)
    methods = result["methods"]
    chosen = [each for each in samples if len(each["boxes"]) == 1 and each["answer"].lower() in each["references"]]
    found = {"hit_rate": {name: methods[name]["hit_rate"] for name in MAPS}, "random": methods["random"]["hit_rate"]}
    found |= {"centre": methods["centre"]["hit_rate"], "default": result["method"], **confidence(arguments.model)}
    found |= {"images": result["data"]["images"], "questions": result["one_object_answered_right"], "methods": methods}
    found["by_question_type"] = result["tables"]["by_question_type"]
    found["leave_out"] = ways_to_leave_out(arguments.model, arguments.data, chosen[:: max(1, len(chosen) // 80)])
    print(json.dumps(found, indent=2))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if arguments.picture:
        draw(arguments.model, arguments.data, samples, arguments.picture)
    if arguments.page:
        path = Path(arguments.page)
        marks = r"(<!-- measured -->\n).*?(<!-- end -->)"
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(marks, lambda mark: f"{mark[1]}{page(found)}\n{mark[2]}", text, flags=re.S), "utf-8")


if __name__ == "__main__":
    main()
