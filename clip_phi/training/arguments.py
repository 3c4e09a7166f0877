"""Every option of train_accelerate.py, typed, with its default. Nothing heavy is imported here."""

import argparse
import dataclasses
import difflib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import yaml

from ..data.files import is_missing_folder
from ..data.source import DataSource, missing_files, parse_source
from ..environment import BOUNDS, cpu_cores

VISION_BACKBONE = "wkcn/TinyCLIP-ViT-61M-32-Text-29M-LAION400M"
TEXT_BACKBONE = "microsoft/phi-2"
TRACKERS = ("tensorboard", "wandb", "trackio")
NEWEST = "newest"  # --resume_from_checkpoint without a value
# options.yaml, beside this module: the groups of --help, in its order, with all options and what is said of each.
GROUPS = yaml.safe_load(Path(__file__).with_name("options.yaml").read_text(encoding="utf-8"))
OPTIONS: dict[str, dict[str, Any]] = {name: about for group in GROUPS.values() for name, about in group.items()}
METRICS: dict[str, list[str]] = OPTIONS["metric_for_best_model"]["metrics"]


def _list(*texts: str) -> Any:
    """A field with this list as its default."""
    return field(default_factory=lambda: list(texts))


def usual_workers() -> int:
    """One for each CPU core, shared among the launcher's processes of this machine; at most 8."""
    return max(1, min(8, cpu_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


@dataclass
class TrainingArguments:
    """What both stages share. WHERE it runs (devices, precision) is Accelerate's yaml; see accelerate_config.yaml.

    Names are those of transformers.TrainingArguments and peft.LoraConfig where these have one."""

    stage: int
    config: str | None = None
    output_dir: str = "outputs/stage1"
    resume_from_checkpoint: str | None = None
    seed: int = 0
    debug: bool = False

    data: list[str] = _list()
    eval_data: list[str] = _list()
    holdout_images: int = 500
    max_eval_images: int = 500
    max_length: int = 2048
    max_bad_fraction: float = 0.01
    dataloader_num_workers: int = field(default_factory=usual_workers)
    image_processing: Literal["exact", "fast"] = "exact"
    cache_features: str | None = None

    per_device_train_batch_size: int = 16
    max_tokens_per_batch: int | Literal["auto"] = "auto"
    tokens_per_optimizer_step: int = 8192
    gradient_accumulation_steps: int = 1
    num_train_epochs: float = 1.0
    max_steps: int = 0
    per_device_eval_batch_size: int = 0

    learning_rate: float = 1e-3
    optim: Literal["auto", "adam8bit", "paged_adam8bit", "adamw_torch_fused"] = "auto"
    lr_scheduler_type: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    mixed_precision: Literal["auto", "bf16", "fp16", "no"] = "auto"
    attention: Literal["auto", "varlen", "sdpa"] = "auto"
    tf32: bool = True
    nan_policy: Literal["stop", "skip"] = "stop"

    save_steps: int = 500
    save_total_limit: int = 2
    merged: bool = False

    eval_steps: int = 1000
    eval_task: Literal["none", "captions", "vqa", "pope", "exact"] = "none"
    eval_task_images: int = 32
    metric_for_best_model: str = "none"
    early_stopping_patience: int = 0
    num_sample_texts: int = 4
    max_new_tokens: int = 64

    logging_steps: int = 10
    report_to: list[str] = _list()
    peak_tflops: float = 0.0

    push_to_hub: str | None = None
    hub_private_repo: bool = False

    # The names of the options that the command line or --config gives, and do not come from the defaults.
    given: frozenset[str] = frozenset()

    def check(self) -> None:
        """Raises ValueError that lists every bad value and every missing file at once."""
        if problems := self.problems():
            raise ValueError("\n       ".join(problems))

    def problems(self) -> list[str]:
        found = []
        for each in dataclasses.fields(self):
            bound, value = each.metadata.get("bound"), getattr(self, each.name)
            if bound is not None and value != "auto" and not BOUNDS[bound](value):
                found.append(f"--{each.name} must be {bound}, not {value}")
            if value == "":
                found.append(f"--{each.name} has no value: leave it out")
        for name in ("vision_backbone", "text_backbone", "init_from"):
            value = getattr(self, name, ".")
            if is_missing_folder(value, id_needs_user=name == "init_from"):
                hint = "'make demo' needs no download: it has its own backbones"
                found.append(f"--{name} {value}: there is no such folder, and a Hub id is user/name. {hint}")
        packs, tokens = f"with --max_tokens_per_batch {self.max_tokens_per_batch}", "tokens_per_optimizer_step"
        by_images = self.max_tokens_per_batch == 0 or (not self.packs and "per_device_train_batch_size" in self.given)
        patience, metric = self.early_stopping_patience, self.metric_for_best_model
        unused = {
            "holdout_images": self.eval_data and "with --eval_data: add --eval_data without a value",
            "eval_task_images": self.eval_task == "none" and "without --eval_task",
            "per_device_train_batch_size": self.packs and f"{packs}: leave it out, or add --max_tokens_per_batch 0",
            "early_stopping_patience": patience and metric == "none" and "without --metric_for_best_model",
            "hub_private_repo": self.hub_private_repo and not self.push_to_hub and "without --push_to_hub",
            tokens: by_images and "on batches of images: add --max_tokens_per_batch, auto or a number",
            "gradient_accumulation_steps": tokens in self.given and f"with --{tokens}",
            "vision_revision": Path(getattr(self, "vision_backbone", "-")).is_dir() and "with a folder as backbone",
            "text_revision": Path(getattr(self, "text_backbone", "-")).is_dir() and "with a folder as backbone",
        }
        found += [f"--{name} has no effect {why}" for name, why in unused.items() if why and name in self.given]
        if unknown := sorted(set(self.report_to) - set(TRACKERS)):
            found.append(f"--report_to: unknown {', '.join(unknown)}; known are {', '.join(TRACKERS)}")
        elif absent := [name for name in self.report_to if not find_spec(name)]:
            found.append(f"--report_to: not installed: pip install {' '.join(absent)}")
        known = ("none", "loss", *METRICS.get(self.eval_task, ()))
        if metric not in known:
            hint = "" if self.eval_task != "none" else "; with --eval_task, its metrics too"
            found.append(f"--metric_for_best_model {metric}: choose from {', '.join(known)}{hint}")
        return found + self._data_problems()

    def _data_problems(self) -> list[str]:
        found, sources, held_out = list[str](), list[DataSource](), list[DataSource]()
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

    vision_backbone: str = VISION_BACKBONE
    vision_revision: str | None = None
    text_backbone: str = TEXT_BACKBONE
    text_revision: str | None = None
    projector_type: Literal["linear", "mlp", "norm_mlp"] = "linear"
    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    data: list[str] = _list("coco:data/coco/annotations/captions_train2017.json,images=data/coco/train2017")
    eval_data: list[str] = _list("coco:data/coco/annotations/captions_val2017.json,images=data/coco/val2017")
    captions_per_image: int = 5


@dataclass
class Stage2Arguments(TrainingArguments):
    """Stage 2: train the projector and LoRA on the decoder, or all of it, on conversations, from a trained model."""

    init_from: str = "outputs/stage1"
    output_dir: str = "outputs/stage2"
    data: list[str] = _list("llava:data/llava_instruct_150k.json,images=data/coco/train2017")
    learning_rate: float = 2e-5
    per_device_train_batch_size: int = 8
    tokens_per_optimizer_step: int = 16384
    gradient_accumulation_steps: int = 4
    lora_learning_rate: float = 2e-4
    lora_r: int = 64
    lora_alpha: int = 128
    lora_dropout: float = 0.05
    lora_targets: str = "auto"
    tune_decoder: Literal["lora", "full"] = "lora"
    quantization: Literal["none", "nf4", "int8"] = "none"
    caption_instruction: str = "Describe the image."

    def problems(self) -> list[str]:
        found = super().problems()
        unused = sorted(name for name in self.given if name.startswith("lora_") and self.tune_decoder == "full")
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
for _field in (each for kind in STAGES.values() for each in dataclasses.fields(kind)):
    _field.metadata = MappingProxyType(OPTIONS.get(_field.name, {}))


def parse_arguments(argv: list[str] | None = None) -> TrainingArguments:
    """The options of the command line over those of --config over the stage's defaults.

    Exits with status 2 and one line that names the option if one is unknown or has a bad value."""
    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.error = _fail  # type: ignore[method-assign]  # not the usage
    first.add_argument("--stage")
    first.add_argument("--config")
    early, _ = first.parse_known_args(argv)
    content = {} if early.config is None else _read_config(early.config)
    wanted = early.stage or content.get("stage") or (1 if {"--help", "-h"} & set(argv) else None)
    stage = next((known for known in STAGES if str(known) == str(wanted)), 0)
    if not stage:
        problem = f"unknown --stage {wanted}" if wanted else "--stage is missing"
        _fail(f"{problem}: it is one of {', '.join(map(str, STAGES))}")
    kind, parser = STAGES[stage], _make_parser(stage)
    values = _parse(parser, stage, list(_as_argv(kind, content, early.config)), f"{early.config}: ")
    values |= _parse(parser, stage, argv, "")
    # The default of --eval_data is held out of the default of --data.
    own: dict[str, Any] = {"eval_data": []} if "data" in values else {}
    return kind(**own | values, given=frozenset(values))


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
    kinds: dict[Any, dict[str, Any]] = {
        int: {"type": int, "metavar": "N"},
        float: {"type": float, "metavar": "X"},
        bool: {"type": _boolean, "nargs": "?", "const": True, "metavar": "BOOL"},
        list[str]: {"nargs": "*", "action": "extend", "metavar": "TEXT"},
        hints["max_tokens_per_batch"]: {"type": _tokens, "metavar": "N"},
    }
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in filter(hints.__contains__, names):
            hint, usual = hints[name], getattr(defaults, name)
            how = {"choices": get_args(hint)} if get_origin(hint) is Literal else kinds.get(hint, {"metavar": "TEXT"})
            if name == "resume_from_checkpoint":
                how = {"nargs": "?", "const": NEWEST, "metavar": "FOLDER"}
            usual = " ".join(usual) if isinstance(usual, list) else usual
            shown = "" if usual in (None, "") or name == "stage" else f" (default: {usual})"
            group.add_argument(f"--{name}", help=(names[name]["help"] + shown).replace("%", "%%"), **how)
    return parser


def _parse(parser: argparse.ArgumentParser, stage: int, argv: list[str], place: str) -> dict[str, Any]:
    """The options that argv gives, by name. place: what errors begin with."""
    parser.error = lambda message: _fail(place + message)  # type: ignore[method-assign]  # not four screens of usage
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].partition("=")[0].lstrip("-")
        near = difflib.get_close_matches(name, [action.dest for action in parser._actions], 1)
        hint = f"; did you mean --{near[0]}?" if near else ""
        if name in OPTIONS and name not in STAGES[stage].__dataclass_fields__:
            hint = "; it is an option of the other stage"
        _fail(f"{place}unknown option in stage {stage}: {' '.join(unknown)}{hint}")
    return vars(values)


def _as_argv(kind: type[TrainingArguments], content: dict[str, Any], path: str) -> Iterator[str]:
    """What a yaml file gives, in the words of the command line, by which it is converted and checked."""
    hints = get_type_hints(kind)
    for name, value in content.items():
        if isinstance(value, list) and get_origin(hints.get(name, list[str])) is list:
            yield from [f"--{name}={text}" for text in value] or [f"--{name}"]
        elif str(value).lower() in ("", "~", "null"):
            _fail(f"{path}: {name} has no value: leave the line out")
        else:
            yield f"--{name}={value}"


def _tokens(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from None


def _boolean(text: str) -> bool:
    known = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return known[text.lower()]


def _read_config(path: str) -> dict[str, Any]:
    """The options of a yaml file. Each value is the text that is written there: no is "no", and 010 is "010"."""
    try:
        loader = yaml.BaseLoader(Path(path).read_text(encoding="utf-8"))
        if not isinstance(root := loader.get_single_node(), yaml.MappingNode):
            _fail(f"--config {path} must be a mapping of options to values")
        pairs = [[loader.construct_object(node, deep=True) for node in pair] for pair in root.value]
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        _fail(f"--config {path} cannot be read as yaml: {' '.join(str(error).split())}")
    names = ["config", *(str(name) for name, _ in pairs)]
    if twice := [name for name in names if names.count(name) > 1]:
        _fail(f"--config {path}: {twice[0]} is given twice")
    return {str(name): value for name, value in pairs}


def _fail(message: str) -> NoReturn:
    print(f"train_accelerate.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)
