"""The whole path in minutes on a CPU: draw data, train both stages, evaluate, save, and load in a clean process.

    python examples/demo.py            # 'make demo' runs this; all output is in outputs/demo

The object combinations of the evaluated scenes are in neither the training data nor the backbones' pretraining data.
outputs/demo/example.png is the image at the top of README.md (docs/demo.png).
"""

import argparse
import itertools
import json
import os
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

# Runs where nothing of this project can be imported: the saved model alone must be enough.
CLEAN_PROCESS = """
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
    parser.add_argument("--num_val", type=int, default=1000, help="unseen scenes (default: %(default)s)")
    parser.add_argument(
        "--max_steps", type=int, default=0, help="optimizer steps per stage; 0: as in the recipe (default: %(default)s)"
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
    print("4. Evaluating on the unseen scenes", flush=True)
    scenes = read_scenes()
    result |= evaluate_stages(scenes)
    print("5. Loading the saved model in a clean process", flush=True)
    reload_in_clean_process(scenes[0])
    draw_sheet(scenes[:12], OUTPUT / "sheet.png")
    draw_example(scenes, OUTPUT / "example.png")
    draw_curves(OUTPUT / "curve.png")
    result["total_seconds"] = round(time.perf_counter() - started, 1)
    result["cpu_seconds"] = round(sum(os.times()[:4]), 1)  # of this process and of those that it started
    (OUTPUT / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print_scenes(scenes)
    print_table(result)


def train(stage: int, max_steps: int) -> float:
    """Run a stage as a user does. Returns its seconds."""
    config = str(ROOT / "examples/configs/cpu.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    command += [str(ROOT / "train_accelerate.py"), "--config", str(RECIPES / f"demo_stage{stage}.yaml")]
    started = time.perf_counter()
    if subprocess.run([*command, "--max_steps", str(max_steps)]).returncode != 0:
        sys.exit(f"stage {stage} of the demo failed; see its message above")
    return round(time.perf_counter() - started, 1)


def read_scenes() -> list[dict[str, Any]]:
    """Read the unseen scenes: image path, and true objects as a Counter of (color, shape)."""
    data = OUTPUT / "data"
    instances = json.loads((data / "annotations/instances_val2017.json").read_text(encoding="utf-8"))
    names = {category["id"]: tuple(category["name"].split()) for category in instances["categories"]}
    truth: dict[int, Counter] = defaultdict(Counter)
    for annotation in instances["annotations"]:
        truth[annotation["image_id"]][names[annotation["category_id"]]] += 1
    return [
        {"path": data / "val2017" / image["file_name"], "truth": truth[image["id"]], "turns": []}
        for image in instances["images"]
    ]


def evaluate_stages(scenes: list[dict[str, Any]]) -> dict[str, Any]:
    """Caption the scenes after stage 1, then save the model of stage 2 as outputs/demo/model, merged, and evaluate it.

    Adds the captions and answers to the scenes. A caption's score is the F1 of the objects that it names. The answers
    and their scores are those of 'clip-phi evaluate', which asks each question alone. Returns the figures of
    result.json.
    """
    from scene_scores import object_f1, question_kind

    from clip_phi.batching.images import load_image
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
    for sample in described:
        keys = {"caption": "answer", "caption_blind": "blind_answer", "caption_shuffled": "shuffled_answer"}
        by_name[sample["image"]] |= {key: sample[kind] for key, kind in keys.items()}
    answers, questions = evaluate("vqa")
    for sample in questions:
        by_name[sample["image"]]["turns"].append(sample)
    result = {"scenes": len(scenes), "questions": len(questions), "caption_f1_stage1": f1("caption_stage1")}
    result |= {f"caption_f1{end}": f1(f"caption{end}") for end in ("", "_blind", "_shuffled")}
    result |= {"answer_accuracy": answers["score"], "answer_accuracy_blind": answers["blind"]}
    result |= {"answer_accuracy_shuffled": answers["shuffled"]}
    result |= {"answer_accuracy_question_only": answers["question_only"]["score"]}
    result["second_turn_accuracy"] = second_turn_accuracy(scenes)
    by_kind: dict[str, list[float]] = defaultdict(list)
    for sample in questions:
        by_kind[question_kind(sample["question"])].append(sample["score"])
    kinds = {kind: round(sum(scores) / len(scores), 4) for kind, scores in sorted(by_kind.items())}
    return {name: round(value, 4) for name, value in result.items()} | {"accuracy_by_kind": kinds}


def second_turn_accuracy(scenes: list[dict[str, Any]]) -> float:
    """Ask the second question of each conversation after the first one and the model's own answer to it."""
    from clip_phi.batching.images import load_image
    from clip_phi.data.sample import user_message
    from clip_phi.evaluation.answer_metrics import vqa_accuracy
    from clip_phi.evaluation.generate import generate_texts
    from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

    model = ClipPhiForCausalLM.from_pretrained(OUTPUT / "model")
    processor = ClipPhiProcessor.from_pretrained(OUTPUT / "model")
    prompts, references = [], []
    for scene in scenes:
        first, second = scene["turns"][:2]  # every drawn conversation has at least two turns
        answered = {"role": "assistant", "content": [{"type": "text", "text": first["answer"]}]}
        messages = [user_message(first["question"], 1), answered, user_message(second["question"])]
        prompts.append((messages, load_image(scene["path"])))
        references.append(second["references"])
    return float(vqa_accuracy(generate_texts(model, processor, prompts, batch_size=BATCH_SIZE), references).mean())


