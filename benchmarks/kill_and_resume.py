"""Kill training at random moments, resume it, and compare it with an uninterrupted run.

    python benchmarks/kill_and_resume.py [--kills 20] [--json FILE]

Both stages train on drawn scenes with the demo's backbones, with accumulation, dropout in LoRA, and 0 or 2 workers.
They run in one process or in two (gloo), of which one or both are killed. SIGKILL ends a run at any time, or between
two flushes of a training checkpoint; SIGTERM lets it finish its step. Sometimes the newest training checkpoint is
truncated, as on a failing disk, and the run must use an older one. The losses of all steps and the final weights must
be bit-equal.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["ACCELERATE_USE_CPU"] = "true"
BACKBONES = ROOT / "examples/demo_backbones"
NUM_STEPS = 9
GRACE_SECONDS = 5  # for a process to exit after another was killed; a launcher would end it, too


def options(stage: int, data: Path, output: Path, num_workers: int) -> list[str]:
    """Make the options of a short run with a training checkpoint at every step."""
    kind, name = ("coco", "annotations/captions_{}2017") if stage == 1 else ("llava", "llava_instruct_{}")
    common: dict[str, Any] = {
        "stage": stage,
        "output_dir": output,
        "data": f"{kind}:{data}/{name.format('train')}.json,images={data}/train2017",
        "eval_data": f"{kind}:{data}/{name.format('val')}.json,images={data}/val2017",
        "dataloader_num_workers": num_workers,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 2,
        "num_train_epochs": 3,
        "max_steps": NUM_STEPS,
        "logging_steps": 1,
        "eval_steps": 4,
        "save_steps": 1,
        "num_sample_texts": 1,
        "max_new_tokens": 4,
    }
    if stage == 1:
        common |= {"vision_backbone": BACKBONES / "vision", "text_backbone": BACKBONES / "text"}
        common["per_device_train_batch_size"] = 2
    else:
        common |= {"init_from": data.parent / "stage1", "max_tokens_per_batch": 200, "lora_r": 4, "lora_dropout": 0.1}
    return [str(word) for name, value in common.items() for word in (f"--{name}", value)]


def train(arguments: list[str], log: Path, flushes: int | None, environment: dict[str, str]) -> None:
    """Train in a process of its own, which kills itself at the given flush of a training checkpoint to the disk."""
    import runpy

    from clip_phi.training import checkpoint

    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if flushes is not None:
        left, flush = [flushes], checkpoint._flush

        def flush_or_die(path: Path) -> None:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            flush(path)

        checkpoint._flush = flush_or_die
    sys.argv = ["train_accelerate.py", *arguments]
    runpy.run_path(str(ROOT / "train_accelerate.py"), run_name="__main__")


def run(
    arguments: list[str],
    log: Path,
    stop: Callable[[list[Any]], None] | None = None,
    flushes: int | None = None,
    num_processes: int = 1,
) -> list[int]:
    """Train in forks of this process, which has all imports. Returns their exit codes, negative for a signal."""
    fork = get_context("fork").Process
    processes = [
        fork(target=train, args=(arguments, log, None if rank else flushes, environment))
        for rank, environment in enumerate(environments(num_processes))
    ]
    for process in processes:
        process.start()
    if stop is not None:
        stop(processes)
    wait([process.sentinel for process in processes])
    for process in processes:
        process.join(GRACE_SECONDS if any(other.exitcode for other in processes) else None)
        process.kill()
        process.join()
    return [process.exitcode or 0 for process in processes]


def environments(num_processes: int) -> list[dict[str, str]]:
    """Make the environment variables that a launcher sets for each process."""
    if num_processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes, "MASTER_PORT": port}
    return [
        {name: str(value) for name, value in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        | {"MASTER_ADDR": "127.0.0.1"}
        for rank in range(num_processes)
    ]


def result(output: Path) -> tuple[dict[tuple[int, str], float], dict[str, bytes]]:
    """Read the training and held-out losses by step, and the files of the final weights."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = {
        (record["step"], key): record[key] for record in records for key in ("loss", "eval_loss") if key in record
    }
    weights = {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*model.safetensors")}
    return losses, weights


def torture(
    stage: int, data: Path, folder: Path, num_workers: int, num_processes: int, kills: int, draw: random.Random
) -> dict[str, Any]:
    """Train to the end with this many kills, and once without any."""
    log = folder / "log.txt"
    began = time.perf_counter()
    plain = options(stage, data, folder / "plain", num_workers)
    assert not any(run(plain, log, num_processes=num_processes)), log.read_text()
    seconds = time.perf_counter() - began
    arguments = [*options(stage, data, folder / "killed", num_workers), "--resume_from_checkpoint"]
    done = cut = 0
    while done < kills:
        how = draw.choice(("any time", "any time", "in a checkpoint", "SIGTERM"))
        if how == "in a checkpoint":  # each has four flushes and one of the parent folder
            codes = run(arguments, log, flushes=draw.randrange(15), num_processes=num_processes)
        else:
            number = signal.SIGTERM if how == "SIGTERM" else signal.SIGKILL

            def stop(processes: list[Any], number: int = number) -> None:
                time.sleep(draw.uniform(0.2, 1.0) * seconds)
                for process in draw.sample(processes, draw.randint(1, len(processes))):
                    if process.is_alive():
                        os.kill(process.pid, number)

            codes = run(arguments, log, stop, num_processes=num_processes)
        if not any(codes):  # it ended before the kill: start again, with the remaining kills
            compare(folder)
            shutil.rmtree(folder / "killed")
            continue
        killed = -signal.SIGKILL in codes or -signal.SIGTERM in codes
        expected = {75, -signal.SIGKILL, -signal.SIGTERM} | (
            {0, 1} if killed else set()
        )  # 1: the other process is gone
        assert expected.issuperset(codes), f"exit codes {codes}\n{log.read_text()[-3000:]}"
        done += 1
        places = sorted(folder.glob("killed/checkpoints/step-*"))
        if len(places) > 1 and draw.random() < 0.3:
            victim = places[-1] / draw.choice(("trained.safetensors", "state.pt", "about.json"))
            with open(victim, "r+b") as file:
                file.truncate(draw.randrange(victim.stat().st_size))
            cut += 1
    assert not any(run(arguments, log, num_processes=num_processes)), log.read_text()[-3000:]
    compare(folder)
    passed_over = log.read_text(encoding="utf-8").count("is passed over")
    return {"kills": done, "cut": cut, "passed_over": passed_over}


def compare(folder: Path) -> None:
    """Compare both runs. Raises SystemExit with the first differences."""
    (losses, weights), (expected_losses, expected) = result(folder / "killed"), result(folder / "plain")
    if losses != expected_losses:
        odd = [key for key in expected_losses if losses.get(key) != expected_losses[key]]
        raise SystemExit(f"losses differ at {odd[:5]}: {folder}")
    if weights != expected:
        raise SystemExit(f"weights differ: {[name for name in expected if weights.get(name) != expected[name]]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="total number of kills (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()

    import accelerate  # noqa: F401
    import peft  # noqa: F401
    import torch

    import clip_phi.training.model  # noqa: F401
    from clip_phi.data.synthetic import write_dataset

    torch.set_num_threads(1)
    draw = random.Random(arguments.seed)
    settings = [(1, 0, 1), (2, 2, 1), (1, 0, 2), (1, 2, 1), (2, 0, 1), (2, 0, 2)]  # stage, workers, processes
    totals = {"kills": 0, "cut": 0, "passed_over": 0}
    with tempfile.TemporaryDirectory() as name:
        os.environ["HF_HOME"] = name
        folder = Path(name)
        write_dataset(folder / "data", num_train=16, num_val=2)
        first = [*options(1, folder / "data", folder / "stage1", 0), "--max_steps", "1"]
        assert not any(run(first, folder / "log.txt")), (folder / "log.txt").read_text()
        for number, (stage, num_workers, num_processes) in enumerate(settings):
            kills = arguments.kills // len(settings) + (number < arguments.kills % len(settings))
            place = folder / f"setting{number}"
            place.mkdir()
            found = torture(stage, folder / "data", place, num_workers, num_processes, kills, draw)
            print(
                f"stage {stage}, {num_workers} workers, {num_processes} processes: {found['kills']} kills, "
                f"{found['cut']} checkpoints truncated, {found['passed_over']} skipped; bit-equal",
                flush=True,
            )
            totals = {name: totals[name] + found[name] for name in totals}
    figures = {
        "kills": totals["kills"],
        "bit_equal": True,  # compare() ends the program otherwise
        "torn_checkpoints_passed_over": totals["passed_over"],
        "checkpoints_cut": totals["cut"],
    }
    print(json.dumps(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
