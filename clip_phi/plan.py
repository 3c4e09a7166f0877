"""What a run needs, before a GPU is rented: parameters, FLOPs, memory by item, the largest forward pass, hours.

What can be counted is counted, on meta tensors of the true shapes: a training step of one and of two images runs as it
would on the card (train mode, autocast, fused attention) while every tensor that it makes is booked; the straight line
through both gives each item. What cannot be counted is assumed, and the plan says so.
"""

import gc
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from modeling_clip_phi import ClipPhiConfig, ClipPhiForCausalLM

from .batching.packing import attend_by_piece, make_segments
from .training.arguments import Stage2Arguments, TrainingArguments


class Card(NamedTuple):
    """memory: GiB that torch reports as its total. tflops: dense peak of dtype with fp32 accumulation."""

    name: str
    memory: float
    tflops: float
    dtype: torch.dtype = torch.bfloat16


# Peaks: NVIDIA's data sheets of A100, H100, H200, L4 and T4 without sparsity; the Ada whitepaper for the RTX 4090, and
# from it by tensor cores and clock for the RTX 4060. Memory: as torch's out-of-memory messages state it.
CARDS = {
    "a100-40": Card("A100 40 GB", 39.4, 312.0),
    "a100-80": Card("A100 80 GB", 79.1, 312.0),
    "h100-80": Card("H100 SXM 80 GB", 79.1, 989.4),
    "h200-141": Card("H200 141 GB", 139.7, 989.4),
    "l4-24": Card("L4 24 GB", 22.0, 121.0),
    "t4-16": Card("T4 16 GB", 14.56, 65.0, torch.float16),
    "rtx-8": Card("RTX 4060 8 GB", 7.6, 30.2),
    "rtx-24": Card("RTX 4090 24 GB", 23.6, 165.2),
}
GIB = 2**30
CONTEXT_BYTES = int(0.6 * GIB)  # assumed: CUDA's context, its libraries and their workspaces
RESERVE = 0.05  # assumed: what the allocator holds beyond the tensors of a step, as a share of them
PATCHES = 49
CAPTION_LENGTHS = (11, 12, 12, 11, 12)  # 11.6 tokens of phi-2's tokenizer; the end token is no input
CONVERSATION_TOKENS, CONVERSATION_ANSWERS = 165, 125  # assumed, of LLaVA-Instruct-150K
IMAGES, CONVERSATIONS = 118_287, 157_712  # of COCO train2017; of LLaVA-Instruct-150K


class Row(NamedTuple):
    """One image and its branches. branches: text tokens of each; supervised: tokens that are learnt from."""

    prefix: int
    branches: tuple[int, ...]
    supervised: int

    @property
    def length(self) -> int:
        return self.prefix + sum(self.branches)

    @property
    def branch_ids(self) -> list[int]:
        return [0] * self.prefix + [number for number, size in enumerate(self.branches, 1) for _ in range(size)]


class Counts(NamedTuple):
    """Of one training step, in bytes, but for the FLOPs.

    activations: kept for the backward pass when the decoder is through. logits: at most beside them in the loss and its
    backward pass; layers: in the decoder's forward and backward pass; tower: before the decoder begins."""

    activations: float
    logits: float
    layers: float
    tower: float
    flops: float
    tower_flops: float


class LikeCuda(TorchFunctionMode):
    """Makes meta tensors keep what CUDA keeps: autocast to dtype (None: none), fused attention and dropout.

    The lists are those of ATen/autocast_mode.h, as far as decoders and towers of transformers use them."""

    low = {F.linear, F.conv2d, torch.matmul, torch.bmm, F.scaled_dot_product_attention}
    high = {F.layer_norm, F.group_norm, F.softmax, F.log_softmax, F.cross_entropy, torch.softmax, torch.rsqrt}
    high |= {torch.pow, torch.exp, torch.Tensor.pow, torch.Tensor.__pow__, torch.Tensor.softmax}

    def __init__(self, dtype: torch.dtype | None):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        dtype = self.dtype if func in self.low else torch.float32
        if self.dtype is not None and func in self.low | self.high:
            args, kwargs = tree_map(lambda x: x.to(dtype) if _is_float(x) else x, (args, kwargs))
        own = {F.scaled_dot_product_attention: self._attention, F.dropout: self._dropout}
        return own.get(func, func)(*args, **kwargs)

    def _attention(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **kwargs):
        if attn_mask is None:
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
        bias = torch.empty_like(attn_mask, dtype=query.dtype).expand(*query.shape[:3], -1)
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, bias, True, dropout_p, is_causal, scale=scale)[0]

    def _dropout(self, input, p=0.5, training=True, inplace=False):
        return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


