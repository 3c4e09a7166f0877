"""What a run needs, before a GPU is rented: parameters, FLOPs, memory by item, the largest batch, hours.

clip_phi.training.memory has the formula. What cannot be counted is assumed, and marked as such."""

from typing import Any

from modeling_clip_phi import ClipPhiConfig

from ..environment import Gpu
from ..templates import render
from ..training.arguments import Stage2Arguments, TrainingArguments
from ..training.memory import GIB, Formula, largest_pack, typical_sample

IMAGES, CONVERSATIONS = 118_287, 157_712  # of COCO train2017; of LLaVA-Instruct-150K


def make_plan(arguments: TrainingArguments, card: Gpu, mfu: float, config: ClipPhiConfig) -> dict[str, Any]:
    """For json: parameters, FLOPs per sample (a caption or a conversation), memory by item, largest batch, hours.

    The bill is that of the largest batch that fits, or of one image. mfu: assumed share of the peak. The states of a
    paged optimizer are in the bill, but may leave the card while a step needs the room."""
    formula = Formula(config, arguments, card)
    ids, supervised, number = typical_sample(arguments, formula.patches)
    epoch = CONVERSATIONS if isinstance(arguments, Stage2Arguments) else IMAGES * number
    pageable = formula.fixed_bytes()["optimizer"] if arguments.optim.startswith("paged") else 0
    low = largest_pack(formula)
    (less, *flops), (more, *_) = (formula.step([ids], supervised, copies) for copies in (1000, 2000))
    tower, rest = (each / 1000 / number for each in flops)
    samples_per_second = mfu * card.tflops * 1e12 / (tower + rest)
    return {
        "gpu": card.title,
        "stage": arguments.stage,
        "parameters": formula.parameters,
        "trainable_parameters": sum(formula.trained),
        "flops_per_sample": tower + rest,
        "tower_flops_per_sample": tower,
        "activation_bytes_per_token": (more["activations"] - less["activations"]) / 1000 / len(ids),
        "mb_per_token": (more["activations"] - less["activations"]) / 1000 / len(ids) / 1e6,
        "memory_bytes": int(card.memory * GIB),
        "bill_bytes": formula.bill([ids], supervised, max(low, 1)),
        "pageable_bytes": pageable,
        "fits": low > 0,
        "images_per_step": low,
        "max_tokens_per_batch": low * len(ids),
        "tokens_per_image": len(ids),
        "assumed_mfu": mfu,
        "samples_per_second": samples_per_second,
        "samples_per_epoch": epoch,
        "hours_per_epoch": epoch / samples_per_second / 3600,
    }


def format_plan(plan: dict[str, Any]) -> str:
    """The plan as a table."""
    return "".join(render("plan.txt", GIB=GIB, **plan)).rstrip("\n")