def evaluate(task: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run 'clip-phi evaluate'. Returns its result and its samples."""
    from clip_phi.cli import main as clip_phi

    if clip_phi(["evaluate", str(OUTPUT / "model"), "--task", task, "--batch_size", str(BATCH_SIZE)]) != 0:
        sys.exit(f"the evaluation of {task} failed; see its message above")
    folder = OUTPUT / "model/evaluation"
    samples = (folder / f"{task}.samples.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads((folder / f"{task}.json").read_text(encoding="utf-8")), [json.loads(line) for line in samples]


def reload_in_clean_process(scene: dict[str, Any]) -> None:
    """Load the saved model where this project is not installed; it must describe the scene in the same words."""
    files = [str(path.resolve()) for path in (OUTPUT / "model", scene["path"])]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", CLEAN_PROCESS, *files, DESCRIBE]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"the saved model does not load in a clean process:\n{done.stderr}")
    if done.stdout.strip() != scene["caption"]:
        sys.exit(f"the reloaded model answers {done.stdout.strip()!r}, not {scene['caption']!r}")
    print(f"   the same answer: {done.stdout.strip()!r}")


def draw_sheet(scenes: list[dict[str, Any]], path: Path) -> None:
    """Draw unseen scenes with the model's captions and answers, green where they are right."""
    from matplotlib.figure import Figure
    from PIL import Image
    from scene_scores import object_f1

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


def wrap(text: str, width: int = 52) -> str:
    return "\n".join(textwrap.wrap(text, width))


def draw_example(scenes: list[dict[str, Any]], path: Path) -> None:
    """Draw the first two scenes of at least three kinds of objects whose description and answers are all right.

    If there are fewer, the scenes with the most right answers; a wrong answer is drawn in red.
    """
    from matplotlib.figure import Figure
    from PIL import Image
    from scene_scores import object_f1

    def share_right(scene: dict[str, Any]) -> float:
        scores = [object_f1(scene["caption"], scene["truth"]) == 1, *(turn["score"] == 1 for turn in scene["turns"])]
        return sum(scores) / len(scores)

    rich = [scene for scene in scenes if len(scene["truth"]) >= 3 and len(scene["turns"]) >= 3]
    rich = rich if len(rich) >= 2 else scenes
    figure = Figure(figsize=(11, 3), layout="constrained")
    for axes, scene in zip(figure.subplots(1, 2), sorted(rich, key=share_right, reverse=True), strict=False):
        axes.imshow(Image.open(scene["path"]), extent=(0, 1, 0, 1))
        axes.set(xlim=(0, 2.1), ylim=(0, 1))
        axes.axis("off")
        described = object_f1(scene["caption"], scene["truth"]) == 1
        lines = [(DESCRIBE, scene["caption"], described)]
        lines += [(turn["question"], turn["answer"], turn["score"] == 1) for turn in scene["turns"][:3]]
        height = 0.98
        for question, answer, right in lines:
            for text, color in ((question, "black"), (answer, "green" if right else "firebrick")):
                wrapped = wrap(text, 42)
                axes.text(1.06, height, wrapped, color=color, va="top", fontsize=10)
                height -= 0.085 * (wrapped.count("\n") + 1)
            height -= 0.05
    figure.savefig(path, dpi=80, bbox_inches="tight")
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)  # a third of the size


