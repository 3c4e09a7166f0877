"""The training step of this project compared with common alternatives, on the same work.

    python benchmarks/training.py [--quick] [--json FILE]
    python benchmarks/training.py --true-size     2.78 B parameters in float32: needs 16 GB and some minutes
    python benchmarks/training.py --profile       where the CPU time of a step of each stage goes, and its FLOP floor

The contenders share all weights (random; a CLIP tower, and a phi decoder with phi-2's vocabulary) and all work
(random captions and conversations). A step is a forward and backward pass over all of the work. The losses and
gradients are compared before anything is timed. The figures are the least CPU time of several alternating runs on one
thread. Batches are made beforehand. The optimizer is left out, which favours the recipes with many small steps. The
tower runs in all.

    token_loop   one forward pass of the decoder per caption token, with all graphs kept (notebooks of 2024), two
                 captions a batch; token_loop_last: its head at the last position only, which those notebooks do not do
    padded       the same captions in one teacher-forced forward pass, padded, with logits at every position
    llava        Hugging Face's LlavaForConditionalGeneration with its defaults, padded
    ours         shared images, packs, logits at supervised positions and fused GELU; each can be turned off

Every contender but ours encodes an image once per caption or conversation. FLOPs are counted during the comparison.
Those at true size are counted on meta tensors of phi-2's shape, without the tower.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from plan_counting import build_model, count_step
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PhiConfig,
    PhiForCausalLM,
)
from transformers.activations import ACT2FN

from clip_phi.batching.attention import PACKED_ATTENTION
from clip_phi.batching.encode import Encoded
from clip_phi.batching.packing import SharedPrefixSample, build_shared_prefix, pack_samples
from clip_phi.batching.sampler import assign_packs, samples_of_packs
from clip_phi.training.arguments import Stage1Arguments, Stage2Arguments
from clip_phi.training.model import make_trainable
from modeling_clip_phi import ClipPhiConfig, ClipPhiForCausalLM
from modeling_clip_phi.configuration_clip_phi import IGNORE_INDEX

PATCHES = 49
VOCABULARY, END, IMAGE, PAD = 51200, 50256, 50295, 50296
# Tokens of five COCO captions with phi-2's tokenizer, without the end token: 11.6 on average.
CAPTION_LENGTHS = (11, 12, 12, 11, 12)
LEVERS = {
    "sharing": "the image once for all its conversations",
    "packing": "full rows instead of padded batches",
    "kept_logits": "the head at supervised positions only",
    "fused_gelu": "one kernel instead of gelu_new's eight",
}
LORA_R = 8
LORA_TARGETS = "q_proj|k_proj|v_proj|dense|fc1|fc2"
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 1e-5  # relative, in float32

Inputs = dict[str, Any]


class Size(NamedTuple):
    hidden: int
    layers: int
    heads: int
    tower_hidden: int
    tower_layers: int
    tower_heads: int
    rotary: float = 0.5

    def with_hidden(self, hidden: int) -> "Size":
        return self._replace(hidden=hidden, heads=max(1, hidden // 64), rotary=0.5)  # an even part of 64


QUICK_SIZE = Size(384, 8, 6, 128, 4, 2)
FULL_SIZE = Size(512, 8, 8, 192, 6, 3)
TRUE_SIZE = Size(2560, 32, 32, 640, 12, 10, rotary=0.4)  # phi-2 and TinyCLIP-ViT-61M/32


class Work(NamedTuple):
    """The samples of a step, and how they are batched."""

    conversations: list[list[Encoded]]  # of each image
    pixels: torch.Tensor  # float (images, 3, 224, 224)
    rows: int  # sequences in a padded batch
    budget: int  # tokens in a pack

    @property
    def flat(self) -> list[tuple[int, Encoded]]:
        """All conversations with the number of their image."""
        return [
            (image, conversation)
            for image, conversations in enumerate(self.conversations)
            for conversation in conversations
        ]

    @property
    def num_samples(self) -> int:
        return len(self.flat)

    @property
    def num_supervised(self) -> int:
        return sum(label != IGNORE_INDEX for _, conversation in self.flat for label in conversation.labels)


def caption_work(images: int, rows: int = 2, budget: int = 16 * 107) -> Work:
    """Make captions of stage 1. The default budget is that of train_accelerate.py, 16 images."""
    chance = np.random.default_rng(1)
    texts = [[[*chance.integers(0, 50_000, n).tolist(), END] for n in CAPTION_LENGTHS] for _ in range(images)]
    return Work([[Encoded(ids, ids) for ids in each] for each in texts], _pixels(images), rows, budget)


def conversation_work(images: int, log_mean: float, rows: int = 8, budget: int = 4096) -> Work:
    """Make one to three conversations of stage 2 per image, with the last three quarters of each supervised."""
    chance = np.random.default_rng(2)
    conversations: list[list[Encoded]] = []
    for _ in range(images):
        conversations.append([])
        for length in _long_tailed(chance, log_mean, int(chance.integers(1, 4))).tolist():
            ids = [*chance.integers(0, 50_000, length - 1).tolist(), END]
            conversations[-1].append(Encoded(ids, [IGNORE_INDEX] * (length // 4) + ids[length // 4 :]))
    return Work(conversations, _pixels(images), rows, budget)


def _long_tailed(chance: np.random.Generator, log_mean: float, count: int) -> np.ndarray:
    return chance.lognormal(log_mean, 0.7, count).clip(8, 1999).astype(int)


def _pixels(images: int) -> torch.Tensor:
    return torch.randn(images, 3, 224, 224, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------ models that share their weights


class PlainModel(nn.Module):
    """Tower, projector and decoder of transformers; the decoder has gelu_new, as in phi-2's config."""

    def __init__(self, tower: nn.Module, projector: nn.Module, decoder: PhiForCausalLM):
        super().__init__()
        self.tower, self.projector, self.decoder = tower, projector, decoder

    def embed(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embed the projected patches, followed by the words: float (batch, sequence, hidden)."""
        with torch.no_grad():
            patches = self.tower(pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:]
        words = self.decoder.get_input_embeddings()(input_ids[:, PATCHES:])
        return torch.cat([self.projector(patches).to(words.dtype), words], dim=1)


class Models(NamedTuple):
    """Three models that share their parameters."""

    ours: ClipPhiForCausalLM
    plain: PlainModel
    llava: LlavaForConditionalGeneration
    trained: list[nn.Parameter]  # the parameters whose gradients are compared: the same objects in all three


def make_configs(size: Size) -> tuple[CLIPVisionConfig, PhiConfig]:
    vision = CLIPVisionConfig(
        hidden_size=size.tower_hidden,
        intermediate_size=4 * size.tower_hidden,
        num_hidden_layers=size.tower_layers,
        num_attention_heads=size.tower_heads,
        image_size=224,
        patch_size=32,
    )
    text = PhiConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        intermediate_size=4 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        partial_rotary_factor=size.rotary,
        hidden_act="gelu_new",
    )
    return vision, text


def make_models(size: Size, lora_r: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Models:
    """Make frozen backbones in dtype with random weights, and projector and LoRA (none for rank 0) in float32."""
    torch.manual_seed(0)
    vision, text = make_configs(size)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            ours = ClipPhiForCausalLM(ClipPhiConfig(vision_config=vision, text_config=text, image_token_id=IMAGE))
    finally:
        torch.set_default_dtype(default)
    fused: Any = ours.config.text_config
    assert fused.hidden_act == "gelu_pytorch_tanh" and text.hidden_act == "gelu_new"
    ours.set_attn_implementation({"text_config": PACKED_ATTENTION})
    ours.freeze_backbones()
    with torch.device("meta"):
        decoder = PhiForCausalLM(text)
    if lora_r:
        add_lora(ours, lora_r)
        add_lora(decoder, lora_r)
        ours.model.projector.requires_grad_(True)
    for name, parameter in ours.named_parameters():
        if "lora_B" in name:  # zero at first, which leaves lora_A without a gradient
            nn.init.normal_(parameter, std=0.02)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    share(decoder.model, ours.model.language_model)
    share(decoder.lm_head, ours.lm_head)
    trained = [parameter for parameter in ours.parameters() if parameter.requires_grad]
    plain = PlainModel(ours.model.vision_tower, ours.model.projector, decoder)
    llava = make_llava(vision, text, ours, plain)
    return Models(ours.train(), plain.train(), llava.train(), trained)


def add_lora(model: Any, rank: int) -> None:
    from peft import LoraConfig

    targets = rf".*layers\.\d+\.(self_attn|mlp)\.({LORA_TARGETS})"
    if isinstance(model, ClipPhiForCausalLM):
        targets = rf"model\.language_model{targets}"
    model.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))


def share(target: nn.Module, source: nn.Module) -> None:
    """Replace target's parameters and buffers by source's."""
    for name, tensor in [*source.named_parameters(), *source.named_buffers()]:
        owner, _, attribute = name.rpartition(".")
        setattr(target.get_submodule(owner), attribute, tensor)
    left = [name for name, tensor in [*target.named_parameters(), *target.named_buffers()] if tensor.is_meta]
    assert not left or next(source.parameters()).is_meta, left


def make_llava(
    vision: CLIPVisionConfig, text: PhiConfig, ours: ClipPhiForCausalLM, plain: PlainModel
) -> LlavaForConditionalGeneration:
    """Make a Llava with our projector as linear_1 and the identity as linear_2.

    Its head has no bias, and ours is still zero.
    """
    config = LlavaConfig(vision_config=vision, text_config=text, projector_hidden_act="linear", image_token_index=IMAGE)
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(config).requires_grad_(False)
    assert ours.lm_head.bias.is_meta or not ours.lm_head.bias.any()
    llava.model.vision_tower, llava.model.language_model = plain.tower, plain.decoder.model
    llava.lm_head.weight = ours.lm_head.weight
    projector: Any = ours.model.projector
    llava.model.multi_modal_projector.linear_1 = projector
    second = nn.Linear(projector.out_features, projector.out_features, device=projector.weight.device)
    with torch.no_grad():
        second.weight.copy_(torch.eye(projector.out_features))
        second.bias.zero_()
    llava.model.multi_modal_projector.linear_2 = second
    return llava


# ------------------------------------------------------------------ contenders


@dataclass(frozen=True)
class Contender:
    """One way to compute a step."""

    name: str
    batches: list[Inputs]
    loss: Callable[[Inputs], torch.Tensor]  # of one batch, divided by the supervised tokens of all
    samples: int  # captions or conversations of all batches
    tokens: int  # that the decoder computes, with padding


def padded_batches(work: Work) -> list[Inputs]:
    """Make batches for a Trainer: one conversation per sequence with its own image, right padded, with labels."""
    flat, batches = work.flat, []
    for start in range(0, len(flat), work.rows):
        images, conversations = zip(*flat[start : start + work.rows], strict=True)
        ids = [[IMAGE] * PATCHES + conversation.ids for conversation in conversations]
        labels = [[IGNORE_INDEX] * PATCHES + conversation.labels for conversation in conversations]
        batch = {"input_ids": _pad(ids, PAD), "labels": _pad(labels, IGNORE_INDEX)}
        batch["attention_mask"] = (batch["input_ids"] != PAD).long()
        batches.append(batch | {"pixel_values": work.pixels[list(images)]})
    return batches


def _pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    length = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])


def make_padded(models: Models, work: Work) -> Contender:
    plain, total = models.plain, work.num_supervised

    def loss(batch: Inputs) -> torch.Tensor:
        embeds = plain.embed(batch["input_ids"], batch["pixel_values"])
        rest = {"attention_mask": batch["attention_mask"], "labels": batch["labels"]}
        return plain.decoder(inputs_embeds=embeds, num_items_in_batch=total, use_cache=False, **rest).loss

    batches = padded_batches(work)
    return Contender("padded", batches, loss, work.num_samples, _tokens(batches))


def make_hugging_face(models: Models, work: Work) -> Contender:
    llava, total = models.llava, work.num_supervised
    batches = padded_batches(work)
    return Contender(
        "llava",
        batches,
        lambda batch: llava(**batch, num_items_in_batch=total).loss,
        work.num_samples,
        _tokens(batches),
    )


def make_token_loop(models: Models, work: Work, all_logits: bool = True) -> Contender:
    """Make the notebooks' loop, for captions only; always teacher-forced, so that the work is the same."""
    plain, total = models.plain, work.num_supervised

    def loss(batch: Inputs) -> torch.Tensor:
        embeds, labels = plain.embed(batch["input_ids"], batch["pixel_values"]), batch["labels"][:, PATCHES:]
        options = {"use_cache": False, "logits_to_keep": 0 if all_logits else 1}
        last = [
            plain.decoder(inputs_embeds=embeds[:, : PATCHES + position], **options).logits[:, -1]
            for position in range(labels.shape[1])
        ]
        logits = torch.stack(last, dim=1).float().flatten(0, 1)
        return cross_entropy(logits, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum") / total

    batches = padded_batches(work)
    lengths = [range(PATCHES, batch["input_ids"].shape[1]) for batch in batches]
    tokens = sum(sum(each) * len(batch["input_ids"]) for each, batch in zip(lengths, batches, strict=True))
    return Contender("token_loop" if all_logits else "token_loop_last", batches, loss, work.num_samples, tokens)


def make_ours(models: Models, work: Work, on: Iterable[str] = LEVERS, name: str = "ours") -> Contender:
    """Make the step of train_accelerate.py, or with only some of its optimisations on."""
    model, total, levers = models.ours, work.num_supervised, set(on)
    activation = ACT2FN["gelu_pytorch_tanh" if "fused_gelu" in levers else "gelu_new"]
    attention = PACKED_ATTENTION if "packing" in levers else "sdpa"
    decoder: Any = model.model.language_model

    def loss(batch: Inputs) -> torch.Tensor:
        decoder.config._attn_implementation = attention  # set_attn_implementation visits every module each time
        for layer in decoder.layers:
            layer.mlp.activation_fn = activation
        if "kept_logits" in levers:
            return model(**batch, use_cache=False, num_items_in_batch=total).loss
        return loss_of_all_logits(model, batch, total)

    batches = our_batches(work, "sharing" in levers, "packing" in levers)
    return Contender(name, batches, loss, work.num_samples, _tokens(batches))


def our_batches(work: Work, sharing: bool, packing: bool) -> list[Inputs]:
    groups = (
        list(enumerate(work.conversations))
        if sharing
        else [(image, [conversation]) for image, conversation in work.flat]
    )
    images = [image for image, _ in groups]
    samples = [build_shared_prefix(conversations, [IMAGE] * PATCHES, "") for _, conversations in groups]
    if packing:
        lengths = np.array([len(sample.input_ids) for sample in samples])
        plan = [pack.tolist() for pack in samples_of_packs(lengths, assign_packs(lengths[None], work.budget)[0])]
    else:
        plan = [list(range(start, len(samples)))[: work.rows] for start in range(0, len(samples), work.rows)]
    batches = []
    for numbers in plan:
        chosen, pixels = [samples[number] for number in numbers], work.pixels[[images[number] for number in numbers]]
        batches.append(pack_samples(chosen, pixels, PAD).inputs if packing else pad_samples(chosen, pixels, sharing))
    return batches


def pad_samples(samples: Sequence[SharedPrefixSample], pixel_values: torch.Tensor, sharing: bool) -> Inputs:
    """Make a padded batch, one sample per sequence. A single right-padded conversation is causal and needs no mask."""
    batch = {
        "input_ids": _pad([sample.input_ids for sample in samples], PAD),
        "logits_to_keep": _pad([sample.logits_to_keep for sample in samples], 0),
        "shift_labels": _pad([sample.shift_labels for sample in samples], IGNORE_INDEX),
        "pixel_values": pixel_values,
    }
    if sharing:
        conversation = _pad([sample.conversation_ids for sample in samples], -1)
        mask = (conversation[:, None] == 0) | (conversation[:, None] == conversation[..., None])
        batch["attention_mask"] = mask.tril().unsqueeze(1)
        batch["position_ids"] = _pad([sample.position_ids for sample in samples], 0)
    return batch


def loss_of_all_logits(model: ClipPhiForCausalLM, batch: Inputs, total: int) -> torch.Tensor:
    """Compute logits at all positions, and the loss from the supervised ones."""
    inputs = {name: batch[name] for name in batch.keys() - {"logits_to_keep", "shift_labels"}}
    logits = model.lm_head(model.model(**inputs, use_cache=False).last_hidden_state).float()
    selected = torch.take_along_dim(logits, batch["logits_to_keep"].unsqueeze(-1), dim=1).flatten(0, 1)
    labels = batch["shift_labels"].flatten()
    return cross_entropy(selected, labels, ignore_index=IGNORE_INDEX, reduction="sum") / total


def make_levers(models: Models, work: Work) -> list[Contender]:
    """Make our step with all optimisations on, with each one off, and with all off."""
    chosen = {"all on": set(LEVERS)} | {f"no {name}": set(LEVERS) - {name} for name in LEVERS} | {"all off": set()}
    return [make_ours(models, work, on, name) for name, on in chosen.items()]


def _tokens(batches: Sequence[Inputs]) -> int:
    return sum(batch["input_ids"].numel() for batch in batches)


# ------------------------------------------------------------------ measuring


@dataclass
class Figures:
    samples_per_second: float
    flops_per_sample: float
    tokens_per_sample: float


class Differences:
    """The largest relative differences so far."""

    def __init__(self) -> None:
        self.loss = self.gradient = 0.0

    def compare(self, name: str, ours: tuple[float, torch.Tensor], theirs: tuple[float, torch.Tensor]) -> None:
        loss = abs(ours[0] / theirs[0] - 1)
        gradient = ((ours[1] - theirs[1]).norm() / theirs[1].norm()).item()
        if not (loss <= LOSS_TOLERANCE and gradient <= GRADIENT_TOLERANCE):
            raise SystemExit(f"{name}: the loss differs by {loss:.2g}, the gradient by {gradient:.2g}")
        self.loss, self.gradient = max(self.loss, loss), max(self.gradient, gradient)


def step(contender: Contender, trained: Sequence[nn.Parameter]) -> torch.Tensor:
    """Run forward and backward passes over all batches. Returns the loss; the gradients are in trained."""
    for parameter in trained:
        parameter.grad = None
    total = torch.zeros((), device=trained[0].device)
    for batch in contender.batches:
        loss = contender.loss(batch)
        loss.backward()
        total += loss.detach()
    return total


def counted_step(contender: Contender, trained: Sequence[nn.Parameter]) -> tuple[int, float, torch.Tensor]:
    """Run a step. Returns its FLOPs, loss and gradient."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        loss = step(contender, trained).item()
    gradients = [parameter.grad for parameter in trained]
    return counter.get_total_flops(), loss, torch.cat([each.flatten() for each in gradients if each is not None])


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


# torch's counter has only CUDA's kernels. As there, masked positions are counted.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def cpu_seconds(function: Callable[[], Any]) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


def race(
    contenders: Sequence[Contender], trained: Sequence[nn.Parameter], repeats: int, differences: Differences
) -> dict[str, Figures]:
    """Compare all contenders with the first, then time them in turn."""
    flops = {}
    expected: tuple[float, torch.Tensor] | None = None
    for contender in contenders:
        flops[contender.name], *result = counted_step(contender, trained)
        expected = expected or (result[0], result[1])
        differences.compare(contender.name, (result[0], result[1]), expected)
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for _ in range(repeats):
        for each in contenders:
            seconds[each.name].append(cpu_seconds(lambda each=each: step(each, trained)))  # type: ignore[misc]
    return {
        each.name: Figures(
            each.samples / min(seconds[each.name]), flops[each.name] / each.samples, each.tokens / each.samples
        )
        for each in contenders
    }


def print_table(title: str, rows: dict[str, Figures], relative_to: str) -> None:
    base = rows[relative_to]
    print(f"\n{title}\n{'':18}{'samples/s':>10}{'x':>8}{'GFLOP/sample':>15}{'x':>8}{'tokens/sample':>15}")
    for name, row in rows.items():
        speed, work = row.samples_per_second / base.samples_per_second, base.flops_per_sample / row.flops_per_sample
        print(
            f"{name:18}{row.samples_per_second:10.2f}{speed:8.2f}{row.flops_per_sample / 1e9:15.2f}{work:8.2f}"
            f"{row.tokens_per_sample:15.1f}"
        )


def speed_ratio(rows: dict[str, Figures], name: str, base: str) -> float:
    return rows[name].samples_per_second / rows[base].samples_per_second


# ------------------------------------------------------------------ counts at true size


def true_flops() -> dict[str, float]:
    """Count the FLOPs per caption of phi-2 and its head, forward and backward, on meta tensors.

    Ours has 16 images, the default of stage 1; the padded batch has two.
    """
    models = make_models(TRUE_SIZE, lora_r=0, device="meta")
    flops = {}
    for contender in (
        make_ours(models, caption_work(16)),
        make_padded(models, caption_work(2)),
    ):
        with FlopCounterMode(display=False) as counter:
            for batch in contender.batches:
                _meta_loss(models, batch).backward()
        flops[contender.name] = counter.get_total_flops() / contender.samples
    return flops


def _meta_loss(models: Models, batch: Inputs) -> torch.Tensor:
    """Compute the loss from the decoder on; <image> tokens cannot be located in meta tensors."""
    model = models.ours
    batch = to_device(batch, "meta")
    embeds = torch.empty(*batch["input_ids"].shape, TRUE_SIZE.hidden, device="meta", requires_grad=True)
    if "labels" in batch:
        mask = torch.ones((len(embeds), 1, *[embeds.shape[1]] * 2), dtype=torch.bool, device="meta")
        options = {"attention_mask": mask, "labels": batch["labels"], "use_cache": False}
        return models.plain.decoder(inputs_embeds=embeds, **options).loss
    mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device="meta")
    options = {"position_ids": batch["position_ids"], "pack_layout": batch["pack_layout"], "use_cache": False}
    hidden = model.model.language_model(inputs_embeds=embeds, attention_mask=mask, **options).last_hidden_state
    selected = torch.take_along_dim(hidden, batch["logits_to_keep"].unsqueeze(-1), dim=1)
    return model._loss(selected[0], batch["shift_labels"][0])


def to_device(batch: Inputs, device: str) -> Inputs:
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), batch)


def activation_megabytes() -> float:
    """Count the activations per token of a stage 1 pack at true size, in bfloat16."""
    model = build_model(ClipPhiConfig(), Stage1Arguments(stage=1), torch.bfloat16)
    ids = [0] * PATCHES + [number for number, size in enumerate(CAPTION_LENGTHS, 1) for _ in range(size)]
    supervised = sum(CAPTION_LENGTHS) + len(CAPTION_LENGTHS)
    few, more = (
        count_step(model, [ids] * images, supervised * images, torch.bfloat16).activations for images in (1, 2)
    )
    return (more - few) / len(ids) / 1e6


def pack_fill(budget: int = 4096, count: int = 20_000) -> float:
    """Measure how full packs are, with lengths like LLaVA-Instruct's."""
    lengths = PATCHES + _long_tailed(np.random.default_rng(0), 5.3, count)
    return int(lengths.sum()) / ((assign_packs(lengths[None], budget).max() + 1) * budget)


# ------------------------------------------------------------------ the benchmark


def tower_shares(models: Models, work: Work, stage: dict[str, Figures], repeats: int) -> dict[str, float]:
    """Measure the tower's share of the time of a caption: once per caption (padded), and once per image (ours)."""
    tower: Any = models.ours.model.vision_tower

    @torch.no_grad()
    def encode(batch: int) -> None:
        for pixels in work.pixels.split(batch):
            tower(pixels, output_hidden_states=True)

    per_image = {
        batch: min(cpu_seconds(partial(encode, batch)) for _ in range(repeats)) / len(work.pixels)
        for batch in (work.rows, len(work.pixels))
    }
    captions_per_image = work.num_samples / len(work.pixels)
    return {
        "tower_share_padded": per_image[work.rows] * stage["padded"].samples_per_second,
        "tower_share_ours": per_image[len(work.pixels)] / captions_per_image * stage["ours"].samples_per_second,
    }


def run_stage_1(size: Size, images: int, repeats: int, differences: Differences) -> dict[str, Any]:
    models, work, few = make_models(size, lora_r=0), caption_work(images), caption_work(min(images, 2))
    loops = [make_token_loop(models, few), make_token_loop(models, few, all_logits=False)]
    slow = race([make_padded(models, few), *loops], models.trained, min(repeats, 2), differences)
    contenders = [make_padded(models, work), make_hugging_face(models, work), make_ours(models, work)]
    stage = race([*contenders, *make_levers(models, work)[1:]], models.trained, repeats, differences)
    levers = {"all on": stage["ours"]} | {name: stage[name] for name in stage if name.startswith(("no ", "all "))}
    stage = {name: slow[name] for name in ("token_loop", "token_loop_last")} | {
        name: stage[name] for name in ("padded", "llava", "ours")
    }
    shares = tower_shares(models, work, stage, repeats)
    padded, ours = shares["tower_share_padded"], shares["tower_share_ours"]
    print_table(f"stage 1: {images} images with 5 captions each", stage, "padded")
    print(f"share of the tower: {padded:.1%} in padded, {ours:.1%} in ours")
    print_table("stage 1, ours without each optimisation", levers, "all on")
    return {
        "stage1_vs_padded": speed_ratio(stage, "ours", "padded"),
        "stage1_vs_token_loop": speed_ratio(stage, "ours", "token_loop"),
        "stage1_vs_token_loop_last": speed_ratio(stage, "ours", "token_loop_last"),
        "stage1_vs_llava": speed_ratio(stage, "ours", "llava"),
        "stage1_vs_padded_without_tower": speed_ratio(stage, "ours", "padded") * (1 - padded) / (1 - ours),
        **shares,
        "stage1": stage,
        "levers": {"stage1": levers},
    }


def run_stage_2(size: Size, images: int, log_mean: float, repeats: int, differences: Differences) -> dict[str, Any]:
    models, work = make_models(size, lora_r=LORA_R), conversation_work(images, log_mean)
    contenders = [make_padded(models, work), make_ours(models, work), *make_levers(models, work)[1:]]
    stage = race(contenders, models.trained, repeats, differences)
    levers = {"all on": stage["ours"]} | {name: stage[name] for name in stage if name.startswith(("no ", "all "))}
    stage = {name: stage[name] for name in ("padded", "ours")}
    print_table(f"stage 2, LoRA: {images} images, {work.num_samples} conversations", stage, "padded")
    print_table("stage 2, ours without each optimisation", levers, "all on")
    ratio = speed_ratio(stage, "ours", "padded")
    return {"stage2_vs_padded": ratio, "stage2": stage, "levers": {"stage2": levers}}


def run_true_size(size: Size, images: int) -> dict[str, Any]:
    models, work, differences = make_models(size, lora_r=0), caption_work(images), Differences()
    stage = race([make_padded(models, work), make_ours(models, work)], models.trained, 1, differences)
    print_table(f"stage 1 at true size: {images} images with 5 captions each", stage, "padded")
    return {
        "parameters": sum(parameter.numel() for parameter in models.ours.parameters()),
        "true_size_vs_padded": speed_ratio(stage, "ours", "padded"),
        "loss_rel_diff": differences.loss,
        "grad_rel_diff": differences.gradient,
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "stage1": stage,
    }


# Operators of the profiler by what they are for; the rest is "all others".
OPERATORS = {
    "attention": ("scaled_dot_product", "flash_attention"),
    "softmax of the loss": ("log_softmax", "logsumexp", "aten::exp", "aten::_softmax", "nll_loss"),
    "GELU": ("gelu",),
    "masks of LoRA's dropout": ("bernoulli", "random_", "aten::lt", "aten::ge"),
    "copies, sums and products of single numbers": ("aten::copy_", "aten::mul", "aten::add", "aten::sum", "index"),
}
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn_linear")


def run_profile(size: Size, images: int, log_mean: float) -> dict[str, Any]:
    """Where a step's CPU time goes, by self time of operators, and how long its products would take alone.

    The floor is the step's counted FLOPs at the speed of one product of 2048 x 2048 matrices, measured beside it."""
    result: dict[str, Any] = {"size": size._asdict()}
    matrix = torch.randn(2048, 2048)
    for stage, work in ((1, caption_work(images)), (2, conversation_work(images, log_mean))):
        models = make_models(size, lora_r=0)
        arguments = Stage1Arguments(stage=1) if stage == 1 else Stage2Arguments(stage=2, lora_r=LORA_R)
        make_trainable(models.ours, arguments, torch.device("cpu"), torch.float32)
        trained = [parameter for parameter in models.ours.parameters() if parameter.requires_grad]
        contender = make_ours(models, work)
        step(contender, trained)  # the first one allocates
        flops, _, _ = counted_step(contender, trained)
        seconds = [cpu_seconds(partial(step, contender, trained)) for _ in range(2)]
        speeds = [2 * 2048**3 / cpu_seconds(partial(torch.mm, matrix, matrix)) for _ in range(5)]
        with torch.profiler.profile(record_shapes=True) as profile:
            step(contender, trained)
        shares = _shares(profile.key_averages(group_by_input_shape=True))
        floor = flops / max(speeds)
        result[f"stage{stage}"] = shares | {"gflop": flops / 1e9, "seconds": min(seconds), "floor_seconds": floor}
        print(f"\nstage {stage}: {images} images, {work.num_samples} conversations")
        for name, share in sorted(shares.items(), key=lambda item: -item[1]):
            print(f"  {name:44} {share:6.1%}")
        print(f"  {flops / 1e9:.0f} GFLOP: {floor:.2f} s as one large product; the step: {min(seconds):.2f} s")
    return result


def _shares(events: Any) -> dict[str, float]:
    sums: dict[str, float] = {}
    for event in events:
        sizes = {number for shape in event.input_shapes for number in shape if isinstance(number, int)}
        name = next(
            (name for name, parts in OPERATORS.items() if any(part in event.key for part in parts)), "all others"
        )
        if event.key.startswith(PRODUCTS):
            name = "products of matrices in tower and decoder"
            name = "products of the head" if VOCABULARY in sizes else "products of LoRA" if LORA_R in sizes else name
        sums[name] = sums.get(name, 0) + event.self_cpu_time_total
    return {name: value / sum(sums.values()) for name, value in sums.items()}


def run_all(size: Size, images: int, log_mean: float, repeats: int) -> dict[str, Any]:
    differences = Differences()
    first = run_stage_1(size, images, repeats, differences)
    second = run_stage_2(size, images, log_mean, repeats, differences)
    flops = true_flops()
    return (
        first
        | second
        | {
            "loss_rel_diff": differences.loss,
            "grad_rel_diff": differences.gradient,
            "flops_ratio_true_size": flops["padded"] / flops["ours"],
            "flops_per_caption_true_size": flops,
            "activations_mb_per_token": activation_megabytes(),
            "pack_fill": pack_fill(),
            "levers": first["levers"] | second["levers"],
            "size": size._asdict(),
        }
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="smaller sizes; under ten minutes on two cores")
    parser.add_argument("--true-size", action="store_true", help="only padded and ours, with 2.78 B parameters")
    parser.add_argument("--profile", action="store_true", help="only the shares of operations in a step of each stage")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--hidden", type=int, help="width of the decoder (default: by size)")
    parser.add_argument("--layers", type=int, help="layers of the decoder (default: by size)")
    parser.add_argument("--images", type=int, help="images per step (default: by size)")
    parser.add_argument("--repeats", type=int, help="timed steps of each contender (default: by size)")
    parser.add_argument(
        "--log-mean", type=float, help="mean logarithm of the tokens of a conversation (default: by size)"
    )
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    size = TRUE_SIZE if options.true_size else QUICK_SIZE if options.quick else FULL_SIZE
    size = size.with_hidden(options.hidden) if options.hidden else size
    size = size._replace(layers=options.layers) if options.layers else size
    started = time.perf_counter()
    if options.true_size:
        result = run_true_size(size, options.images or 2)
    elif options.profile:
        result = run_profile(size if options.hidden else QUICK_SIZE, options.images or 16, 4.3)
    else:
        images, repeats = options.images or (8 if options.quick else 32), options.repeats or (2 if options.quick else 5)
        result = run_all(size, images, options.log_mean or (4.3 if options.quick else 5.3), repeats)
    result["wall_seconds"] = time.perf_counter() - started
    print()
    for name, value in result.items():
        if isinstance(value, int | float):
            print(f"{name:32} {value:.4g}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2, default=vars) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
