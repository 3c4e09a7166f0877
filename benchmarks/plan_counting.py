"""Counted memory and FLOPs of a training step: the reference for the formula of `clip-phi plan`.

A step runs on meta tensors of the true shapes, as on a GPU: in train mode, with autocast and fused attention. Every
tensor that it creates is recorded.
"""

import gc
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from clip_phi.batching.attention import PACKED_ATTENTION, attend_by_piece, make_pack_layout, without_batch
from clip_phi.training.arguments import Stage2Arguments, TrainingArguments
from clip_phi.training.model import make_trainable
from modeling_clip_phi import ClipPhiConfig, ClipPhiForCausalLM


class Counts(NamedTuple):
    """Memory in bytes and FLOPs of one training step."""

    activations: float  # kept for the backward pass when the decoder has finished
    logits: float  # peak beside the activations, in the loss and its backward pass
    layers: float  # peak beside the activations, in the decoder's forward and backward pass
    tower: float  # peak before the decoder starts
    flops: float
    tower_flops: float


class LikeCuda(TorchFunctionMode):
    """Makes meta tensors keep what CUDA keeps: autocast to dtype (or None), fused attention and dropout.

    The lists are those of ATen/autocast_mode.h, as far as decoders and towers of transformers use them.
    """

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
    query, key, value = without_batch(query, key, value)
    return attend_by_piece(query, key, value, pack_layout, scaling, _varlen).unsqueeze(0), None


# The attention of clip_phi.batching on CUDA. The original tests query.is_cuda, which is False for a meta tensor.
PLANNED_ATTENTION = "clip_phi_planned_packed"
AttentionInterface.register(PLANNED_ATTENTION, _planned_attention)
AttentionMaskInterface.register(PLANNED_ATTENTION, sdpa_mask)


