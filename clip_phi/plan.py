"""What a run needs, before a GPU is rented: parameters, FLOPs, memory by item, the largest forward pass, hours.

What can be counted is counted, on meta tensors of the true shapes: a training step of one and of two images runs as it
would on the card (train mode, autocast, fused attention) while every tensor that it makes is booked; the straight line
through both gives each item. What cannot be counted is assumed, and the plan says so.
"""

import gc
import json
import math
import warnings
import weakref
from argparse import Namespace
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
from .training.arguments import STAGES, Stage1Arguments, Stage2Arguments, TrainingArguments


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
CAPTION_TOKENS, CONVERSATION_TOKENS, CONVERSATION_ANSWERS = 11.6, 165, 125  # phi-2's tokenizer; the latter assumed
IMAGES = {1: 118_287, 2: 157_712}  # COCO train2017; conversations of LLaVA-Instruct-150K


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
        options = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), Recompute(dtype))}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers 5.23 has a new name for it, 5.18 has not
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
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
        features = torch.cat(model.get_image_features(pixels, return_dict=True).pooler_output).to(embeds.dtype)
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
