"""What a run needs, before a GPU is rented: parameters, FLOPs, memory by item, the largest forward pass, hours.

What can be counted is counted, on meta tensors of the true shapes: a training step of one and of two images runs as it
would on the card (train mode, autocast, fused attention) while every tensor that it makes is booked; the straight line
through both gives each item. What cannot be counted is assumed, and the plan says so.
"""

import gc
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
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

from ..batching.attention import PACKED_ATTENTION, attend_by_piece, make_pack_layout
from ..batching.packing import SharedPrefixSample
from ..training.arguments import Stage2Arguments, TrainingArguments
from ..training.model import add_lora, count_parameters

GIB = 2**30


class Card(NamedTuple):
    """memory: GiB that torch reports as its total. tflops: dense peak of dtype with fp32 accumulation.

    context: bytes that a process takes before it has a tensor. reserve: what the allocator holds beyond the tensors of
    a step, as a share of them. is_cuda: autocast to dtype, fused kernels of variable length, 8-bit Adam by default."""

    name: str
    memory: float
    tflops: float
    dtype: torch.dtype = torch.bfloat16
    context: int = int(0.6 * GIB)  # assumed: CUDA's context, its libraries and their workspaces
    reserve: float = 0.05  # assumed
    is_cuda: bool = True

    @property
    def autocast(self) -> torch.dtype | None:
        return self.dtype if self.is_cuda else None


# Peaks of GPUs: NVIDIA's data sheets of A100, H100, H200, L4 and T4 without sparsity; the Ada whitepaper for the RTX
# 4090, and from it by tensor cores and clock for the RTX 4060. Memory: as torch's out-of-memory messages state it.
CARDS = {
    "a100-40": Card("A100 40 GB", 39.4, 312.0),
    "a100-80": Card("A100 80 GB", 79.1, 312.0),
    "h100-80": Card("H100 SXM 80 GB", 79.1, 989.4),
    "h200-141": Card("H200 141 GB", 139.7, 989.4),
    "l4-24": Card("L4 24 GB", 22.0, 121.0),
    "t4-16": Card("T4 16 GB", 14.56, 65.0, torch.float16),
    "rtx-8": Card("RTX 4060 8 GB", 7.6, 30.2),
    "rtx-24": Card("RTX 4090 24 GB", 23.6, 165.2),
    # Context: Python, libraries and what their kernels keep, measured (docs/true_size.md). Peak: of a core, assumed.
    "cpu-16": Card("CPU, 16 GB", 16e9 / GIB, 0.1, torch.float32, int(0.65 * GIB), 0.0, is_cuda=False),
}
PATCHES = 49
CAPTION_LENGTHS = (11, 12, 12, 11, 12)  # 11.6 tokens of phi-2's tokenizer; the end token is no input
CONVERSATION_TOKENS, CONVERSATION_ANSWERS = 165, 125  # assumed, of LLaVA-Instruct-150K
IMAGES, CONVERSATIONS = 118_287, 157_712  # of COCO train2017; of LLaVA-Instruct-150K


class Row(NamedTuple):
    """One image and its branches. branches: text tokens of each; supervised: tokens that are learnt from."""

    prefix: int
    conversations: tuple[int, ...]
    supervised: int

    @classmethod
    def of(cls, tree: SharedPrefixSample) -> "Row":
        counts = Counter(tree.conversation_ids)
        return cls(counts.pop(0, 0), tuple(counts[number] for number in sorted(counts)), len(tree.shift_labels))

    @property
    def length(self) -> int:
        return self.prefix + sum(self.conversations)

    @property
    def conversation_ids(self) -> list[int]:
        return [0] * self.prefix + [number for number, size in enumerate(self.conversations, 1) for _ in range(size)]


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


def _planned_attention(module, query, key, value, attention_mask, scaling=None, pack_layout=None, **kwargs):
    groups = query.shape[1] // key.shape[1]
    query, key, value = query[0], *(x.repeat_interleave(groups, dim=1)[0] if groups > 1 else x[0] for x in (key, value))
    return attend_by_piece(query, key, value, pack_layout, scaling, _varlen).unsqueeze(0), None


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


