"""The cost of the first training step: user seconds until it is done, and those of the imports alone.

    python benchmarks/first_step.py [--repeats 5] [--json FILE]

Stage 1 runs on drawn scenes with the demo's backbones, each time in a process of its own. The figures are the least
user time of several runs, since other programs on the machine can only add to it. The kernel's time is left out for
the same reason.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="processes of each kind (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options.repeats)
    for name, value in result.items():
        print(f"{name:20} {value:.3g}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