class Recompute(LikeCuda):
    """LikeCuda in a checkpointed layer's second forward pass. Unlike real ones, what a layer makes under these modes is
    held by cycles of Python's frames: it is freed before the next."""

    def __enter__(self) -> Any:
        gc.collect()
        return super().__enter__()


def _varlen(query, key, value, query_starts, key_starts, longest_query, longest_key, scale=None, **kwargs):
    """What torch.nn.attention.varlen.varlen_attn keeps and computes, with a kernel that takes meta tensors."""
    flash = torch.ops.aten._flash_attention_forward
    lengths = (longest_query, longest_key)
    return flash(query, key, value, query_starts, key_starts, *lengths, 0.0, True, False, scale=scale)[0]


def _planned_attention(module, query, key, value, attention_mask, scaling=None, segments=None, **kwargs):
    groups = query.shape[1] // key.shape[1]
    query, key, value = query[0], *(x.repeat_interleave(groups, dim=1)[0] if groups > 1 else x[0] for x in (key, value))
    return attend_by_piece(query, key, value, segments, scaling, _varlen).unsqueeze(0), None


# What batching.packing does on CUDA; there it asks query.is_cuda, which a meta tensor is not.
PLANNED_ATTENTION = "clip_phi_planned_packed"
AttentionInterface.register(PLANNED_ATTENTION, _planned_attention)
AttentionMaskInterface.register(PLANNED_ATTENTION, sdpa_mask)


