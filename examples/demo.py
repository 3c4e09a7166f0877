"""The whole path in minutes on a CPU: draw data, train both stages, judge, save, load again as a stranger would.

    python examples/demo.py            # what 'make demo' runs; everything goes to outputs/demo

The scenes that it is judged on have object combinations that neither the training nor the backbones ever met.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "examples" / "recipes"
OUTPUT = Path("outputs/demo")
DESCRIBE = "Describe the image."
BATCH_SIZE = 64

# Run where nothing of this project can be imported: the checkpoint alone must be enough.
STRANGER = """
import sys
from PIL import Image
from transformers import AutoModel, AutoProcessor

folder, image, question = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
content = [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": question}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
assert "modeling_clip_phi" not in sys.modules, "the installed package was used"
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num_train", type=int, default=4000, help="training scenes (default: %(default)s)")
    parser.add_argument("--num_val", type=int, default=1000, help="scenes to be judged on (default: %(default)s)")
    parser.add_argument(
        "--max_steps", type=int, default=0, help="stop each stage after so many steps (0: as the recipe says)"
    )
    arguments = parser.parse_args()
    started = time.perf_counter()

    from clip_phi.data.synthetic import write_dataset

    print(f"1. Drawing {arguments.num_train} training and {arguments.num_val} unseen scenes", flush=True)
    write_dataset(OUTPUT / "data", arguments.num_train, arguments.num_val)
    result: dict[str, Any] = {}
    for stage in (1, 2):
        print(f"{stage + 1}. Training stage {stage}", flush=True)
        result[f"train_seconds_stage{stage}"] = train(stage, arguments.max_steps)
    print("4. Judging on the unseen scenes", flush=True)
    scenes = read_scenes()
    result |= judge(scenes)
    print("5. Loading the saved model in a clean process", flush=True)
    reload_as_stranger(scenes[0])
    draw_sheet(scenes[:12], OUTPUT / "sheet.png")
    draw_curves(OUTPUT / "curve.png")
    result["total_seconds"] = round(time.perf_counter() - started, 1)
    (OUTPUT / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print_table(result)


def train(stage: int, max_steps: int) -> float:
    """Run a stage exactly as a user would; returns its seconds."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "examples/configs/cpu.yaml"),
    ]
    command += [str(ROOT / "train_accelerate.py"), "--config", str(RECIPES / f"demo_stage{stage}.yaml")]
    started = time.perf_counter()
    if subprocess.run([*command, "--max_steps", str(max_steps)]).returncode != 0:
        sys.exit(f"stage {stage} of the demo failed: its message is above")
    return round(time.perf_counter() - started, 1)


def read_scenes() -> list[dict[str, Any]]:
    """The unseen scenes: image, and true composition as a Counter of (color, shape)."""
    data = OUTPUT / "data"
    instances = json.loads((data / "annotations/instances_val2017.json").read_text(encoding="utf-8"))
    names = {category["id"]: tuple(category["name"].split()) for category in instances["categories"]}
    truth: dict[int, Counter] = defaultdict(Counter)
    for row in instances["annotations"]:
        truth[row["image_id"]][names[row["category_id"]]] += 1
    return [
        {"path": data / "val2017" / image["file_name"], "truth": truth[image["id"]], "turns": []}
        for image in instances["images"]
    ]


def judge(scenes: list[dict[str, Any]]) -> dict[str, float]:
    """Caption the scenes after stage 1; save the model of stage 2 whole, as outputs/demo/model, and evaluate it.

    Fills in the scenes. What a caption is worth here is how many objects it names rightly; all other metrics, and the
    answers, are those of clip-phi evaluate."""
    from clip_phi.batching.images import load_image
    from clip_phi.data.synthetic import object_f1
    from clip_phi.evaluation.generate import generate_texts
    from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

    def f1(key: str) -> float:
        return sum(object_f1(scene[key], scene["truth"]) for scene in scenes) / len(scenes)

    model = ClipPhiForCausalLM.from_pretrained(OUTPUT / "stage1")
    processor = ClipPhiProcessor.from_pretrained(OUTPUT / "stage1")
    bare = [{"role": "user", "content": [{"type": "image"}]}]
    prompts = [(bare, load_image(scene["path"])) for scene in scenes]
    for scene, caption in zip(scenes, generate_texts(model, processor, prompts, batch_size=BATCH_SIZE), strict=True):
        scene["caption_stage1"] = caption

    ClipPhiForCausalLM.from_pretrained(OUTPUT / "stage2").save_pretrained(OUTPUT / "model", merged=True)
    processor.save_pretrained(OUTPUT / "model")
    by_name = {scene["path"].name: scene for scene in scenes}
    _, described = evaluate("captions")
    for row in described:
        keys = {"caption": "answer", "caption_blind": "blind_answer", "caption_shuffled": "shuffled_answer"}
        by_name[row["image"]] |= {key: row[kind] for key, kind in keys.items()}
    answers, questions = evaluate("vqa")
    for row in questions:
        by_name[row["image"]]["turns"].append(row)
    result = {"scenes": len(scenes), "questions": len(questions), "caption_f1_stage1": f1("caption_stage1")}
    result |= {f"caption_f1{end}": f1(f"caption{end}") for end in ("", "_blind", "_shuffled")}
    result |= {"answer_accuracy": answers["score"], "answer_accuracy_blind": answers["blind"]}
    result |= {"answer_accuracy_shuffled": answers["shuffled"]}
    result |= {"answer_accuracy_question_only": answers["question_only"]["score"]}
    return {name: round(value, 4) for name, value in result.items()}


def evaluate(task: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """clip-phi evaluate: its result, and a row for each sample."""
    from clip_phi.cli import main as clip_phi

    if clip_phi(["evaluate", str(OUTPUT / "model"), "--task", task, "--batch_size", str(BATCH_SIZE)]) != 0:
        sys.exit(f"the evaluation of {task} failed: its message is above")
    folder = OUTPUT / "model/evaluation"
    rows = (folder / f"{task}.samples.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads((folder / f"{task}.json").read_text(encoding="utf-8")), [json.loads(row) for row in rows]


def reload_as_stranger(scene: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as elsewhere:
        command = [
            sys.executable,
            "-c",
            STRANGER,
            str((OUTPUT / "model").resolve()),
            str(scene["path"].resolve()),
            DESCRIBE,
        ]
        done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"the saved model does not load in a clean process:\n{done.stderr}")
    if done.stdout.strip() != scene["caption"]:
        sys.exit(f"the reloaded model says {done.stdout.strip()!r}, not {scene['caption']!r}")
    print(f"   it says the same: {done.stdout.strip()!r}")


def draw_sheet(scenes: list[dict[str, Any]], path: Path) -> None:
    """A page of unseen scenes with what the model says about them, green where it is right."""
    from matplotlib.figure import Figure
    from PIL import Image

    from clip_phi.data.synthetic import object_f1

    figure = Figure(figsize=(16, 8.5), layout="constrained")
    figure.suptitle("Unseen scenes: caption after stage 1, description and answers after stage 2 (green: right)")
    for axes, scene in zip(figure.subplots(4, 3).flat, scenes, strict=False):
        axes.imshow(Image.open(scene["path"]), extent=(0, 1, 0, 1))
        axes.set(xlim=(0, 3.6), ylim=(-0.15, 1))
        axes.axis("off")
        truth = ", ".join(f"{count} {' '.join(name)}" for name, count in scene["truth"].items())
        lines = [(f"truth: {truth}", "black")]
        lines += [
            (f"{label}: {scene[key]}", "green" if object_f1(scene[key], scene["truth"]) == 1 else "firebrick")
            for label, key in (("stage 1", "caption_stage1"), ("stage 2", "caption"))
        ]
        for turn in scene["turns"]:
            right = turn["score"] == 1
            note = "" if right else f" (truth: {turn['references'][0]})"
            lines.append((f"{turn['question']} {turn['answer']}{note}", "green" if right else "firebrick"))
        height = 1.0
        for text, color in lines:
            wrapped = wrap(text)
            axes.text(1.08, height, wrapped, color=color, va="top", fontsize=8)
            height -= 0.095 * (wrapped.count("\n") + 1) + 0.02
    figure.savefig(path, dpi=80)


def wrap(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 52))


def draw_curves(path: Path) -> None:
    """Both stages' losses side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    for stage, axes in enumerate(figure.subplots(1, 2), start=1):
        lines = (OUTPUT / f"stage{stage}/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        for key, style in (("loss", "-"), ("eval_loss", "o")):
            points = [(record["step"], record[key]) for record in map(json.loads, lines) if key in record]
            axes.plot(*zip(*points, strict=True), style, label={"loss": "training", "eval_loss": "held out"}[key])
        recipe = yaml.safe_load((RECIPES / f"demo_stage{stage}.yaml").read_text(encoding="utf-8"))
        axes.set(
            title=f"stage {stage}, {recipe['num_train_epochs']} epochs",
            xlabel="step",
            ylabel="nats per supervised token",
        )
        axes.legend()
    figure.savefig(path, dpi=90)


def print_table(result: dict[str, Any]) -> None:
    def show(name: str) -> str:
        return f"{result[name]:.2f}" if name in result else "-"

    print(f"\nOn {result['scenes']} unseen scenes and {result['questions']} questions:\n")
    print("                                            model   blind   shuffled images")
    for label, name in (
        ("captions after stage 1, object F1", "caption_f1_stage1"),
        ("captions after stage 2, object F1", "caption_f1"),
        ("answers after stage 2, accuracy", "answer_accuracy"),
    ):
        print(f"  {label:40}  {show(name)}    {show(name + '_blind')}    {show(name + '_shuffled')}")
    print(f"\nThe most frequent answer to each question: {show('answer_accuracy_question_only')}")
    seconds = ", ".join(f"stage {stage} {result[f'train_seconds_stage{stage}']:.0f} s" for stage in (1, 2))
    print(f"Time: {seconds}, all {result['total_seconds']:.0f} s")
    print(f"See {OUTPUT}/sheet.png, {OUTPUT}/curve.png and {OUTPUT}/result.json, and the pages of the evaluation,")
    print(f"{OUTPUT}/model/evaluation/captions.html and vqa.html; the model is {OUTPUT}/model:")
    print(f"  clip-phi ask {OUTPUT}/data/val2017/IMAGE.jpg 'How many shapes are there?'")


if __name__ == "__main__":
    main()
