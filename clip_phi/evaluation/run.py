"""clip-phi evaluate: from the command line to the files, in one process or in several."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..data.report import Report
from ..data.source import parse_files
from ..hub.retry import load_with_retries
from .evaluate import Decoding, EvalResult, Processes, judge, judge_loss
from .report import checkpoint_sha256, environment, format_result, portable, write
from .tasks import EvalSet, make_eval_set, read_samples

DEMO_DATA = "outputs/demo/data"
# What the demo's model is judged on without --data.
DEMO_SOURCES = {
    "captions": f"coco:{DEMO_DATA}/annotations/captions_val2017.json,images={DEMO_DATA}/val2017",
    "vqa": f"llava:{DEMO_DATA}/llava_instruct_val.json,images={DEMO_DATA}/val2017",
}


def evaluate(options: argparse.Namespace, demo_checkpoint: str) -> None:
    """Run clip-phi evaluate; options are those of its command line. Prints the result's table.

    Raises ValueError or OSError if checkpoint or data cannot be used."""
    texts = list(options.data)
    if not texts:
        if Path(options.model) != Path(demo_checkpoint):
            raise ValueError("--data is required: [KIND:]PATH, as in training")
        texts = [DEMO_SOURCES.get(options.task, DEMO_SOURCES["vqa"])]
    sources = parse_files(texts)
    from accelerate import PartialState
    from accelerate.utils import gather_object, parse_flag_from_env
    from tqdm import tqdm
    from transformers.utils import logging

    logging.disable_progress_bar()
    state = PartialState(cpu=options.device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU"))

    def say(text: str) -> None:
        if state.is_main_process:
            print(text, file=sys.stderr, flush=True)

    processes = Processes(state.process_index, state.num_processes, gather_object, state.wait_for_everyone, say)
    report = Report()
    samples = read_samples(sources, report)
    eval_set = make_eval_set(options.task, samples, report, options.num_images, options.max_bad_fraction)
    if report.num_skipped:
        say(f"{report.num_skipped:,} of {report.records:,} records are skipped:\n{report.table()}")
    model, processor, folder = load(options.model, options.device or state.device)
    sha256 = checkpoint_sha256(folder)
    output = Path(options.output_dir) if options.output_dir else place_for(options.model)
    decoding = Decoding(
        options.prompt, options.max_new_tokens, options.num_beams, options.batch_size, options.seed, options.shuffles
    )

    def progress(work: Any) -> Any:
        return tqdm(work, unit="batch", disable=not state.is_main_process, dynamic_ncols=True)

    if options.task == "loss":
        outcome = judge_loss(model, processor, samples, eval_set, decoding, processes=processes, progress=progress)
    else:
        outcome = judge(
            model,
            processor,
            eval_set,
            decoding,
            folder=output / f"{options.task}.answers",
            checkpoint=sha256,
            processes=processes,
            progress=progress,
        )
    if state.is_main_process:
        if options.task == "captions":
            add_caption_metrics(outcome, eval_set, model, options.clip, options.meteor, say)
        outcome.result["data"] = {"source": portable(" + ".join(texts))} | outcome.result["data"]
        outcome.result |= {
            "checkpoint": {"name": portable(options.model), "sha256": sha256},
            "command": [portable(word) for word in sys.argv],
            "processes": state.num_processes,
            "environment": environment(),
        }
        files = write(outcome, eval_set, output, Path(options.output) if options.output else None)
        print(json.dumps(outcome.result) if options.json else format_result(outcome.result))
        say(f"written: {', '.join(map(str, files))}")
    state.wait_for_everyone()


def load(checkpoint: str, device: Any) -> tuple[Any, Any, Path]:
    """Model, processor, and the folder that the files of the checkpoint are in. On the CPU in float32."""
    import torch
    from transformers.utils.hub import cached_file

    from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

    device = torch.device(device)
    dtype = torch.float32 if device.type == "cpu" else "auto"
    model = load_with_retries(ClipPhiForCausalLM.from_pretrained, checkpoint, dtype=dtype).to(device).eval()
    processor = load_with_retries(ClipPhiProcessor.from_pretrained, checkpoint)
    found = cached_file(checkpoint, "config.json")
    assert found is not None
    return model, processor, Path(found).parent


def place_for(checkpoint: str) -> Path:
    """Where the results of a checkpoint go: beside its weights if it is a folder."""
    if Path(checkpoint).is_dir():
        return Path(checkpoint) / "evaluation"
    return Path("outputs/evaluation") / checkpoint.replace("/", "--")


def add_caption_metrics(
    outcome: EvalResult, eval_set: EvalSet, model: Any, clip: str | None, meteor: bool, say: Callable[[str], Any]
) -> None:
    """CLIPScore, by this CLIP or the tower's if it is at hand, and METEOR, if it is wanted."""
    from ..batching.images import load_image
    from .caption_metrics import meteor as run_meteor
    from .clip_score import ClipScorer, clip_at_hand

    keys = {"score": "answer", "blind": "blind_answer", "shuffled": "shuffled_answer"}
    texts = {name: [row[key] for row in outcome.samples] for name, key in keys.items()}
    metrics = outcome.result["metrics"]
    scorer = ClipScorer(clip, model.device) if clip else clip_at_hand(model.config, model.device, say)
    if scorer is not None:
        metrics["CLIPScore"] = {
            name: float(scorer(said, (load_image(eval_set.images[item.image]) for item in eval_set.items)).mean())
            for name, said in texts.items()
        }
        outcome.result["clip"] = portable(scorer.name)
    if meteor:
        references = [item.references for item in eval_set.items]
        metrics["METEOR"] = {name: run_meteor(said, references) for name, said in texts.items()}
