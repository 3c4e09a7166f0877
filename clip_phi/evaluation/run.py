"""clip-phi evaluate: from the command line to the files, in one process or in several."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from ..batching.images import load_beside
from ..data.report import Report, plain
from ..data.source import parse_files
from ..environment import describe_environment, find_device
from ..hub.card import portable
from ..hub.retry import load_with_retries
from . import caption_metrics
from .answers import Decoding, Processes
from .chair import ChairScorer, add_chair, objects_file
from .clip_score import ClipScorer, local_clip
from .confidence import save_scaling
from .evaluate import EvalResult, evaluate_answers, evaluate_loss
from .pointing import evaluate_pointing
from .report import format_result, model_sha256, write
from .tasks import OFFICIAL, EvalSet, make_eval_set, read_samples

DEMO_DATA = "outputs/demo/data"
# What the demo's model is evaluated on without --data.
DEMO_SOURCES = {
    "captions": f"coco:{DEMO_DATA}/annotations/captions_val2017.json,images={DEMO_DATA}/val2017",
    "vqa": f"llava:{DEMO_DATA}/llava_instruct_val.json,images={DEMO_DATA}/val2017",
}
ANSWERED = ("captions", "vqa", "pope", "exact")
# The tasks of options that not every task has.
USED_BY = {"objects": ("captions", "pointing"), "clip": ("captions",), "meteor": ("captions",), "shuffles": ANSWERED}
USED_BY |= dict.fromkeys(("prompt", "num_beams"), (*ANSWERED, "pointing")) | {"calibrate": ANSWERED[1:]}


def run(options: argparse.Namespace, demo_model: str) -> None:
    """Run clip-phi evaluate with the options of its command line, and print the result.

    Raises ValueError or OSError if the model or the data cannot be used."""
    if not options.data and Path(options.model) != Path(demo_model):
        raise ValueError("--data is required: [KIND:]PATH, as in training")
    for name, tasks in USED_BY.items():
        if options.task not in tasks and getattr(options, name) not in (None, False, getattr(Decoding, name, None)):
            raise ValueError(f"--{name} requires --task {' or '.join(tasks)}, not {options.task}")
    if options.output is not None and options.output.is_dir():  # also "", which is the working folder
        raise ValueError(f"--output {options.output} is a folder: it must be a file")
    if options.calibrate and not Path(options.model).is_dir():
        raise ValueError("--calibrate requires a model in a folder")
    texts = options.data or [DEMO_SOURCES["captions" if options.task in ("captions", "pointing") else "vqa"]]
    sources = parse_files(texts)
    from accelerate import PartialState
    from accelerate.utils import gather_object, parse_flag_from_env
    from tqdm import tqdm
    from transformers.utils import logging

    logging.disable_progress_bar()
    state = PartialState(cpu=options.device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU"))

    def log(text: str) -> None:
        if state.is_main_process:
            print(plain(text), file=sys.stderr, flush=True)

    bar = partial(tqdm, unit="batch", disable=not state.is_main_process, dynamic_ncols=True)
    processes = Processes(state.process_index, state.num_processes, gather_object, state.wait_for_everyone, log, bar)
    report = Report()
    samples = read_samples(sources, report)
    eval_set = make_eval_set(options.task, samples, report, options.num_images, options.max_bad_fraction)
    if report.num_skipped:
        log(f"{report.num_skipped:,} of {report.records:,} records are skipped:\n{report.table()}")
    objects, chair_scorer = objects_file(options.objects, sources), None
    try:
        chair_scorer = ChairScorer(eval_set, objects) if objects and options.task == "captions" else None
    except (OSError, ValueError) as error:
        if options.objects:
            raise
        log(f"CHAIR is left out: {error}")
    model, processor, files = load(options.model, options.device or state.device)
    sha256 = model_sha256(files)
    own = Path(options.model, "evaluation") if Path(options.model).is_dir() else None  # beside the weights
    output = Path(options.output_dir or own or f"outputs/evaluation/{options.model.replace('/', '--')}")
    decoding = Decoding(**{each.name: getattr(options, each.name) for each in fields(Decoding)})
    if options.task == "loss":
        evaluation = evaluate_loss(model, processor, samples, eval_set, decoding, processes=processes)
    elif options.task == "pointing":
        evaluation = evaluate_pointing(model, processor, eval_set, decoding, objects, processes)
    else:
        saved: dict[str, Any] = {"folder": output / f"{options.task}.answers", "model_hash": sha256}
        saved |= {"processes": processes, "confidence": options.task != "captions"}
        evaluation = evaluate_answers(model, processor, eval_set, decoding, **saved)
    if state.is_main_process:
        if options.task == "captions" and eval_set.items:
            add_caption_metrics(evaluation, eval_set, model, options.clip, options.meteor, chair_scorer, log)
        result = evaluation.result
        result["data"] = {"source": " + ".join(map(portable, texts))} | result["data"]
        result |= {
            "checkpoint": {"name": portable(options.model), "sha256": sha256},
            "command": ["clip-phi", *map(portable, sys.argv[1:])],
            "processes": state.num_processes,
            # variables hold folders of this machine
            "environment": {name: value for name, value in describe_environment().items() if name != "variables"},
        }
        written = write(evaluation, eval_set, output, options.output)
        print(json.dumps(result) if options.json else plain(format_result(result)))
        log(f"written: {', '.join(map(str, written))}")
        if (missing := report.num_skipped) and evaluation.official:
            log(f"{missing:,} records were skipped, and have no line in the results file")
        if options.task in OFFICIAL and not evaluation.official:
            log("no results file for an evaluation server: the data lack ids, or have one twice")
        if options.calibrate:
            save_scaling(Path(options.model), model, result)
    state.wait_for_everyone()


def load(name: str, device: Any) -> tuple[Any, Any, Path]:
    """Model, processor, and the folder of their files. name: folder or Hub id. On a CPU the model is in float32.

    Raises ValueError for a decoder that training refuses too."""
    import torch
    from transformers.utils.hub import cached_file

    from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

    from ..batching.attention import refuse_other_attention

    device = find_device(device)
    dtype = torch.float32 if device.type == "cpu" else "auto"
    model = load_with_retries(ClipPhiForCausalLM.from_pretrained, name, dtype=dtype).to(device).eval()
    refuse_other_attention(model)
    processor = load_with_retries(ClipPhiProcessor.from_pretrained, name)
    return model, processor, Path(cached_file(name, "config.json") or name).parent


def add_caption_metrics(
    evaluation: EvalResult, eval_set: EvalSet, model: Any, clip: str | None, meteor: bool,
    chair_scorer: ChairScorer | None, log: Callable[[str], Any],
) -> None:  # fmt: skip
    """Add CLIPScore, by the given CLIP or by the vision tower's if it is stored here; CHAIR; and METEOR if wanted."""
    keys = {"score": "answer", "blind": "blind_answer", "shuffled": "shuffled_answer"}
    texts = {name: [sample[key] for sample in evaluation.samples] for name, key in keys.items()}
    metrics = evaluation.result["metrics"]
    scorer = ClipScorer(clip, model.device) if clip else local_clip(model.config, model.device, log)
    if scorer is not None and not any("+" in digest for digest in eval_set.digests):  # one image, one caption
        sources = [eval_set.images[item.image] for item in eval_set.items]
        scores = {name: scorer(answers, map(load_beside, sources)) for name, answers in texts.items()}
        metrics["CLIPScore"] = {name: float(each.mean()) for name, each in scores.items()}
        evaluation.result["clip"] = portable(scorer.name)
    if chair_scorer is not None:
        add_chair(evaluation, eval_set, chair_scorer, texts)
    if meteor:
        references = [item.references for item in eval_set.items]
        metrics["METEOR"] = {name: caption_metrics.meteor(answers, references) for name, answers in texts.items()}
