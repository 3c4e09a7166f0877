"""clip-phi plan and doctor: what a run needs, and what this machine has."""

import argparse
import json
from typing import Any

from .common import positive


def add_to(commands: Any) -> None:
    plan = commands.add_parser("plan", help="what a training run needs: memory by item, the largest step, hours")
    cards = "a100-40, a100-80, h100-80, h200-141, l4-24, t4-16, rtx-8, rtx-24, or cpu-16 (no GPU, in float32)"
    plan.add_argument("--gpu", required=True, help=cards)
    plan.add_argument("--stage", type=int, choices=(1, 2), default=1, help="of training (default: %(default)s)")
    plan.add_argument("--checkpoint", help="plan for this checkpoint's parts instead of TinyCLIP and phi-2")
    plan.add_argument("--mfu", type=float, default=0.4, help="assumed share of the card's peak (default: %(default)s)")
    optimizers = ("auto", "adam8bit", "paged_adam8bit", "adamw_torch_fused")
    plan.add_argument("--optim", choices=optimizers, default="auto", help="(default: %(default)s, as in training)")
    plan.add_argument("--captions_per_image", type=positive, help="of stage 1 (default: that of training)")
    plan.add_argument("--lora_r", type=positive, help="of stage 2 (default: that of training)")
    plan.add_argument("--tune_decoder", choices=("lora", "full"), help="of stage 2 (default: lora)")
    plan.add_argument("--quantization", choices=("none", "nf4", "int8"), help="of stage 2 (default: none)")
    plan.add_argument("--gradient_checkpointing", action="store_true", help="recompute the decoder's activations")
    plan.add_argument("--json", action="store_true", help="print a json object instead of the table")
    plan.set_defaults(run=run_plan)

    doctor = commands.add_parser("doctor", help="check the installation and this machine, and how to mend each trap")
    doctor.add_argument("--json", action="store_true", help="print a json object instead of the lines")
    doctor.set_defaults(run=run_doctor)


def run_plan(arguments: argparse.Namespace) -> None:
    from ..training.arguments import STAGES

    if not 0 < arguments.mfu <= 1:
        raise ValueError(f"--mfu must be more than 0 and at most 1, not {arguments.mfu}")
    options = {"optim": arguments.optim, "gradient_checkpointing": arguments.gradient_checkpointing}
    own = {"captions_per_image": 1, "lora_r": 2, "tune_decoder": 2, "quantization": 2}
    for name, stage in own.items():
        value = getattr(arguments, name)
        if value is not None and stage != arguments.stage:
            raise ValueError(f"--{name} is of stage {stage}, not of stage {arguments.stage}")
        if value is not None:
            options[name] = value
    if arguments.tune_decoder == "full" and arguments.quantization in ("nf4", "int8"):
        raise ValueError(f"--quantization {arguments.quantization}: quantised weights cannot be trained")
    from ..tools.plan import CARDS, as_text, make_plan

    if arguments.gpu not in CARDS:
        raise ValueError(f"unknown --gpu {arguments.gpu}: it is one of {', '.join(CARDS)}")
    config = None
    if arguments.checkpoint is not None:
        from modeling_clip_phi import ClipPhiConfig

        config = ClipPhiConfig.from_pretrained(arguments.checkpoint)
    plan = make_plan(
        STAGES[arguments.stage](stage=arguments.stage, **options), CARDS[arguments.gpu], arguments.mfu, config
    )
    print(json.dumps(plan) if arguments.json else as_text(plan))


def run_doctor(arguments: argparse.Namespace) -> int:
    from ..tools.doctor import doctor

    return doctor(arguments.json, arguments.debug)
