"""A question that needs both of its images, and what becomes of the answers when one image is shuffled.

    python examples/two_pictures.py    # after 'make demo'; all output is in outputs/two_pictures

"Is there an image with more circles, left or right?" Each image has one or two circles, and the four pairs of these
numbers are equally frequent. So the best guess is "no", which is right for half of the questions, also for one who
sees one of the images. The demo's decoder was pretrained on one image at a time. Therefore all of it is trained, also
on how many circles each image has. All answers are single tokens, which are learnt in fewer steps.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
START, OUTPUT = Path("outputs/demo/model"), Path("outputs/two_pictures")
QUESTION = "Is there an image with more circles, left or right?"
ANSWERS = {(1, 1): "no", (2, 2): "no", (2, 1): "left", (1, 2): "right"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num_train", type=int, default=4000, help="pairs of training images (default: %(default)s)")
    parser.add_argument("--num_val", type=int, default=400, help="pairs of unseen images (default: %(default)s)")
    parser.add_argument(
        "--num_train_epochs", type=float, default=1.4, help="passes over the pairs (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if not (START / "config.json").exists():
        sys.exit(f"{START} is missing: run 'make demo' first")
    started = time.perf_counter()
    print(f"1. Drawing {arguments.num_train} training and {arguments.num_val} unseen pairs of images", flush=True)
    train_data, val_data = write_pairs("train", arguments.num_train), write_pairs("val", arguments.num_val)
    print("2. Training the projector and the decoder", flush=True)
    train(train_data, val_data, arguments.num_train_epochs)
    print("3. Evaluating on the unseen pairs, also with each image shuffled alone", flush=True)
    from clip_phi.cli import main as clip_phi

    if clip_phi(["evaluate", str(OUTPUT / "model"), "--task", "exact", "--data", val_data, "--batch_size", "64"]) != 0:
        sys.exit("the evaluation failed; see its message above")
    print(f"Time: {time.perf_counter() - started:.0f} s")


def write_pairs(split: str, num_pairs: int) -> str:
    """Draw images and write questions about pairs of them. Returns their --data."""
    from clip_phi.data.synthetic import NUMBERS, draw_scene, sample_scene

    rng, folder = random.Random(split), OUTPUT / "data" / split
    folder.mkdir(parents=True, exist_ok=True)
    names: dict[int, list[str]] = {1: [], 2: []}  # by the number of circles
    while min(map(len, names.values())) < num_pairs // 4:
        scene = sample_scene(rng, split)
        circles = sum(item.shape == "circle" for item in scene.objects)
        if circles in names and len(names[circles]) < num_pairs // 4:
            names[circles].append(f"{circles}_{len(names[circles])}.png")
            draw_scene(scene).save(folder / names[circles][-1])
    records: dict[tuple[str, str], dict[str, Any]] = {}
    while len(records) < num_pairs:
        left, right = [*ANSWERS][len(records) % len(ANSWERS)]
        images = rng.choice(names[left]), rng.choice(names[right])
        turns = [(f"<image>\n<image>\n{QUESTION}", ANSWERS[left, right])]
        if split == "train":
            turns.append(("How many circles are in the left image?", NUMBERS[left]))
            turns.append(("How many circles are in the right image?", NUMBERS[right]))
        texts = [
            {"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)
        ]
        records.setdefault(images, {"image": images, "conversations": texts})
    (folder / "pairs.json").write_text(json.dumps([*records.values()]), encoding="utf-8")
    return f"llava:{folder}/pairs.json,images={folder},turns=independent"


def train(train_data: str, val_data: str, num_train_epochs: float) -> None:
    options = {
        "stage": 2,
        "init_from": START,
        "tune_decoder": "full",
        "data": train_data,
        "eval_data": val_data,
        "max_eval_images": 100,
        "output_dir": OUTPUT / "model",
        "num_train_epochs": num_train_epochs,
        "learning_rate": 1e-3,
        "max_tokens_per_batch": 1600,
        "gradient_accumulation_steps": 1,
        "per_device_eval_batch_size": 16,
        "dataloader_num_workers": 0,
        "logging_steps": 25,
    }
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "examples/configs/cpu.yaml"), str(ROOT / "train_accelerate.py")]
    command += [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    if subprocess.run(command).returncode != 0:
        sys.exit("the training failed; see its message above")


if __name__ == "__main__":
    main()