class _Dequantized(torch.autograd.Function):
    """A frozen layer of bitsandbytes: its weight is made in dtype for the time of a product; int8 keeps the input."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, kind: str) -> torch.Tensor:
        ctx.weight, ctx.kept, ctx.dtype = weight, x if kind == "int8" else None, x.dtype
        return F.linear(x.to(weight.dtype), weight.clone(), bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        weight = ctx.weight.clone()
        return torch.matmul(gradients[0].to(weight.dtype), weight).to(ctx.dtype), None, None, None


class QuantizedLinear(torch.nn.Linear):
    """Stands for a quantised layer; its weight is a stand-in of the true shape, in the dtype of the computation."""

    kind = "nf4"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Dequantized.apply(x, self.weight, self.bias, self.kind)  # type: ignore[no-any-return, no-untyped-call]

    @property
    def weight_bytes(self) -> int:
        """nf4: half a byte, a byte for each block of 64, a float32 for each 256 of those, and tables of 16 and 256
        float32 and an offset; in all 4.127 bits a weight. int8: a byte, and a float32 for each row."""
        size, rows = self.weight.numel(), self.weight.shape[0]
        if self.kind == "int8":
            return size + 4 * rows
        blocks = -(-size // 64)
        return -(-size // 2) + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256 + 1)


def build_model(config: ClipPhiConfig, arguments: TrainingArguments, dtype: torch.dtype) -> ClipPhiForCausalLM:
    """As training has it, on the meta device: frozen weights in dtype, trained ones and their gradients in float32."""
    with torch.device("meta"):
        model = ClipPhiForCausalLM(config).to(dtype)
        model.freeze_backbones()
        if isinstance(arguments, Stage2Arguments):
            _make_trainable(model, arguments)
    # On CUDA in half precision a kernel of variable length, else SDPA, which takes meta tensors as it is.
    model.set_attn_implementation({"text_config": PLANNED_ATTENTION if dtype.itemsize == 2 else PACKED_ATTENTION})
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


def _make_trainable(model: ClipPhiForCausalLM, arguments: Stage2Arguments) -> None:
    """What stage 2 trains beside the projector: LoRA on a decoder that may be quantised, or the decoder itself."""
    decoder = model.model.language_model
    if arguments.tune_decoder == "full":
        decoder.requires_grad_(True)
        model.lm_head.requires_grad_(True)
        return
    for module in decoder.modules():
        if arguments.quantization != "none" and isinstance(module, torch.nn.Linear):
            module.__class__, module.kind = QuantizedLinear, arguments.quantization  # type: ignore[assignment]
    add_lora(model, arguments)
    model.model.projector.requires_grad_(True)


@contextmanager
def _loss_recomputed_alike(autocast: torch.dtype | None) -> Iterator[None]:
    """LikeCuda is off inside backward(), where the chunks of a large loss are made again."""
    module: Any = sys.modules[ClipPhiForCausalLM.__module__]
    plain = module.checkpoint
    module.checkpoint = partial(plain, context_fn=lambda: (nullcontext(), Recompute(autocast)))
    try:
        yield
    finally:
        module.checkpoint = plain


def count_step(
    model: ClipPhiForCausalLM,
    rows: Sequence[Row],
    autocast: torch.dtype | None,
    watch: Callable[[Ledger], Any] | None = None,
) -> Counts:
    """Forward and backward of a pack of these rows, on the meta device; those with a prefix have an image.

    watch: is shown the ledger behind the decoder."""
    vision: Any = model.config.vision_config
    ledger, flops = Ledger(), FlopCounterMode(display=False)

    def empty(*shape: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    images = sum(row.prefix > 0 for row in rows)
    pixels = empty(images, 3, vision.image_size, vision.image_size, dtype=torch.float32)
    pack_layout = make_pack_layout([row.conversation_ids for row in rows]).map(lambda tensor: tensor.to("meta"))
    mask = empty(1, 1, 1, 1, dtype=torch.bool)  # as ClipPhiModel.forward gives it beside segments
    ids, targets = empty(1, sum(row.length for row in rows)), empty(sum(row.supervised for row in rows))
    gc.collect()
    gc.freeze()  # Recompute's collections shall be fast
    with ledger, flops, LikeCuda(autocast), _loss_recomputed_alike(autocast):
        embeds = model.get_input_embeddings()(ids)
        if images:
            features = torch.cat(list(model.model._project(model.get_vision_features(pixels)))).to(embeds.dtype)
        else:
            embeds.requires_grad_()
        tower, tower_flops = ledger.take_peak(), flops.get_total_flops()
        if images:
            embeds = embeds.masked_scatter(empty(*ids.shape, 1, dtype=torch.bool), features)
            del features
        hidden = model.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=ids, use_cache=False, pack_layout=pack_layout
        ).last_hidden_state
        del embeds
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


def fixed_bytes(model: ClipPhiForCausalLM, arguments: TrainingArguments, card: Card) -> dict[str, int]:
    """What a run holds whatever the size of its steps, by item."""
    quantized = [each for each in model.modules() if isinstance(each, QuantizedLinear)]
    sizes = [(each.numel(), each.requires_grad) for each in model.parameters()]
    frozen = sum(size for size, is_trained in sizes if not is_trained) - sum(each.weight.numel() for each in quantized)
    trained = [size for size, is_trained in sizes if is_trained]
    adamw = arguments.optim == "adamw_torch_fused" or (arguments.optim == "auto" and not card.is_cuda)
    return {
        "frozen weights": frozen * card.dtype.itemsize + sum(each.weight_bytes for each in quantized),
        "trained weights": sum(trained) * 4,
        "gradients": sum(trained) * 4,
        "optimizer": sum(trained) * 8 if adamw else _adam8bit_bytes(trained),
        "context": card.context,
    }


def _bill(fixed: dict[str, int], counts: Counts, pixels: int, card: Card) -> dict[str, int]:
    """All items of a step, in bytes. pixels: bytes of its images."""
    step = {
        "activations": counts.activations,
        "loss or a layer, at its peak": max(counts.logits, counts.layers),
        "pixels": pixels,
    }
    step["tower"] = max(0.0, counts.tower - sum(step.values()))  # it is through before the decoder begins
    total = {name: int(value) for name, value in (fixed | step).items()}
    return total | {"allocator": int(card.reserve * (sum(total.values()) - card.context))}


def _pixel_bytes(model: ClipPhiForCausalLM, images: int) -> int:
    return images * 3 * model.config.vision_config.image_size**2 * 4  # type: ignore[union-attr]


def bill_of_pack(
    arguments: TrainingArguments, card: Card, rows: Sequence[Row], config: ClipPhiConfig | None = None
) -> dict[str, int]:
    """The memory in bytes, by item, of a run whose largest pack has these rows."""
    model = build_model(config or ClipPhiConfig(), arguments, card.dtype)
    counts = count_step(model, rows, card.autocast)
    pixels = _pixel_bytes(model, sum(row.prefix > 0 for row in rows))
    return _bill(fixed_bytes(model, arguments, card), counts, pixels, card)


def make_plan(
    arguments: TrainingArguments, card: Card, mfu: float, config: ClipPhiConfig | None = None
) -> dict[str, Any]:
    """For json: parameters, FLOPs per sample (a caption or a conversation), the memory bill in bytes, the largest token
    budget, and the time of an epoch. config: of the model; TinyCLIP and phi-2 if None.

    The bill is that of the largest budget that fits, or of one image if none does; mfu is assumed, all else counted.
    A paged optimizer's states are in the bill, but may leave the card while a step needs the room."""
    config = config or ClipPhiConfig()
    row = typical_row(arguments)
    model = build_model(config, arguments, card.dtype)
    trained, total = count_parameters(model)
    fixed = fixed_bytes(model, arguments, card)
    pageable = fixed["optimizer"] if arguments.optim.startswith("paged") else 0
    # Few rows, and so many that the loss is made in chunks: all else grows in proportion.
    chunk = max(1, ClipPhiForCausalLM.max_logits // model.lm_head.out_features)
    many = 2 + 2 * chunk // row.supervised
    counted = {rows: count_step(model, [row] * rows, card.autocast) for rows in (1, 2, many, 2 * many)}

    def bill(rows: int) -> dict[str, int]:
        small = rows * row.supervised <= chunk
        (low, first), (high, second) = [(n, counted[n]) for n in ((1, 2) if small else (many, 2 * many))]
        share = (rows - low) / (high - low)
        counts = Counts(*(a + share * (b - a) for a, b in zip(first, second, strict=True)))
        return _bill(fixed, counts, _pixel_bytes(model, rows), card)

    limit = card.memory * GIB + pageable
    low, high = 0, 1
    while sum(bill(high).values()) <= limit:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sum(bill(middle).values()) <= limit else (low, middle)
    flops = counted[many].flops / many / len(row.conversations)
    samples_per_second = mfu * card.tflops * 1e12 / flops
    samples = IMAGES * len(row.conversations) if arguments.stage == 1 else CONVERSATIONS
    return {
        "gpu": card.name,
        "stage": arguments.stage,
        "parameters": total,
        "trainable_parameters": trained,
        "flops_per_sample": flops,
        "tower_flops_per_sample": counted[many].tower_flops / many / len(row.conversations),
        "activation_bytes_per_token": (counted[2 * many].activations - counted[many].activations) / many / row.length,
        "memory_bytes": int(card.memory * GIB),
        "bill_bytes": bill(max(low, 1)),
        "pageable_bytes": pageable,
        "fits": low > 0,
        "images_per_step": low,
        "max_tokens_per_batch": low * row.length,
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
    lengths = (CAPTION_LENGTHS * (arguments.conversations_per_image or 1))[: arguments.conversations_per_image]
    return Row(PATCHES, lengths, sum(lengths) + len(lengths))


def _adam8bit_bytes(sizes: list[int]) -> int:
    """Of bitsandbytes: two states of a byte and a float32 for each block of 256; small tensors keep float32 states."""
    return sum(2 * size + 8 * -(-size // 256) if size >= 4096 else 8 * size for size in sizes)


def as_text(plan: dict[str, Any]) -> str:
    """A table for people."""
    digits = 0 if plan["samples_per_second"] >= 10 else 2
    lines = [
        f"{plan['gpu']}, stage {plan['stage']}",
        f"  parameters            {plan['parameters']:,}, of which {plan['trainable_parameters']:,} are trained",
        f"  FLOPs per sample      {plan['flops_per_sample'] / 1e9:,.0f} G",
        f"  kept per token        {plan['activation_bytes_per_token'] / 1e6:.2f} MB for the backward pass",
    ]
    lines += [f"  {name:<30}{size / GIB:8.2f} GiB" for name, size in plan["bill_bytes"].items()]
    total, memory = sum(plan["bill_bytes"].values()) / GIB, plan["memory_bytes"] / GIB
    lines.append(f"  {'together':<30}{total:8.2f} GiB of {memory:.2f}")
    if plan["pageable_bytes"]:
        lines.append("  of which the optimizer may leave the card while a step needs the room")
    if plan["fits"]:
        lines.append(
            f"  largest --max_tokens_per_batch   {plan['max_tokens_per_batch']:,} ({plan['images_per_step']:,} images)"
        )
    else:
        lines.append("  Not even one image fits: try --gradient_checkpointing, or a larger card")
    lines.append(
        f"  at {plan['assumed_mfu']:.0%} of its peak        {plan['samples_per_second']:,.{digits}f} samples/s, "
        f"{plan['hours_per_epoch']:.2f} hours for an epoch of {plan['samples_per_epoch']:,}"
    )
    return "\n".join(lines)
