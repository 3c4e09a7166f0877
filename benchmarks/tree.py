"""What sharing an image among its captions saves: trees against the padded one-by-one form, on the same work.

    python benchmarks/tree.py [--json FILE]

Both forms run one training step (forward, backward into the projector) over the same captions with the demo's
backbones, in turn, on one thread, and the least of several CPU times counts. Loss and gradient are compared before
anything is timed. FLOPs at true size are counted on meta tensors of TinyCLIP's and phi-2's shapes.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from clip_phi.batching.index import Index
from clip_phi.batching.loader import Collator, TreeDataset
from clip_phi.batching.tree import Pack
from clip_phi.samples import Sample
from clip_phi.sources.data import parse_source
from clip_phi.sources.drawn import write_dataset
from clip_phi.sources.records import MediaFolder
from clip_phi.sources.report import Report
from modeling_clip_phi import ClipPhiConfig, ClipPhiForCausalLM, ClipPhiProcessor

BACKBONES = Path(__file__).resolve().parent.parent / "examples/demo_backbones"
# What a COCO caption takes with phi-2's tokenizer: 11.6 tokens and the end token; five of them after one image.
TRUE_CAPTION_LENGTHS = (11, 12, 12, 11, 12)
TRUE_PREFIX = 49


def step(model: ClipPhiForCausalLM, pack: Pack) -> tuple[float, torch.Tensor]:
    loss = model(**pack.inputs, use_cache=False, num_items_in_batch=pack.num_supervised).loss
    model.zero_grad()
    loss.backward()
    return loss.item(), model.model.projector.weight.grad.clone()


def make_packs(samples: list[Sample], processor: ClipPhiProcessor) -> dict[str, Pack]:
    """The same captions as trees and each with an image of its own."""
    alone = [replace(sample, branches=(branch,)) for sample in samples for branch in sample.branches]
    packs = {}
    for form, form_samples in (("tree", samples), ("one_by_one", alone)):
        dataset = TreeDataset([Index.from_samples(form_samples, processor, max_length=512)], processor)
        collate = Collator(processor.tokenizer.pad_token_id)
        packs[form] = collate([dataset[0, index] for index in range(len(form_samples))])
    return packs


def count_true_flops() -> dict[str, int]:
    """FLOPs of the decoder and its head, forward and backward, for one image's five captions at true size."""
    with torch.device("meta"):
        model = ClipPhiForCausalLM(ClipPhiConfig())
        model.freeze_backbones()
        targets = sum(TRUE_CAPTION_LENGTHS) + len(TRUE_CAPTION_LENGTHS)
        longest = TRUE_PREFIX + max(TRUE_CAPTION_LENGTHS) + 1  # the usual form feeds the end token in, too
        shapes = {
            "tree": (1, TRUE_PREFIX + sum(TRUE_CAPTION_LENGTHS)),
            "one_by_one": (len(TRUE_CAPTION_LENGTHS), longest),
        }
        flops = {}
        for form, (rows, length) in shapes.items():
            embeds = torch.empty(rows, length, 2560, requires_grad=True)
            sees = torch.ones(rows, 1, length, length, dtype=torch.bool)
            with FlopCounterMode(display=False) as counter:
                hidden = model.model.language_model(inputs_embeds=embeds, attention_mask=sees, use_cache=False)[0]
                model.lm_head(hidden.reshape(-1, 2560)[:targets]).sum().backward()
            flops[form] = counter.get_total_flops()
    return flops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--images", type=int, default=16, help="images in a step (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each form (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)

    processor = ClipPhiProcessor.from_backbones(str(BACKBONES / "vision"), str(BACKBONES / "text"))
    model = ClipPhiForCausalLM.from_backbones(
        str(BACKBONES / "vision"), str(BACKBONES / "text"), image_token_id=processor.image_token_id
    )
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(folder, num_train=options.images, num_val=1)
        source = parse_source(f"coco:{folder}/annotations/captions_train2017.json,images={folder}/train2017")
        samples = list(source.read(MediaFolder(source.images), Report()))
        packs = make_packs(samples, processor)

    (loss, gradient), (plain_loss, plain_gradient) = step(model, packs["tree"]), step(model, packs["one_by_one"])
    loss_difference = abs(loss / plain_loss - 1)
    gradient_difference = ((gradient - plain_gradient).norm() / plain_gradient.norm()).item()
    if loss_difference > 1e-6 or gradient_difference > 1e-4:
        raise SystemExit(f"not the same work: loss differs by {loss_difference}, gradient by {gradient_difference}")

    seconds: dict[str, list[float]] = {form: [] for form in packs}
    for _ in range(options.repeats):
        for form, pack in packs.items():
            started = time.process_time()
            step(model, pack)
            seconds[form].append(time.process_time() - started)
    flops = count_true_flops()
    result: dict[str, Any] = {
        "captions": packs["tree"].num_branches,
        "tokens_tree": packs["tree"].inputs["input_ids"].numel(),
        "tokens_one_by_one": packs["one_by_one"].inputs["input_ids"].numel(),
        "captions_per_cpu_second_tree": packs["tree"].num_branches / min(seconds["tree"]),
        "captions_per_cpu_second_one_by_one": packs["tree"].num_branches / min(seconds["one_by_one"]),
        "speed_ratio": min(seconds["one_by_one"]) / min(seconds["tree"]),
        "loss_rel_diff": loss_difference,
        "grad_rel_diff": gradient_difference,
        "tokens_true_size_tree": TRUE_PREFIX + sum(TRUE_CAPTION_LENGTHS),
        "tokens_true_size_one_by_one": sum(TRUE_PREFIX + length + 1 for length in TRUE_CAPTION_LENGTHS),
        "flops_ratio_true_size": flops["one_by_one"] / flops["tree"],
    }
    for name, value in result.items():
        print(f"{name:36} {value:.4g}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
