"""Every option of train_accelerate.py, typed, with its default. Nothing heavy is imported here."""

import argparse
import dataclasses
import difflib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import yaml

from ..data.files import is_missing_folder
from ..data.source import DataSource, missing_files, parse_source

VISION_BACKBONE = "wkcn/TinyCLIP-ViT-61M-32-Text-29M-LAION400M"
TEXT_BACKBONE = "microsoft/phi-2"
TRACKERS = ("tensorboard", "wandb", "trackio")
NEWEST = "newest"  # --resume_from_checkpoint without a value
# What --metric_for_best_model may be with each --eval_task, beside the loss.
METRICS = {
    "captions": ("CIDEr-D", "CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"),
    "vqa": ("vqa_accuracy", "exact_match"),
    "pope": ("accuracy", "f1", "precision", "recall"),
    "exact": ("exact_match",),
}
# The groups of --help, in its order.
GROUPS = {
    "run": "stage config output_dir resume_from_checkpoint seed debug",
    "data": "data eval_data holdout_images max_eval_images max_length max_bad_fraction dataloader_num_workers "
    "image_processing cache_features",
    "model": "vision_backbone text_backbone vision_revision text_revision projector_type vision_feature_layer "
    "vision_feature_select_strategy init_from tune_decoder "
    "lora_r lora_alpha lora_dropout lora_targets quantization merged caption_instruction",
    "batches": "per_device_train_batch_size max_tokens_per_batch tokens_per_optimizer_step gradient_accumulation_steps "
    "num_train_epochs max_steps captions_per_image per_device_eval_batch_size",
    "optimisation": "learning_rate lora_learning_rate optim lr_scheduler_type warmup_ratio weight_decay max_grad_norm "
    "gradient_checkpointing mixed_precision attention tf32 nan_policy",
    "checkpoints": "save_steps save_total_limit",
    "evaluation": "eval_steps eval_task eval_task_images metric_for_best_model early_stopping_patience "
    "num_sample_texts max_new_tokens",
    "logging": "logging_steps report_to peak_tflops",
    "Hub": "push_to_hub hub_private_repo",
}
Bound = tuple[str, Callable[[float], bool]]
AT_LEAST_1: Bound = ("at least 1", lambda value: value >= 1)
NOT_NEGATIVE: Bound = ("at least 0", lambda value: 0 <= value < math.inf)
POSITIVE: Bound = ("more than 0", lambda value: 0 < value < math.inf)
SHARE: Bound = ("between 0 and 1", lambda value: 0 <= value <= 1)
BELOW_1: Bound = ("at least 0 and less than 1", lambda value: 0 <= value < 1)


def _option(default: Any, help: str, bound: Bound | None = None) -> Any:
    """A field with its line of --help. bound: what a number must be, in words and as a check."""
    metadata = {"help": help, "bound": bound}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _default(name: str, default: Any) -> Any:
    """The field of TrainingArguments with another default."""
    metadata = TrainingArguments.__dataclass_fields__[name].metadata
    return _option(default, metadata["help"], metadata["bound"])