def _is_float(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def dq_accum_bytes(query: torch.Tensor, query_starts: torch.Tensor) -> int:
    """What FlashAttention's backward pass allocates for the sums of the query's gradient, in float32.

    It pads each piece to blocks of 128 queries, and the head size to a multiple of 32."""
    tokens, heads, size = query.shape
    return 4 * (tokens + 128 * (len(query_starts) - 1)) * heads * (-(-size // 32) * 32)


class Ledger(TorchDispatchMode):
    """Counts the bytes of the storages that are created inside it until they are freed: now, and at the peak.

    Storages of up to 64 bytes (scalars, seeds of random generators) are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: dict[int, tuple[int, str, tuple[int, ...], torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._flash_attention_backward.default:
            self.peak = max(self.peak, self.now + dq_accum_bytes(args[1], args[6]))
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
        """Return the peak since the last call."""
        peak, self.peak = self.peak, self.now
        return peak


class _Dequantized(torch.autograd.Function):
    """A frozen layer of bitsandbytes. Its weight exists in dtype during a product only; int8 keeps the input."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, kind: str) -> torch.Tensor:
        ctx.weight, ctx.kept, ctx.dtype = weight, x if kind == "int8" else None, x.dtype
        return F.linear(x.to(weight.dtype), weight.clone(), bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        weight = ctx.weight.clone()
        return torch.matmul(gradients[0].to(weight.dtype), weight).to(ctx.dtype), None, None, None


class QuantizedLinear(torch.nn.Linear):
    """Replaces a quantised layer. Its weight has the true shape, and the dtype of the computation."""

    kind = "nf4"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Dequantized.apply(x, self.weight, self.bias, self.kind)  # type: ignore[no-any-return, no-untyped-call]

    @property
    def weight_bytes(self) -> int:
        """The bytes of the quantised weight.

        nf4 takes half a byte per weight, a byte per block of 64, a float32 per 256 blocks, and tables of 16 and 256
        float32 with an offset: in all 4.127 bits a weight. int8 takes a byte per weight and a float32 per output.
        """
        size, outputs = self.weight.numel(), self.weight.shape[0]
        if self.kind == "int8":
            return size + 4 * outputs
        blocks = -(-size // 64)
        return -(-size // 2) + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256 + 1)


def build_model(
    config: ClipPhiConfig, arguments: TrainingArguments, dtype: torch.dtype, varlen: bool | None = None
) -> ClipPhiForCausalLM:
    """Make the model of a training run on the meta device.

    Frozen weights are in dtype, trained ones and their gradients in float32.
    """
    with torch.device("meta"):
        model = ClipPhiForCausalLM(config).to(dtype)
        kind = arguments.quantization if isinstance(arguments, Stage2Arguments) else "none"
        for module in model.model.language_model.modules():
            if kind != "none" and isinstance(module, torch.nn.Linear):
                module.__class__, module.kind = QuantizedLinear, kind  # type: ignore[assignment]
        plain = replace(arguments, gradient_checkpointing=False, attention="sdpa")  # both follow below
        make_trainable(model, plain, torch.device("meta"), dtype)
    if varlen is None:
        varlen = dtype.itemsize == 2
    # The varlen kernel of CUDA in half precision, or SDPA, which accepts meta tensors as it is.
    model.set_attn_implementation({"text_config": PLANNED_ATTENTION if varlen else PACKED_ATTENTION})
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    if arguments.gradient_checkpointing:
        checkpointing: dict[str, Any] = {"use_reentrant": False}
        checkpointing["context_fn"] = lambda: (nullcontext(), Recompute(dtype))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the new name in transformers 5.23 is absent in 5.18
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        model.disable_input_require_grads()  # otherwise the tower's activations are kept, too
    return model.train()


@contextmanager
def _loss_recomputed_alike(autocast: torch.dtype | None) -> Iterator[None]:
    """Apply LikeCuda inside backward(), too, where the chunks of a large loss are recomputed."""
    module: Any = sys.modules[ClipPhiForCausalLM.__module__]
    plain = module.checkpoint
    module.checkpoint = partial(plain, context_fn=lambda: (nullcontext(), Recompute(autocast)))
    try:
        yield
    finally:
        module.checkpoint = plain


def count_step(
    model: ClipPhiForCausalLM,
    conversation_ids: Sequence[Sequence[int]],
    supervised: int,
    autocast: torch.dtype | None,
    watch: Callable[[Ledger], Any] | None = None,
) -> Counts:
    """Run the forward and backward pass of a pack on the meta device.

    Args:
        model: made by build_model().
        conversation_ids: of each sample and token, as in make_pack_layout; samples with a prefix have an image.
        supervised: tokens with a label in all samples.
        autocast: dtype of autocast, or None.
        watch: called with the ledger after the decoder.
    """
    vision: Any = model.config.vision_config
    ledger, flops = Ledger(), FlopCounterMode(display=False)

    def empty(*shape: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    images = sum(0 in ids for ids in conversation_ids)
    pixels = empty(images, 3, vision.image_size, vision.image_size, dtype=torch.float32)
    pack_layout = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), make_pack_layout(conversation_ids))
    mask = empty(1, 1, 1, 1, dtype=torch.bool)  # as ClipPhiModel.forward passes it with a pack_layout
    ids, targets = empty(1, sum(map(len, conversation_ids))), empty(supervised)
    gc.collect()
    gc.freeze()  # makes the collections of Recompute fast
    with ledger, flops, LikeCuda(autocast), _loss_recomputed_alike(autocast):
        embeds = model.get_input_embeddings()(ids)
        if images:
            features = model.model._project(model.model.get_vision_features(pixels)).flatten(0, 1).to(embeds.dtype)
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
        peaks = [ledger.take_peak()]  # of the decoder's forward pass, the loss, and its backward pass
        hidden.register_hook(lambda gradient: peaks.append(ledger.take_peak()))
        loss = model._loss(hidden.flatten(0, 1)[: len(targets)], targets, num_items_in_batch=len(targets))
        del hidden
        loss.backward()
        peaks.append(ledger.take_peak())
    gc.unfreeze()
    layers = max(peaks[0], peaks[2]) - activations
    return Counts(activations, peaks[1] - activations, layers, tower, flops.get_total_flops(), tower_flops)