def _is_float(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


class Ledger(TorchDispatchMode):
    """Books the bytes of the storages that come to be inside it, until they are freed: now, and peak.

    Scalars and seeds of random generators, up to 64 bytes, are not booked."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: dict[int, tuple[int, str, tuple[int, ...], torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        given = {x.untyped_storage()._cdata for x in tensors}
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in given and key not in self.alive and size > 64:
                self.alive[key] = (size, str(func), tuple(tensor.shape), tensor.dtype)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, key)
        return result

    def _free(self, key: int) -> None:
        self.now -= self.alive.pop(key)[0]

    def take_peak(self) -> int:
        """The highest since it was last asked for."""
        peak, self.peak = self.peak, self.now
        return peak


def build_model(config: ClipPhiConfig, arguments: TrainingArguments, dtype: torch.dtype) -> ClipPhiForCausalLM:
    """As training has it, on the meta device: frozen weights in dtype, trained ones and their gradients in float32."""
    with torch.device("meta"):
        model = ClipPhiForCausalLM(config).to(dtype)
        model.freeze_backbones()
        if isinstance(arguments, Stage2Arguments):
            from peft import LoraConfig

            targets = "|".join(name.strip() for name in arguments.lora_targets.split(","))
            modules = rf"model\.language_model\..*\.({targets})"
            options = {"lora_alpha": arguments.lora_alpha, "lora_dropout": arguments.lora_dropout}
            model.add_adapter(LoraConfig(r=arguments.lora_rank, target_modules=modules, **options))
            model.model.projector.requires_grad_(True)
    model.set_attn_implementation({"text_config": PLANNED_ATTENTION})
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            parameter.grad = torch.empty_like(parameter)
    if arguments.gradient_checkpointing:
        checkpointing: dict[str, Any] = {"use_reentrant": False}
        checkpointing["context_fn"] = lambda: (nullcontext(), Recompute(dtype))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers 5.23 has a new name for it, 5.18 has not
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        model.disable_input_require_grads()  # else the tower's states would be kept, too
    return model.train()


def count_step(
    model: ClipPhiForCausalLM,
    row: Row,
    rows: int,
    autocast: torch.dtype | None,
    watch: Callable[[Ledger], Any] | None = None,
) -> Counts:
    """Forward and backward of so many rows on the meta device. watch: is shown the ledger behind the decoder."""
    vision: Any = model.config.vision_config
    ledger, flops = Ledger(), FlopCounterMode(display=False)

    def empty(*shape: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    pixels = empty(rows, 3, vision.image_size, vision.image_size, dtype=torch.float32)
    segments = make_segments([row.branch_ids] * rows).map(lambda tensor: tensor.to("meta"))
    mask = empty(1, 1, 1, 1, dtype=torch.bool)  # as ClipPhiModel.forward gives it beside segments
    ids, targets = empty(1, rows * row.length), empty(rows * row.supervised)
    gc.collect()
    gc.freeze()  # Recompute's collections shall be fast
    with ledger, flops, LikeCuda(autocast):
        embeds = model.get_input_embeddings()(ids)
        features = torch.cat(list(model.model._project(model.get_vision_features(pixels)))).to(embeds.dtype)
        tower, tower_flops = ledger.take_peak(), flops.get_total_flops()
        embeds = embeds.masked_scatter(empty(*ids.shape, 1, dtype=torch.bool), features)
        hidden = model.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=ids, use_cache=False, segments=segments
        ).last_hidden_state
        del embeds, features
        activations = ledger.now - hidden.untyped_storage().nbytes()
        if watch is not None:
            watch(ledger)
        peaks = [ledger.take_peak()]  # of the decoder's forward pass; then of the loss; then of its backward pass
        hidden.register_hook(lambda gradient: peaks.append(ledger.take_peak()))
        loss = model._loss(hidden.flatten(0, 1)[: len(targets)], targets, num_items_in_batch=len(targets))
        del hidden
        loss.backward()
        peaks.append(ledger.take_peak())
    gc.unfreeze()
    layers = max(peaks[0], peaks[2]) - activations
    return Counts(activations, peaks[1] - activations, layers, tower, flops.get_total_flops(), tower_flops)


def make_plan(
    arguments: TrainingArguments, card: Card, mfu: float, config: ClipPhiConfig | None = None
) -> dict[str, Any]:
    """For json: parameters, FLOPs per sample (a caption or a conversation), the memory bill in bytes, the largest token
    budget, and the time of an epoch. config: of the model; TinyCLIP and phi-2 if None.

    The bill is that of the largest budget that fits, or of one image if none does; mfu is assumed, all else counted."""
    config = config or ClipPhiConfig()
    row = typical_row(arguments)
    model = build_model(config, arguments, card.dtype)
    sizes = [(each.numel(), each.requires_grad, each.dim()) for each in model.parameters()]
    frozen = sum(size for size, trained, _ in sizes if not trained)
    trained = sum(size for size, is_trained, _ in sizes if is_trained)
    fixed = {
        "frozen weights": frozen * card.dtype.itemsize,
        "trained weights": trained * 4,
        "gradients": trained * 4,
        "optimizer": trained * 8 if arguments.optimizer == "adamw" else _adam8bit_bytes(sizes),
        "CUDA context": CONTEXT_BYTES,
    }
    # Few rows, and so many that the loss is made in chunks: all else grows in proportion.
    chunk = max(1, ClipPhiForCausalLM.max_logits // model.lm_head.out_features)
    many = 2 + 2 * chunk // row.supervised
    counted = {rows: count_step(model, row, rows, card.dtype) for rows in (1, 2, many, 2 * many)}

    def bill(rows: int) -> dict[str, int]:
        small = rows * row.supervised <= chunk
        (low, first), (high, second) = [(n, counted[n]) for n in ((1, 2) if small else (many, 2 * many))]

        def grown(name: str) -> float:
            slope = (getattr(second, name) - getattr(first, name)) / (high - low)
            return getattr(first, name) + slope * (rows - low)

        pixels = rows * 3 * model.config.vision_config.image_size**2 * 4  # type: ignore[union-attr]
        step = {
            "activations": grown("activations"),
            "loss or a layer, at its peak": max(grown("logits"), grown("layers")),
            "pixels": pixels,
        }
        step["tower"] = max(0.0, grown("tower") - sum(step.values()))  # it is through before the decoder begins
        total = {name: int(value) for name, value in (fixed | step).items()}
        return total | {"allocator": int(RESERVE * (sum(total.values()) - CONTEXT_BYTES))}

    limit = card.memory * GIB
    low, high = 0, 1
    while sum(bill(high).values()) <= limit:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sum(bill(middle).values()) <= limit else (low, middle)
    flops = counted[many].flops / many / len(row.branches)
    samples_per_second = mfu * card.tflops * 1e12 / flops
    samples = IMAGES * len(row.branches) if arguments.stage == 1 else CONVERSATIONS
    return {
        "gpu": card.name,
        "stage": arguments.stage,
        "parameters": frozen + trained,
        "trainable_parameters": trained,
        "flops_per_sample": flops,
        "tower_flops_per_sample": counted[many].tower_flops / many / len(row.branches),
        "activation_bytes_per_token": (counted[2 * many].activations - counted[many].activations) / many / row.length,
        "memory_bytes": int(limit),
        "bill_bytes": bill(max(low, 1)),
        "fits": low > 0,
        "images_per_step": low,
        "tokens_per_step": low * row.length,
        "tokens_per_image": row.length,
        "assumed_mfu": mfu,
        "samples_per_second": samples_per_second,
        "samples_per_epoch": samples,
        "hours_per_epoch": samples / samples_per_second / 3600,
    }


def typical_row(arguments: TrainingArguments) -> Row:
    """COCO's captions, or the two conversations that LLaVA-Instruct has about an image."""
    if isinstance(arguments, Stage2Arguments):
        return Row(PATCHES, (CONVERSATION_TOKENS,) * 2, CONVERSATION_ANSWERS * 2)
    lengths = (CAPTION_LENGTHS * (arguments.branches_per_image or 1))[: arguments.branches_per_image]
    return Row(PATCHES, lengths, sum(lengths) + len(lengths))


def _adam8bit_bytes(sizes: list[tuple[int, bool, int]]) -> int:
    """Of bitsandbytes: two states of a byte and a float32 for each block of 256; small tensors keep float32 states."""
    counted = [size for size, is_trained, _ in sizes if is_trained]
    return sum(2 * size + 8 * -(-size // 256) if size >= 4096 else 8 * size for size in counted)


def as_text(plan: dict[str, Any]) -> str:
    """A table for people."""
    lines = [
        f"{plan['gpu']}, stage {plan['stage']}",
        f"  parameters            {plan['parameters']:,}, of which {plan['trainable_parameters']:,} are trained",
        f"  FLOPs per sample      {plan['flops_per_sample'] / 1e9:,.0f} G",
        f"  kept per token        {plan['activation_bytes_per_token'] / 1e6:.2f} MB for the backward pass",
    ]
    lines += [f"  {name:<30}{size / GIB:8.2f} GiB" for name, size in plan["bill_bytes"].items()]
    total, memory = sum(plan["bill_bytes"].values()) / GIB, plan["memory_bytes"] / GIB
    lines.append(f"  {'together':<30}{total:8.2f} GiB of {memory:.2f}")
    if plan["fits"]:
        lines.append(f"  largest --tokens_per_step   {plan['tokens_per_step']:,} ({plan['images_per_step']:,} images)")
    else:
        lines.append("  Not even one image fits: try --gradient_checkpointing, or a larger card")
    lines.append(
        f"  at {plan['assumed_mfu']:.0%} of its peak        {plan['samples_per_second']:,.0f} samples/s, "
        f"{plan['hours_per_epoch']:.2f} hours for an epoch of {plan['samples_per_epoch']:,}"
    )
    return "\n".join(lines)