@dataclass
class TrainingArguments:
    """What both stages share. WHERE it runs (devices, precision) is Accelerate's yaml; see accelerate_config.yaml.

    Names are those of transformers.TrainingArguments and peft.LoraConfig where these have one."""

    stage: int = field(metadata={"help": "1: projector alone, on captions; 2: projector and LoRA, on conversations"})
    config: str | None = _option(None, "yaml file of these options; the command line overrides it")
    output_dir: str = _option("outputs/stage1", "folder of the model, training checkpoints, metrics.jsonl, curve.png")
    resume_from_checkpoint: str | None = _option(
        None, "training checkpoint to resume; bare: the newest, if there is one"
    )
    seed: int = _option(0, "seed of the order, the dropout and the new weights")
    debug: bool = _option(False, "traceback of an error instead of one line")

    data: list[str] = _option([], "training data, KIND:PATH[,option=value...]; several are mixed. See docs/data.md")
    eval_data: list[str] = _option(
        [], "held-out data in the same form; without a value, or with --data alone: --holdout_images of --data"
    )
    holdout_images: int = _option(
        500,
        "images held out of --data if there is no --eval_data; the default is at most a tenth of them",
        NOT_NEGATIVE,
    )
    max_eval_images: int = _option(500, "images evaluated on, the first of each --eval_data", AT_LEAST_1)
    max_length: int = _option(2048, "longest conversation in tokens, image included; longer ones are cut", AT_LEAST_1)
    max_bad_fraction: float = _option(0.01, "largest share of damaged records before the run stops; 0: none", BELOW_1)
    dataloader_num_workers: int = _option(4, "processes that read images; 0: the training process", NOT_NEGATIVE)
    image_processing: Literal["exact", "fast"] = _option(
        "exact", "exact: the image processor's; fast: one of 256 levels off in 1 of 100 values (needs simplejpeg)"
    )
    cache_features: str | None = _option(None, "folder for the vision tower's features; later epochs open no image")

    per_device_train_batch_size: int = _option(
        16, "images in a forward pass on one device, without --max_tokens_per_batch", AT_LEAST_1
    )
    max_tokens_per_batch: int | Literal["auto"] = _option(
        "auto",
        "tokens in a device's forward pass, instead of images; auto: on CUDA as many as fit; 0: off",
        NOT_NEGATIVE,
    )
    tokens_per_optimizer_step: int = _option(
        8192, "tokens in one step on all devices; with --max_tokens_per_batch, the accumulation follows", AT_LEAST_1
    )
    gradient_accumulation_steps: int = _option(1, "forward passes in one step", AT_LEAST_1)
    num_train_epochs: float = _option(1.0, "passes over the training images", POSITIVE)
    max_steps: int = _option(0, "number of steps, instead of --num_train_epochs; 0: off", NOT_NEGATIVE)
    per_device_eval_batch_size: int = _option(0, "images per evaluation pass; 0: as many as in training", NOT_NEGATIVE)

    learning_rate: float = _option(1e-3, "peak learning rate of the projector, after the warm-up", POSITIVE)
    optim: Literal["auto", "adam8bit", "paged_adam8bit", "adamw_torch_fused"] = _option(
        "auto", "optimizer; paged: its states may leave the GPU; auto: adam8bit on CUDA, adamw_torch_fused elsewhere"
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant_with_warmup"] = _option(
        "cosine", "shape of the learning rate after the warm-up"
    )
    warmup_ratio: float = _option(0.03, "share of all steps in which the learning rate rises from 0", SHARE)
    weight_decay: float = _option(0.0, "weight decay of all trained weights but the biases")
    max_grad_norm: float = _option(1.0, "largest norm of the gradients, clipped to it; 0: no clipping", NOT_NEGATIVE)
    gradient_checkpointing: bool = _option(False, "recomputed activations of the decoder: less memory, half more work")
    mixed_precision: Literal["auto", "bf16", "fp16", "no"] = _option(
        "auto", "precision of the products; auto: by the launcher's yaml or option, else by the GPU"
    )
    attention: Literal["auto", "varlen", "sdpa"] = _option(
        "auto", "attention in packs; varlen: FlashAttention's kernel; auto: varlen in stage 2 where there is one"
    )
    tf32: bool = _option(True, "TF32 for products of float32 matrices on CUDA")
    nan_policy: Literal["stop", "skip"] = _option("stop", "reaction to a non-finite loss or gradient; it is saved")

    save_steps: int = _option(500, "steps between training checkpoints; one is written at the end", AT_LEAST_1)
    save_total_limit: int = _option(2, "training checkpoints kept, the newest ones", AT_LEAST_1)
    merged: bool = _option(False, "one whole model with LoRA folded in, instead of the trained weights only")

    eval_steps: int = _option(1000, "steps between evaluations that save the model; one is at the end", AT_LEAST_1)
    eval_task: Literal["none", "captions", "vqa", "pope", "exact"] = _option(
        "none", "task whose metrics each evaluation measures, with and without the image, as clip-phi evaluate does"
    )
    eval_task_images: int = _option(32, "images for --eval_task, the first of each --eval_data", AT_LEAST_1)
    metric_for_best_model: str = _option("none", "loss or metric of --eval_task that selects best/; none: no best/")
    early_stopping_patience: int = _option(0, "evaluations without a new best/ until the stop; 0: never", NOT_NEGATIVE)
    num_sample_texts: int = _option(4, "held-out images with a sample text at each evaluation", NOT_NEGATIVE)
    max_new_tokens: int = _option(64, "longest generated text in tokens", AT_LEAST_1)

    logging_steps: int = _option(10, "steps between lines of the log", AT_LEAST_1)
    report_to: list[str] = _option([], f"trackers beside metrics.jsonl: {', '.join(TRACKERS)}")
    peak_tflops: float = _option(0.0, "peak of one device for the MFU, in TFLOP/s; 0: by the GPU's name", NOT_NEGATIVE)

    push_to_hub: str | None = _option(None, "Hub repository user/name for the model at the end; see docs/hub.md")
    hub_private_repo: bool = _option(False, "private repository, if --push_to_hub makes a new one")

    # The names of the options that the command line or --config gives, and do not come from the defaults.
    given: frozenset[str] = frozenset()

    def check(self) -> None:
        """Raises ValueError that lists every bad value and every missing file at once."""
        if problems := self.problems():
            raise ValueError("\n       ".join(problems))

    def problems(self) -> list[str]:
        found = []
        for each in dataclasses.fields(self):
            words, is_inside = each.metadata.get("bound") or ("", None)
            value = getattr(self, each.name)
            if is_inside is not None and value != "auto" and not is_inside(value):
                found.append(f"--{each.name} must be {words}, not {value}")
        for name in ("vision_backbone", "text_backbone", "init_from"):
            value = getattr(self, name, ".")
            if is_missing_folder(value, id_needs_user=name == "init_from"):
                hint = "'make demo' needs no download: it has its own backbones"
                found.append(f"--{name} {value}: there is no such folder, and a Hub id is user/name. {hint}")
        if self.eval_data and "holdout_images" in self.given:
            found.append("--holdout_images has no effect with --eval_data: add --eval_data without a value")
        if self.eval_task == "none" and "eval_task_images" in self.given:
            found.append("--eval_task_images has no effect without --eval_task")
        if self.packs and "per_device_train_batch_size" in self.given:
            found.append(
                f"--per_device_train_batch_size has no effect with --max_tokens_per_batch {self.max_tokens_per_batch}: "
                "leave it out, or add --max_tokens_per_batch 0"
            )
        if "tokens_per_optimizer_step" in self.given:
            if "gradient_accumulation_steps" in self.given:
                found.append("--tokens_per_optimizer_step decides --gradient_accumulation_steps: give one of the two")
            if self.max_tokens_per_batch == 0 or (not self.packs and "per_device_train_batch_size" in self.given):
                found.append("--tokens_per_optimizer_step needs --max_tokens_per_batch, auto or a number")
        if unknown := sorted(set(self.report_to) - set(TRACKERS)):
            found.append(f"--report_to: unknown {', '.join(unknown)}; known are {', '.join(TRACKERS)}")
        elif absent := [name for name in self.report_to if not find_spec(name)]:
            found.append(f"--report_to: not installed: pip install {' '.join(absent)}")
        known = ("none", "loss", *METRICS.get(self.eval_task, ()))
        if self.metric_for_best_model not in known:
            hint = "" if self.eval_task != "none" else "; with --eval_task, its metrics too"
            found.append(f"--metric_for_best_model {self.metric_for_best_model}: choose from {', '.join(known)}{hint}")
        if self.early_stopping_patience and self.metric_for_best_model == "none":
            found.append("--early_stopping_patience needs a --metric_for_best_model")
        if self.hub_private_repo and not self.push_to_hub:
            found.append("--hub_private_repo requires --push_to_hub")
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
        if missing := missing_files(sources + held_out):
            found.append(f"{missing}. 'make demo' needs no data: it draws its own.")
        if not self.data:
            found.append("--data is required")
        weighted = sum(source.weight is not None for source in sources)
        if 0 < weighted < len(sources):
            found.append("--data: either each source has a weight=, or none has")
        if streams := [source.path for source in sources if source.streaming]:
            refused = {
                "cannot be mixed: name it alone": len(sources) > 1,
                "needs --max_steps and --eval_data": not (self.max_steps and held_out),
                "has no position to resume from: no --resume_from_checkpoint": bool(self.resume_from_checkpoint),
                "cannot be planned ahead: --max_tokens_per_batch 0": self.packs,
            }
            found += [f"--data: {streams[0]} is streamed, and {why}" for why, holds in refused.items() if holds]
        if any(source.streaming for source in held_out):
            found.append("--eval_data cannot be streamed")
        names = [source.name for source in held_out]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            found.append(f"--eval_data: several are called {', '.join(twice)}; give them a name=")
        if not held_out and not self.holdout_images:
            found.append("nothing to evaluate on: give --eval_data or --holdout_images")
        return found

    @property
    def packs(self) -> bool:
        """Whether batches are packs of tokens on any device. In stage 1 auto is fixed batches on a CPU."""
        if self.max_tokens_per_batch == "auto":
            return isinstance(self, Stage2Arguments) or "max_tokens_per_batch" in self.given
        return self.max_tokens_per_batch > 0

    @property
    def conversations_per_image(self) -> int | None:
        """How many captions or conversations of an image share a step; None: all."""
        return self.captions_per_image if isinstance(self, Stage1Arguments) else None


