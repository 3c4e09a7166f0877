"""clip-phi plan and doctor: what a training run needs, and what this machine has."""

import argparse
import json

from .common import check_model


def run_plan(arguments: argparse.Namespace) -> None:
    from ..training.arguments import STAGES

    if not 0 < arguments.mfu <= 1:
        raise ValueError(f"--mfu must be more than 0 and at most 1, not {arguments.mfu}")
    options = {"optim": arguments.optim, "gradient_checkpointing": arguments.gradient_checkpointing}
    for name, stage in {"captions_per_image": 1, "lora_r": 2, "tune_decoder": 2, "quantization": 2}.items():
        if (value := getattr(arguments, name)) is not None:
            options[name] = value
            if stage != arguments.stage:
                raise ValueError(f"--{name} requires --stage {stage}, not --stage {arguments.stage}")
    if arguments.tune_decoder == "full" and arguments.quantization in ("nf4", "int8"):
        raise ValueError(f"--quantization {arguments.quantization}: quantized weights cannot be trained")
    from modeling_clip_phi import ClipPhiConfig

    from ..tools.plan import CARDS, format_plan, make_plan

    if arguments.gpu not in CARDS:
        raise ValueError(f"unknown --gpu {arguments.gpu}: it is one of {', '.join(CARDS)}")
    check_model(arguments.model or ".")
    config = ClipPhiConfig() if arguments.model is None else ClipPhiConfig.from_pretrained(arguments.model)
    training = STAGES[arguments.stage](stage=arguments.stage, **options)
    plan = make_plan(training, CARDS[arguments.gpu], arguments.mfu, config)
    print(json.dumps(plan) if arguments.json else format_plan(plan))


def run_doctor(arguments: argparse.Namespace) -> int:
    from ..tools.doctor import doctor

    return doctor(arguments.json, arguments.debug)
