"""Every option of train_accelerate.py, typed, with its default. Nothing heavy is imported here."""

import argparse
import dataclasses
import math
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml

from ..data.source import DataSource, parse_source

VISION_BACKBONE = "wkcn/TinyCLIP-ViT-61M-32-Text-29M-LAION400M"
TEXT_BACKBONE = "microsoft/phi-2"
TRACKERS = ("tensorboard", "wandb", "trackio")
# What --metric_for_best_model may be with each --eval_task, beside the loss.
JUDGED = {
    "captions": ("CIDEr-D", "CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"),
    "vqa": ("vqa_accuracy", "exact_match"),
    "pope": ("accuracy", "f1", "precision", "recall"),
    "exact": ("exact_match",),
}


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def _options(default: list[str], help: str) -> Any:
    return field(default_factory=lambda: list(default), metadata={"help": help})


@dataclass
class TrainingArguments:
    """What both stages share. WHERE it runs (devices, precision) is Accelerate's yaml; see accelerate_config.yaml."""

    stage: int = field(metadata={"help": "1: projector alone, on captions; 2: projector and LoRA, on conversations"})
    config: str | None = _option(None, "yaml file of these options; the command line overrides it")
    output_dir: str = _option("outputs/stage1", "where checkpoint, metrics.jsonl, curve.png and sample texts go")
    debug: bool = _option(False, "show the traceback of an error")

    data: list[str] = _options([], "what to train on, KIND:PATH[,option=value...]; several are mixed. See README.md")
    eval_data: list[str] = _options([], "held-out data, in the same form; without any, --holdout_images are held out")
    holdout_images: int = _option(500, "images kept out of training when there is no --eval_data")
    max_eval_images: int = _option(500, "evaluate on the first so many images of each --eval_data")
    max_bad_fraction: float = _option(
        0.01, "stop if a larger share of the records is damaged; 0: stop at any (a strict run)"
    )
    max_length: int = _option(
        2048, "longest conversation in tokens, image included; longer ones are cut after an answer"
    )
    dataloader_num_workers: int = _option(4, "processes that read images; 0 reads them in the training process")
    image_processing: Literal["exact", "fast"] = _option(
        "exact", "exact: the image processor's; fast: one of 256 levels off in 1 of 100 values (needs simplejpeg)"
    )
    cache_features: str | None = _option(
        None, "folder in which the frozen tower's features are kept, so that later epochs and runs open no image"
    )

    per_device_train_batch_size: int = _option(16, "images in one forward pass on one device")
    max_tokens_per_batch: int = _option(
        0, "instead: as many images as fit into so many tokens, in one forward pass on one device, planned ahead"
    )
    gradient_accumulation_steps: int = _option(1, "forward passes in one step")
    num_train_epochs: float = _option(1.0, "passes over the training images")
    max_steps: int = _option(0, "stop after so many steps, whatever --num_train_epochs says; 0: no limit")
    seed: int = _option(0, "of the order, the dropout and the new weights")

    optim: Literal["auto", "adam8bit", "paged_adam8bit", "adamw_torch_fused"] = _option(
        "auto",
        "adam8bit: bitsandbytes; paged_adam8bit: its states may leave a full GPU; adamw_torch_fused: torch's; auto: "
        "adam8bit on CUDA, adamw_torch_fused elsewhere",
    )
    learning_rate: float = _option(1e-3, "peak learning rate of the projector, after the warm-up")
    weight_decay: float = _option(0.0, "of all trained weights but the biases")
    lr_scheduler_type: Literal["cosine", "linear", "constant_with_warmup"] = _option(
        "cosine", "shape after the warm-up"
    )
    warmup_ratio: float = _option(0.03, "share of all steps in which the learning rate rises from 0")
    max_grad_norm: float = _option(1.0, "gradients are clipped to this norm; 0: never")
    nan_policy: Literal["stop", "skip"] = _option(
        "stop", "what a step does whose loss or gradient is not finite; either way its samples are named and saved"
    )
    tf32: bool = _option(True, "on CUDA, multiply what is in float32 in TF32")
    gradient_checkpointing: bool = _option(False, "recompute the decoder's activations: less memory, half more work")

    save_steps: int = _option(500, "steps between checkpoints to go on from; one comes at the end")
    save_total_limit: int = _option(2, "number of training checkpoints kept")
    resume_from_checkpoint: bool = _option(
        False,
        "go on from the newest checkpoint in --output_dir (with none: from the beginning), exactly as if never stopped",
    )
    logging_steps: int = _option(10, "steps between lines in metrics.jsonl")
    report_to: list[str] = _options(
        [], f"also log to these, beside metrics.jsonl: {', '.join(TRACKERS)} (WANDB_MODE=offline needs no network)"
    )
    peak_tflops: float = _option(0.0, "of one device, for the model FLOPs utilisation; 0: known from the GPU's name")
    eval_steps: int = _option(
        1000, "steps between evaluations, each of which saves the model too; one comes at the end"
    )
    eval_task: Literal["none", "captions", "vqa", "pope", "exact"] = _option(
        "none", "at each evaluation, also score generated answers beside their controls, as clip-phi evaluate does"
    )
    eval_task_images: int = _option(
        32, "held-out images of each --eval_data that --eval_task asks about: always the first ones"
    )
    metric_for_best_model: str = _option(
        "none",
        "keep the best model beside the newest, in best/: by loss, or by a metric of --eval_task such as CIDEr-D",
    )
    early_stopping_patience: int = _option(
        0, "stop after so many evaluations in a row without a better --metric_for_best_model; 0: never"
    )
    num_sample_texts: int = _option(4, "held-out images whose generated text is written at each evaluation")
    max_new_tokens: int = _option(64, "longest sample text")
    merged: bool = _option(False, "save one whole checkpoint (LoRA folded in) instead of trained weights only")
    push_to_hub: str | None = _option(None, "at the end push the model to this repository, user/name; see docs/hub.md")
    hub_private_repo: bool = _option(False, "if --push_to_hub makes the repository: only you can see it")

    def check(self) -> None:
        """Raises ValueError that lists every bad value and every missing file at once."""
        problems = self.problems()
        if problems:
            raise ValueError("\n       ".join(problems))

    def problems(self) -> list[str]:
        found = []
        counts = ["per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "max_new_tokens"]
        for name in (
            *counts,
            "max_eval_images",
            "eval_task_images",
            "logging_steps",
            "eval_steps",
            "save_steps",
            "save_total_limit",
        ):
            if getattr(self, name) < 1:
                found.append(f"--{name} must be at least 1, not {getattr(self, name)}")
        for name in (
            "max_steps",
            "dataloader_num_workers",
            "num_sample_texts",
            "holdout_images",
            "max_tokens_per_batch",
            "early_stopping_patience",
        ):
            if getattr(self, name) < 0:
                found.append(f"--{name} must not be negative, not {getattr(self, name)}")
        for name in ("max_grad_norm", "peak_tflops"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                found.append(f"--{name} must not be negative, not {getattr(self, name)}")
        for name in ("num_train_epochs", "learning_rate"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                found.append(f"--{name} must be more than 0, not {getattr(self, name)}")
        if not 0 <= self.warmup_ratio <= 1:
            found.append(f"--warmup_ratio must be between 0 and 1, not {self.warmup_ratio}")
        if not 0 <= self.max_bad_fraction < 1:
            found.append(f"--max_bad_fraction must be at least 0 and less than 1, not {self.max_bad_fraction}")
        if unknown := sorted(set(self.report_to) - set(TRACKERS)):
            found.append(f"--report_to: unknown {', '.join(unknown)}; known are {', '.join(TRACKERS)}")
        elif absent := [name for name in self.report_to if not find_spec(name)]:
            found.append(f"--report_to: not installed: pip install {' '.join(absent)}")
        known = ("none", "loss", *JUDGED.get(self.eval_task, ()))
        if self.metric_for_best_model not in known:
            hint = "" if self.eval_task != "none" else "; with --eval_task, its metrics too"
            found.append(f"--metric_for_best_model {self.metric_for_best_model}: choose from {', '.join(known)}{hint}")
        if self.early_stopping_patience and self.metric_for_best_model == "none":
            found.append("--early_stopping_patience needs a --metric_for_best_model")
        return found + self._data_problems()

    def _data_problems(self) -> list[str]:
        found = []
        sources: list[DataSource] = []
        held_out: list[DataSource] = []
        for option, texts, parsed in (("data", self.data, sources), ("eval_data", self.eval_data, held_out)):
            for text in texts:
                try:
                    parsed.append(parse_source(text))
                except (ValueError, OSError) as error:
                    found.append(f"--{option}: {error}")
        missing = [path for source in sources + held_out for path in source.problems()]
        if missing:
            found.append(
                f"not found (looked in {Path.cwd()}): {', '.join(missing)}. {self.how_to_get_data} "
                "'make demo' needs no data: it draws its own."
            )
        if not self.data:
            found.append("nothing to train on: give --data")
        weighted = sum(source.weight is not None for source in sources)
        if 0 < weighted < len(sources):
            found.append("--data: either each source has a weight=, or none has")
        streams = [source.path for source in sources if source.streaming]
        if streams and len(sources) > 1:
            found.append(f"--data: {streams[0]} is streamed, and a stream cannot be mixed: name it alone")
        if streams and not (self.max_steps and held_out):
            found.append(f"--data: {streams[0]} is streamed, and needs --max_steps and --eval_data")
        if streams and self.resume_from_checkpoint:
            found.append(f"--resume_from_checkpoint: {streams[0]} is streamed, and has no position to go on from")
        if streams and self.max_tokens_per_batch:
            found.append(f"--data: {streams[0]} is streamed, and cannot be planned ahead: --max_tokens_per_batch 0")
        if any(source.streaming for source in held_out):
            found.append("--eval_data cannot be streamed")
        names = [source.name for source in held_out]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            found.append(f"--eval_data: several are called {', '.join(twice)}; give them a name=")
        if not held_out and not self.holdout_images:
            found.append("nothing to evaluate on: give --eval_data or --holdout_images")
        return found

    how_to_get_data = ""

    @property
    def conversations_per_image(self) -> int | None:
        """How many captions or conversations of an image share a step; None: all."""
        return None


@dataclass
class Stage1Arguments(TrainingArguments):
    """Stage 1: train the projector alone on captions, from two frozen backbones."""

    vision_backbone: str = _option(VISION_BACKBONE, "Hub id or folder of the vision tower")
    vision_revision: str | None = _option(None, "its branch, tag or commit; the commit found now is pinned")
    text_backbone: str = _option(TEXT_BACKBONE, "Hub id or folder of the decoder")
    text_revision: str | None = _option(None, "its branch, tag or commit; the commit found now is pinned")
    projector_type: Literal["linear", "mlp"] = _option("linear", "one linear layer, or two with GELU between")
    data: list[str] = _options(
        ["coco:data/coco/annotations/captions_train2017.json,images=data/coco/train2017"],
        "what to train on, KIND:PATH[,option=value...]; several are mixed. See README.md",
    )
    eval_data: list[str] = _options(
        ["coco:data/coco/annotations/captions_val2017.json,images=data/coco/val2017"],
        "held-out data, in the same form; without any, --holdout_images are held out",
    )
    captions_per_image: int = _option(5, "captions of an image that share its features in a step; others take turns")

    how_to_get_data = (
        "COCO 2017 is at https://cocodataset.org/#download (train2017.zip, val2017.zip, annotations_trainval2017.zip)."
    )

    def problems(self) -> list[str]:
        found = super().problems()
        if self.captions_per_image < 1:
            found.append(f"--captions_per_image must be at least 1, not {self.captions_per_image}")
        return found

    @property
    def conversations_per_image(self) -> int | None:
        return self.captions_per_image


@dataclass
class Stage2Arguments(TrainingArguments):
    """Stage 2: train the projector and LoRA on the decoder, or all of it, on conversations, from stage 1's result."""

    init_from: str = _option("outputs/stage1", "checkpoint of stage 1 (folder or Hub id)")
    output_dir: str = _option("outputs/stage2", "where checkpoint, metrics.jsonl, curve.png and sample texts go")
    data: list[str] = _options(
        ["llava:data/llava_instruct_150k.json,images=data/coco/train2017"],
        "what to train on, KIND:PATH[,option=value...]; several are mixed. See README.md",
    )
    learning_rate: float = _option(2e-5, "peak learning rate of the projector, after the warm-up")
    per_device_train_batch_size: int = _option(8, "images in one forward pass on one device")
    max_tokens_per_batch: int = _option(
        4096, "instead: as many images as fit into so many tokens, in one forward pass on one device, planned ahead"
    )
    gradient_accumulation_steps: int = _option(4, "forward passes in one step")
    lora_learning_rate: float = _option(2e-4, "peak learning rate of LoRA, after the warm-up")
    lora_r: int = _option(64, "rank of the LoRA matrices")
    lora_alpha: int = _option(128, "LoRA's output is scaled by lora_alpha / lora_r")
    lora_dropout: float = _option(0.05, "dropout before the LoRA matrices")
    lora_targets: str = _option(
        "auto",
        "linear layers of the decoder that get LoRA, by the end of their names; auto: all in its blocks, which in "
        "phi-2 are q_proj,k_proj,v_proj,dense,fc1,fc2",
    )
    tune_decoder: Literal["lora", "full"] = _option(
        "lora", "full: train all weights of the decoder, at --learning_rate, instead of LoRA"
    )
    quantization: Literal["none", "nf4", "int8"] = _option(
        "none", "hold the frozen decoder in 4 bits (nf4, twice quantised: QLoRA) or 8; needs bitsandbytes"
    )
    caption_instruction: str = _option("Describe the image.", "what 'clip-phi caption' asks the trained model")

    how_to_get_data = (
        "LLaVA-Instruct-150K is llava_instruct_150k.json of https://huggingface.co/datasets/liuhaotian/"
        "LLaVA-Instruct-150K; its images are COCO's train2017."
    )

    def problems(self) -> list[str]:
        found = super().problems()
        if self.lora_r < 1:
            found.append(f"--lora_r must be at least 1, not {self.lora_r}")
        if not 0 <= self.lora_dropout < 1:
            found.append(f"--lora_dropout must be at least 0 and less than 1, not {self.lora_dropout}")
        if not self.lora_learning_rate > 0:
            found.append(f"--lora_learning_rate must be more than 0, not {self.lora_learning_rate}")
        if self.quantization != "none" and self.tune_decoder == "full":
            found.append("--tune_decoder full: quantised weights cannot be trained; --quantization none")
        if self.quantization != "none" and self.merged:
            found.append(
                f"--merged: LoRA is not folded into {self.quantization} weights. Save the delta; after training, "
                "ClipPhiForCausalLM.from_pretrained(output_dir).save_pretrained(folder, merged=True) makes a whole one"
            )
        return found


STAGES: dict[int, type[TrainingArguments]] = {1: Stage1Arguments, 2: Stage2Arguments}


def parse_arguments(argv: list[str] | None = None) -> TrainingArguments:
    """The options of the command line over those of --config over the stage's defaults.

    Exits with status 2 and one line that names the option if one is unknown or has a bad value."""
    from transformers import HfArgumentParser

    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--stage")
    first.add_argument("--config")
    early, _ = first.parse_known_args(argv)
    from_file = _read_config(early.config) if early.config else {}
    wanted = early.stage if early.stage is not None else from_file.get("stage")
    asks_help = "--help" in argv or "-h" in argv
    if wanted is None and not asks_help:
        _fail(f"--stage is missing: it is one of {', '.join(map(str, STAGES))}")
    stage = next((known for known in STAGES if str(known) == str(wanted)), None)
    if stage is None and wanted is not None:
        _fail(f"unknown --stage {wanted}: it is one of {', '.join(map(str, STAGES))}")
    kind = STAGES[stage or 1]
    parser = HfArgumentParser(
        kind,
        prog="train_accelerate.py",
        description=f"{kind.__doc__} The other stage's options: --stage {2 if kind is Stage1Arguments else 1} --help.",
        allow_abbrev=False,
    )
    parser.error = _fail  # type: ignore[method-assign]  # one line, not four screens of usage
    names = {each.name for each in dataclasses.fields(kind)}
    if unknown := sorted(from_file.keys() - names):
        _fail(f"unknown option in {early.config}: {', '.join(unknown)} (stage {stage})")
    parser.set_defaults(**{**from_file, "stage": stage})
    for action in parser._actions:
        action.required = False
        if action.nargs == "+":
            action.nargs = "*"  # --eval_data alone: none
    arguments, *rest = parser.parse_args_into_dataclasses(argv, look_for_args_file=False, return_remaining_strings=True)
    if rest[-1]:
        _fail(f"unknown option in stage {stage}: {' '.join(rest[-1])}")
    for name, value in from_file.items():  # argparse has converted the strings among them
        if name in ("data", "eval_data"):
            if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
                _fail(f"{early.config}: {name} must be a list of sources, not {value!r}")
            continue
        usual = getattr(kind, name, None)
        wanted = (int, float, str) if isinstance(usual, float) else (type(usual), str)
        if usual is not None and not isinstance(value, wanted):
            _fail(f"{early.config}: {name} must be {type(usual).__name__}, not {value!r}")
    return arguments


def _read_config(path: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        _fail(f"no such file: --config {path}")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        _fail(f"--config {path} is not yaml: {' '.join(str(error).split())}")
    if not isinstance(content, dict):
        _fail(f"--config {path} must be a mapping of options to values")
    return content


def _fail(message: str) -> NoReturn:
    print(f"train_accelerate.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)