@dataclass
class Stage1Arguments(TrainingArguments):
    """Stage 1: train the projector alone on captions, from two frozen backbones."""

    vision_backbone: str = _option(VISION_BACKBONE, "Hub id or folder of the vision tower")
    vision_revision: str | None = _option(None, "branch, tag or commit of --vision_backbone; its commit is pinned")
    text_backbone: str = _option(TEXT_BACKBONE, "Hub id or folder of the decoder")
    text_revision: str | None = _option(None, "branch, tag or commit of --text_backbone; its commit is pinned")
    projector_type: Literal["linear", "mlp", "norm_mlp"] = _option(
        "linear", "projector of one layer; of two with GELU between; or of one layer, a norm and two more"
    )
    vision_feature_layer: int = _option(
        -2, "hidden state of the tower that the projector gets: 0 is the embedding, -1 the last layer's"
    )
    vision_feature_select_strategy: Literal["default", "full"] = _option(
        "default", "features of that layer: the patches alone, or CLS and registers too"
    )
    data: list[str] = _default(
        "data", ["coco:data/coco/annotations/captions_train2017.json,images=data/coco/train2017"]
    )
    eval_data: list[str] = _default(
        "eval_data", ["coco:data/coco/annotations/captions_val2017.json,images=data/coco/val2017"]
    )
    captions_per_image: int = _option(5, "captions of an image in one step; the others take turns", AT_LEAST_1)