def draw_curves(path: Path) -> None:
    """Draw the losses of both stages side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    for stage, axes in enumerate(figure.subplots(1, 2), start=1):
        lines = (OUTPUT / f"stage{stage}/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        for key, style in (("loss", "-"), ("eval_loss", "o")):
            points = [(record["step"], record[key]) for record in map(json.loads, lines) if key in record]
            axes.plot(*zip(*points, strict=True), style, label={"loss": "training", "eval_loss": "held out"}[key])
        recipe = yaml.safe_load((RECIPES / f"demo_stage{stage}.yaml").read_text(encoding="utf-8"))
        epochs = recipe["num_train_epochs"]
        axes.set(
            title=f"stage {stage}, {epochs} epoch{'' if epochs == 1 else 's'}",
            xlabel="step",
            ylabel="nats per supervised token",
        )
        axes.legend()
    figure.savefig(path, dpi=90)


def print_scenes(scenes: list[dict[str, Any]], number: int = 3) -> None:
    """Print the first scenes of two objects or more as pictures of text, each beside its caption and a question."""
    print(f"\n{number} scenes that the model has not seen in training:")
    for scene in [scene for scene in scenes if scene["truth"].total() > 1][:number]:
        turn = scene["turns"][0]
        lines = [f"caption:  {scene['caption']}", f"question: {turn['question']}", f"answer:   {turn['answer']}"]
        lines += [] if turn["score"] == 1 else [f"          (right: {turn['references'][0]})"]
        picture = text_picture(scene["path"], sys.stdout.isatty())
        print()
        for row, line in itertools.zip_longest(picture, ["", "", *lines], fillvalue=""):
            print(f"  {row}   {line}".rstrip())


def text_picture(path: Path, colored: bool, rows: int = 8) -> list[str]:
    """Return lines of text that show an image: blocks of its colors, or without colors # on its background."""
    import numpy as np
    from PIL import Image

    size = (2 * rows, 2 * rows if colored else rows)
    image = np.asarray(Image.open(path).convert("RGB").resize(size)).astype(int)
    if not colored:
        shown = abs(image - np.median(image, axis=(0, 1))).max(axis=-1) > 30
        return ["".join(".#"[pixel] for pixel in row) for row in shown.astype(int)]
    pixels = image.tolist()
    # a character shows two pixels: the upper one as its color, the lower one as its background
    block = "\033[38;2;{};{};{};48;2;{};{};{}m\u2580"
    return [
        "".join(block.format(*upper, *lower) for upper, lower in zip(*two, strict=True)) + "\033[0m"
        for two in zip(pixels[::2], pixels[1::2], strict=True)
    ]


def print_table(result: dict[str, Any]) -> None:
    def show(name: str) -> str:
        return f"{result[name]:.2f}" if name in result else "-"

    print(f"\nOn {result['scenes']} unseen scenes and {result['questions']} questions:\n")
    print(f"{'':44}model   blind   shuffled images")
    for label, name in (
        ("captions after stage 1, object F1", "caption_f1_stage1"),
        ("captions after stage 2, object F1", "caption_f1"),
        ("answers after stage 2, accuracy", "answer_accuracy"),
    ):
        print(f"  {label:40}  {show(name)}    {show(name + '_blind')}    {show(name + '_shuffled')}")
    kinds = ", ".join(f"{kind} {value:.2f}" for kind, value in result["accuracy_by_kind"].items())
    print(f"\nAnswers by kind of question: {kinds}")
    print(f"Answers to a second question, after the first one and its answer: {show('second_turn_accuracy')}")
    print(f"Accuracy of the most frequent answer to each question: {show('answer_accuracy_question_only')}")
    seconds = ", ".join(f"stage {stage} {result[f'train_seconds_stage{stage}']:.0f} s" for stage in (1, 2))
    print(f"Time: {seconds}, total {result['total_seconds']:.0f} s ({result['cpu_seconds']:.0f} CPU seconds)")
    print(f"Images and figures: {OUTPUT}/sheet.png, example.png, curve.png, result.json")
    print(f"Evaluation pages:   {OUTPUT}/model/evaluation/captions.html, vqa.html")
    print("Ask the model:")
    print(f"  clip-phi ask {OUTPUT}/data/val2017/IMAGE.jpg 'How many shapes are there?'")


if __name__ == "__main__":
    main()
