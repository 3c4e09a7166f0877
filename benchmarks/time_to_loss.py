"""The CPU time to an equal held-out loss: the course notebooks' recipe of 2024, and stage 1 of this project.

    python benchmarks/time_to_loss.py [--seconds 600] [--json FILE]

Both train the same projector between the demo's backbones on drawn scenes. Images are decoded beforehand, and the
tower runs in both. The recipe is rewritten from its description. It takes two captions a batch in random order and
one forward pass of the decoder per caption token, with all graphs kept. After the fifth token it feeds its own argmax
back. It uses label smoothing and the decoder's dropout, and its loss ignores the end token. Ours takes eight images a
step, each with its five captions, which share the image.

The recipe runs for --seconds of CPU time; ours runs until it reaches the recipe's best held-out loss. That loss
leaves out the end token, since the recipe does not train it. Times are CPU seconds of one thread, without
evaluations.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy
from transformers import PhiForCausalLM

from clip_phi.batching.attention import PACKED_ATTENTION
from clip_phi.batching.images import load_image
from clip_phi.batching.index import Index, load_index
from clip_phi.batching.packing import PackedBatch, pack_samples
from clip_phi.data.sample import File
from clip_phi.data.source import parse_source
from clip_phi.data.synthetic import write_dataset
from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor
from modeling_clip_phi.configuration_clip_phi import IGNORE_INDEX

ROOT = Path(__file__).resolve().parent.parent
BACKBONES = tuple(str(ROOT / "examples" / "demo_backbones" / part) for part in ("vision", "text"))
IMAGES_PER_STEP, CAPTIONS_PER_STEP = 8, 2  # ours, the recipe's
TEACHER_FORCED, LABEL_SMOOTHING, DROPOUT = 5, 0.1, 0.1
WARM_UP = 20  # steps
MIN_STEPS = 8  # of the recipe, so that the loss falls on a slow machine too


@dataclass
class Scenes:
    """Scenes with their tokenised captions."""

    index: Index
    pixels: torch.Tensor  # float (images, 3, height, width)


class Point(NamedTuple):
    """One evaluation."""

    seconds: float  # of CPU time
    steps: int
    seen: int  # captions
    loss: float


def read_scenes(folder: Path, split: str, processor: Any) -> Scenes:
    source = parse_source(f"coco:{folder}/annotations/captions_{split}2017.json,images={folder}/{split}2017")
    index = load_index(source, processor, 256, 0)
    files = [image for number in range(len(index)) if isinstance(image := index.image(number), File)]
    pixels = [processor.image_processor(load_image(file), return_tensors="pt").pixel_values for file in files]
    return Scenes(index, torch.cat(pixels))


def pack(scenes: Scenes, numbers: list[int], pad_token_id: int) -> PackedBatch:
    return pack_samples(
        [scenes.index.shared_prefix_sample(each) for each in numbers], scenes.pixels[numbers], pad_token_id
    )


@torch.no_grad()
def held_out_loss(model: ClipPhiForCausalLM, scenes: Scenes, end: int, pad: int) -> float:
    """Compute the loss in nats per caption token, without end tokens."""
    total, count = 0.0, 0
    for start in range(0, len(scenes.index), 32):
        batch = pack(scenes, list(range(len(scenes.index)))[start : start + 32], pad)
        labels = batch.inputs["shift_labels"]
        labels[labels == end] = IGNORE_INDEX
        count += int((labels != IGNORE_INDEX).sum())
        total += model(**batch.inputs, use_cache=False, skip_logits=True, num_items_in_batch=1).loss.item()
    return total / count


def steps_of_ours(model: ClipPhiForCausalLM, scenes: Scenes, pad: int) -> Iterator[Callable[[], torch.Tensor]]:
    chance = random.Random(0)
    while True:
        order = chance.sample(range(len(scenes.index)), len(scenes.index))
        for start in range(0, len(order) - IMAGES_PER_STEP + 1, IMAGES_PER_STEP):
            numbers = order[start : start + IMAGES_PER_STEP]
            yield partial(our_loss, model, scenes, numbers, pad)


def our_loss(model: ClipPhiForCausalLM, scenes: Scenes, numbers: list[int], pad: int) -> torch.Tensor:
    return model(**pack(scenes, numbers, pad).inputs, use_cache=False).loss


def steps_of_recipe(
    model: ClipPhiForCausalLM, decoder: PhiForCausalLM, scenes: Scenes, end: int
) -> Iterator[Callable[[], torch.Tensor]]:
    captions = [
        (number, conversation.ids)
        for number in range(len(scenes.index))
        for conversation in scenes.index.encoded(number)
    ]
    captions = [(number, [each for each in ids if each != end]) for number, ids in captions]
    chance = random.Random(0)
    while True:
        order = chance.sample(captions, len(captions))
        for start in range(0, len(order) - CAPTIONS_PER_STEP + 1, CAPTIONS_PER_STEP):
            chosen = order[start : start + CAPTIONS_PER_STEP]
            yield partial(recipe_loss, model, decoder, scenes, chosen, end)


def recipe_loss(
    model: ClipPhiForCausalLM, decoder: PhiForCausalLM, scenes: Scenes, captions: list[tuple[int, list[int]]], end: int
) -> torch.Tensor:
    numbers = [number for number, _ in captions]
    length = max(len(ids) for _, ids in captions) + 1
    targets = torch.tensor([ids + [end] * (length - len(ids)) for _, ids in captions])
    parts: Any = model.model
    with torch.no_grad():
        patches = parts.vision_tower(scenes.pixels[numbers], output_hidden_states=True).hidden_states[-2][:, 1:]
    embeds = parts.projector(patches)
    logits = []
    for position in range(length):
        logits.append(decoder(inputs_embeds=embeds, use_cache=False).logits[:, -1])
        token = targets[:, position] if position < TEACHER_FORCED else logits[-1].argmax(-1)
        embeds = torch.cat([embeds, decoder.get_input_embeddings()(token)[:, None]], dim=1)
    predicted = torch.stack(logits, dim=1).flatten(0, 1)
    return cross_entropy(predicted, targets.flatten(), ignore_index=end, label_smoothing=LABEL_SMOOTHING)


def train(
    projector: torch.nn.Module,
    steps: Iterator[Callable[[], torch.Tensor]],
    evaluate: Callable[[], float],
    learning_rate: float,
    seen_per_step: int,
    evaluate_every: float,
    done: Callable[[Point], bool],
) -> list[Point]:
    """Train until done, and evaluate every evaluate_every seconds of CPU time."""
    optimizer = torch.optim.AdamW(projector.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)
    points = [Point(0.0, 0, 0, evaluate())]
    seconds, number = 0.0, 0
    while not done(points[-1]):
        started = time.process_time()
        number += 1
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, number / WARM_UP)
        next(steps)().backward()
        torch.nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.process_time() - started
        if seconds - points[-1].seconds >= evaluate_every:
            points.append(Point(seconds, number, number * seen_per_step, evaluate()))
    return points


def compare(options: argparse.Namespace) -> dict[str, Any]:
    processor = ClipPhiProcessor.from_backbones(*BACKBONES)
    end, pad = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(folder, options.num_train, options.num_val)
        training, held_out = (read_scenes(Path(folder), split, processor) for split in ("train", "val"))
    torch.manual_seed(0)
    model = ClipPhiForCausalLM.from_backbones(*BACKBONES, image_token_id=processor.image_token_id, dtype=torch.float32)
    model.set_attn_implementation({"text_config": PACKED_ATTENTION})
    model.freeze_backbones()
    projector: Any = model.model.projector
    start = {name: value.clone() for name, value in projector.state_dict().items()}
    decoder = PhiForCausalLM.from_pretrained(
        BACKBONES[1], dtype=torch.float32, hidden_act="gelu_new", resid_pdrop=DROPOUT
    )
    decoder.requires_grad_(False).train()

    def evaluate() -> float:
        return held_out_loss(model.eval(), held_out, end, pad)

    recipe_points = train(
        projector,
        steps_of_recipe(model, decoder, training, end),
        evaluate,
        options.recipe_learning_rate,
        CAPTIONS_PER_STEP,
        options.seconds / 40,
        lambda point: point.seconds >= options.seconds and point.steps >= MIN_STEPS,
    )
    best = min(recipe_points, key=lambda point: point.loss)
    projector.load_state_dict(start)
    our_points = train(
        projector,
        steps_of_ours(model, training, pad),
        evaluate,
        options.learning_rate,
        IMAGES_PER_STEP * 5,
        options.seconds / 4000,
        lambda point: point.loss <= best.loss or point.seconds >= max(options.seconds, recipe_points[-1].seconds),
    )
    reached = our_points[-1]
    return {
        "time_ratio": best.seconds / reached.seconds if reached.loss <= best.loss and reached.seconds else 0.0,
        "loss": best.loss,
        "loss_before": recipe_points[0].loss,
        "recipe_seconds": best.seconds,
        "recipe_captions": best.seen,
        "our_seconds": reached.seconds,
        "our_captions": reached.seen,
        "our_loss": reached.loss,
        "recipe": recipe_points,
        "ours": our_points,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600, help="CPU time of the recipe (default: %(default)s)")
    parser.add_argument("--num_train", type=int, default=2000, help="training scenes (default: %(default)s)")
    parser.add_argument("--num_val", type=int, default=100, help="held-out scenes (default: %(default)s)")
    parser.add_argument(
        "--learning_rate", type=float, default=2e-3, help="learning rate of ours (default: %(default)s)"
    )
    parser.add_argument("--recipe_learning_rate", type=float, default=1e-3, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = compare(options)
    for name in ("recipe", "ours"):
        print(f"\n{name}\n{'CPU seconds':>12}{'steps':>8}{'captions':>10}{'held-out loss':>15}")
        for point in result[name]:
            print(f"{point.seconds:12.1f}{point.steps:8}{point.seen:10}{point.loss:15.4f}")
    print()
    for name, value in result.items():
        if isinstance(value, int | float):
            print(f"{name:20} {value:.4g}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