@dataclass
class Stage2Arguments(TrainingArguments):
    """Stage 2: train the projector and LoRA on the decoder, or all of it, on conversations, from a trained model."""

    init_from: str = _option(
        "outputs/stage1", "model to start from, folder or Hub id; a LoRA adapter that it has is trained on"
    )
    output_dir: str = _default("output_dir", "outputs/stage2")
    data: list[str] = _default("data", ["llava:data/llava_instruct_150k.json,images=data/coco/train2017"])
    learning_rate: float = _default("learning_rate", 2e-5)
    per_device_train_batch_size: int = _default("per_device_train_batch_size", 8)
    tokens_per_optimizer_step: int = _default("tokens_per_optimizer_step", 16384)
    gradient_accumulation_steps: int = _default("gradient_accumulation_steps", 4)
    lora_learning_rate: float = _option(2e-4, "peak learning rate of LoRA, after the warm-up", POSITIVE)
    lora_r: int = _option(64, "rank of the LoRA matrices", AT_LEAST_1)
    lora_alpha: int = _option(128, "scale of LoRA's output: lora_alpha / lora_r")
    lora_dropout: float = _option(0.05, "dropout before the LoRA matrices", BELOW_1)
    lora_targets: str = _option(
        "auto", "linear layers with LoRA, such as q_proj,fc1; auto: all in the decoder's blocks"
    )
    tune_decoder: Literal["lora", "full"] = _option(
        "lora", "trained weights of the decoder; full: all of them, at --learning_rate, instead of LoRA"
    )
    quantization: Literal["none", "nf4", "int8"] = _option(
        "none", "precision of the frozen decoder: 4 bits (nf4, twice quantised: QLoRA) or 8; needs bitsandbytes"
    )
    caption_instruction: str = _option("Describe the image.", "question with which 'clip-phi caption' asks the model")

    def problems(self) -> list[str]:
        found = super().problems()
        if self.tune_decoder == "full":
            unused = sorted(name for name in self.given if name.startswith("lora_"))
            found += [f"--{name} has no effect with --tune_decoder full: leave it out" for name in unused]
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
    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--stage")
    first.add_argument("--config")
    early, _ = first.parse_known_args(argv)
    content = _read_config(early.config) if early.config else {}
    wanted = early.stage or content.get("stage") or (1 if {"--help", "-h"} & set(argv) else None)
    stage = next((known for known in STAGES if str(known) == str(wanted)), 0)
    if not stage:
        problem = f"unknown --stage {wanted}" if wanted else "--stage is missing"
        _fail(f"{problem}: it is one of {', '.join(map(str, STAGES))}")
    kind, parser = STAGES[stage], _make_parser(stage)
    values = _parse(parser, stage, list(_as_argv(kind, content, early.config)), f"{early.config}: ")
    values |= _parse(parser, stage, argv, "")
    given = frozenset(values)
    if "data" in values:  # the default of --eval_data is held out of the default of --data
        values.setdefault("eval_data", [])
    return kind(**values, given=given)


