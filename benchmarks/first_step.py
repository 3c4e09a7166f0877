"""The cost of the first training step: user seconds until it is done, and those of the imports alone.

    python benchmarks/first_step.py [--repeats 5] [--json FILE]

Stage 1 runs on drawn scenes with the demo's backbones, each time in a process of its own. The figures are the least
user time of several runs, since other programs on the machine can only add to it. The kernel's time is left out for
the same reason.

    python benchmarks/first_step.py --count [--images 2000 10000] [--json FILE]

counts the work until then instead, for data sets of several sizes whose index is in the cache: see
until_first_step.py. Each image has five captions. Data of so many images are hard links to few drawn ones.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
FIRST_STEP = """
import os, resource, runpy, sys
from accelerate.optimizer import AcceleratedOptimizer

def step_and_leave(self, *arguments, step=AcceleratedOptimizer.step):
    step(self, *arguments)
    print("SECONDS", resource.getrusage(resource.RUSAGE_SELF).ru_utime, flush=True)
    os._exit(0)

AcceleratedOptimizer.step = step_and_leave
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
BARE_IMPORTS = """
import resource
import accelerate, peft, pyarrow, torch, torch.distributed.fsdp, torch.distributed.tensor, transformers
from transformers import CLIPImageProcessorPil, CLIPVisionModel, PhiForCausalLM, PreTrainedTokenizerFast, get_scheduler
print("SECONDS", resource.getrusage(resource.RUSAGE_SELF).ru_utime)
"""


def cpu_seconds(*command: object) -> float:
    done = subprocess.run([sys.executable, "-c", *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode or "SECONDS" not in done.stdout:
        raise RuntimeError(done.stdout + done.stderr)
    return float(done.stdout.rpartition("SECONDS")[2])


def measure(folder: Path, repeats: int) -> dict[str, float]:
    from clip_phi.data.synthetic import write_dataset

    write_dataset(folder, num_train=64, num_val=8)
    backbones = ROOT / "examples/demo_backbones"
    options = ["--stage", 1, "--vision_backbone", backbones / "vision", "--text_backbone", backbones / "text"]
    options += ["--data", f"coco:{folder}/annotations/captions_train2017.json,images={folder}/train2017"]
    options += ["--eval_data", f"coco:{folder}/annotations/captions_val2017.json,images={folder}/val2017"]
    options += ["--per_device_train_batch_size", 8, "--dataloader_num_workers", 0, "--output_dir", folder / "run"]
    imports, first_step = [], []
    for _ in range(repeats):
        first_step.append(cpu_seconds(FIRST_STEP, "train_accelerate.py", *options))
        imports.append(cpu_seconds(BARE_IMPORTS))
    return {
        "first_step_seconds": min(first_step),
        "import_seconds": min(imports),
        "first_step_ratio": min(first_step) / min(imports),
    }


def write_many(folder: Path, num_images: int, texts_per_image: int = 5, num_drawn: int = 64) -> None:
    """Write a data set like write_dataset's with num_images training images, hard links to num_drawn of them.

    texts_per_image: captions, 5 or fewer, and conversations, 2 or fewer, of each image."""
    from clip_phi.data.synthetic import write_dataset

    write_dataset(folder, num_train=num_drawn, num_val=4)
    numbers, names = range(num_images), [f"{1 + number:012d}.jpg" for number in range(num_images)]
    for number in numbers[num_drawn:]:
        os.link(folder / "train2017" / names[number % num_drawn], folder / "train2017" / names[number])
    path = folder / "annotations/captions_train2017.json"
    content = json.loads(path.read_text())
    texts: list[list[str]] = [[] for _ in range(num_drawn)]
    for each in content["annotations"]:
        texts[each["image_id"] - 1].append(each["caption"])
    content["images"] = [{"id": 1 + number, "file_name": names[number]} for number in numbers]
    captions = [(number, text) for number in numbers for text in texts[number % num_drawn][:texts_per_image]]
    content["annotations"] = [
        {"id": place, "image_id": 1 + number, "caption": text} for place, (number, text) in enumerate(captions)
    ]
    path.write_text(json.dumps(content))
    path = folder / "llava_instruct_train.json"
    records = json.loads(path.read_text())
    parts = range(min(texts_per_image, 2))
    many = [records[2 * (number % num_drawn) + part] | {"image": names[number]} for number in numbers for part in parts]
    path.write_text(json.dumps(many))


def count(folder: Path, num_images: int) -> dict[str, float]:
    """Count the work of stage 1 with the demo's backbones and packs of 2,048 tokens, from the cached index."""
    data, backbones = folder / str(num_images), ROOT / "examples/demo_backbones"
    write_many(data, num_images)
    options = ["--stage", 1, "--vision_backbone", backbones / "vision", "--text_backbone", backbones / "text"]
    options += [
        "--data",
        f"coco:{data}/annotations/captions_train2017.json,images={data}/train2017",
        "--eval_data",
        "--holdout_images",
        100,
    ]
    options += ["--max_tokens_per_batch", 2048, "--dataloader_num_workers", 0, "--output_dir", folder / "run"]
    command = [sys.executable, ROOT / "benchmarks/until_first_step.py", ROOT / "train_accelerate.py", *options]
    found: dict[str, float] = {"images": num_images}
    for name, counting in (("cold_read_seconds", "0"), ("", "1"), ("read_seconds", "0")):
        own = {"COUNT": counting, "HF_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0"}
        own |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([*map(str, command)], cwd=ROOT, env=os.environ | own, capture_output=True, text=True)
        if done.returncode or "COUNTED" not in done.stdout:
            raise RuntimeError(done.stdout + done.stderr)
        counted = json.loads(done.stdout.rpartition("COUNTED")[2])
        found |= {name: counted["read_seconds"]} if name else counted
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="processes of each kind (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--count", action="store_true", help="count the work instead, for data of several sizes")
    parser.add_argument("--images", type=int, nargs="+", default=[2000, 10_000], help="sizes (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.count:
            rows = [count(Path(folder), num_images) for num_images in options.images]
            result: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
        else:
            result = dict(measure(Path(folder), options.repeats))
    for name, value in result.items():
        values = value if isinstance(value, list) else [value]
        print(f"{name:20}" + "".join(f" {each:14,.3g}" if each < 100 else f" {each:14,.0f}" for each in values))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