def _make_parser(stage: int) -> argparse.ArgumentParser:
    kind = STAGES[stage]
    parser = argparse.ArgumentParser(
        prog="train_accelerate.py",
        usage="%(prog)s --stage {1,2} [--config FILE] [--OPTION VALUE ...]",
        description=f"{kind.__doc__} The other stage's options: --stage {3 - stage} --help.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # so that only what is given is found
    )
    hints, defaults = get_type_hints(kind), kind(stage)
    helps = {each.name: each.metadata["help"] for each in dataclasses.fields(kind) if "help" in each.metadata}
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in filter(helps.__contains__, names.split()):
            hint, usual = hints[name], getattr(defaults, name)
            if get_origin(hint) is Literal:
                how: dict[str, Any] = {"choices": get_args(hint)}
            elif get_origin(hint) is list:
                how = {"nargs": "*", "metavar": "TEXT"}
            elif hint is bool:
                how = {"type": _boolean, "nargs": "?", "const": True, "metavar": "BOOL"}
            elif name == "max_tokens_per_batch":
                how = {"type": _tokens, "metavar": "N"}
            elif name == "resume_from_checkpoint":
                how = {"nargs": "?", "const": NEWEST, "metavar": "FOLDER"}
            else:
                convert, metavar = {int: (int, "N"), float: (float, "X")}.get(hint, (str, "TEXT"))
                how = {"type": convert, "metavar": metavar}
            usual = " ".join(usual) if isinstance(usual, list) else usual
            shown = "" if usual in (None, "") or name == "stage" else f" (default: {usual})"
            group.add_argument(f"--{name}", help=(helps[name] + shown).replace("%", "%%"), **how)
    return parser


def _parse(parser: argparse.ArgumentParser, stage: int, argv: list[str], place: str) -> dict[str, Any]:
    """The options that argv gives, by name. place: what errors begin with."""
    parser.error = lambda message: _fail(place + message)  # type: ignore[method-assign]  # not four screens of usage
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].partition("=")[0].lstrip("-")
        near = difflib.get_close_matches(name, [action.dest for action in parser._actions], 1)
        hint = f"; did you mean --{near[0]}?" if near else ""
        if any(name in other.__dataclass_fields__ for other in STAGES.values()):
            hint = "; it is an option of the other stage"
        _fail(f"{place}unknown option in stage {stage}: {' '.join(unknown)}{hint}")
    return vars(values)


def _as_argv(kind: type[TrainingArguments], content: dict[str, Any], path: str) -> Iterator[str]:
    """What a yaml file gives, in the words of the command line, by which it is converted and checked."""
    hints = get_type_hints(kind)
    for name, value in content.items():
        if isinstance(value, list) and get_origin(hints.get(name, list[str])) is list:
            yield from (f"--{name}", *map(str, value))
        elif value is None:
            _fail(f"{path}: {name} has no value: leave the line out")
        else:
            yield f"--{name}={value}"


def _tokens(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from None


def _boolean(text: str) -> bool:
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return known[text.lower()]


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
