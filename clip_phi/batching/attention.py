"""Attention of packed sequences: many samples, concatenated without padding, each attending to itself only.

All other layers treat tokens independently, so a sequence of many samples costs what its tokens cost. PackLayout says
which tokens attend to which, and nothing is computed between samples.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# Names for set_attn_implementation: the varlen kernel where there is one, and SDPA by bucket everywhere.
PACKED_ATTENTION, SDPA_PACKED_ATTENTION = "clip_phi_packed", "clip_phi_sdpa_packed"
ALIKE = 0.8  # samples at least so long, relative to the longest of them, are padded together in attention


class Bucket(NamedTuple):
    """Samples of about one length, padded together for SDPA.

    places: int64 (samples, length), the place of each token in the sequence; padding repeats place 0.
    mask: bool (samples, 1, length, length), True where a query attends to a key; None for plain causal attention, if
        each sample has one conversation."""

    places: Tensor
    mask: Tensor | None


class PackLayout(NamedTuple):
    """Which tokens attend to which: to the prefix and to their own conversation, up to themselves.

    buckets: for SDPA.
    places_in_buckets: int64 (tokens,), the place of each token in the concatenated outputs of the buckets.
    key_places, query_starts, key_starts, longest: for kernels of variable length: int64 (keys,), int32 (pieces + 1,),
        int32 (pieces + 1,), (queries, keys). A piece is a prefix or a conversation; its keys are the prefix's and its
        own, and its last query attends to all of them (causal, aligned at the end)."""

    buckets: list[Bucket]
    places_in_buckets: Tensor
    key_places: Tensor
    query_starts: Tensor
    key_starts: Tensor
    longest: tuple[int, int]


def make_pack_layout(conversation_ids: Sequence[Sequence[int]]) -> PackLayout:
    """conversation_ids: of each sample and token, 0 in the prefix and 1, 2, ... in the conversations; none is empty."""
    lengths = [len(ids) for ids in conversation_ids]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    buckets, places_in_buckets, filled = [], torch.empty(int(starts[-1]), dtype=torch.long), 0
    for samples in _alike(lengths):
        length = max(lengths[sample] for sample in samples)
        places = torch.zeros((len(samples), length), dtype=torch.long)
        ids = torch.full((len(samples), length), -1)  # padding is a conversation of its own: a query needs a key
        for number, sample in enumerate(samples):
            inside = torch.arange(lengths[sample])
            places[number, : lengths[sample]] = inside + starts[sample]
            ids[number, : lengths[sample]] = torch.tensor(conversation_ids[sample])
            places_in_buckets[inside + starts[sample]] = inside + filled + number * length
        several = any(len(set(conversation_ids[sample]) - {0}) > 1 for sample in samples)
        mask = ((ids[:, None] == 0) | (ids[:, None] == ids[..., None])).tril().unsqueeze(1) if several else None
        buckets.append(Bucket(places, mask))
        filled += places.numel()
    queries, keys = [0], [0]
    key_places: list[np.ndarray] = []
    for start, ids in zip(starts, conversation_ids, strict=False):
        cuts = [0, *(np.flatnonzero(np.diff(ids)) + 1), len(ids)]
        prefix = cuts[1] if ids[0] == 0 else 0
        for first, stop in zip(cuts, cuts[1:], strict=False):
            seen = np.arange(first, stop) if first == 0 else np.concatenate([np.arange(prefix), np.arange(first, stop)])
            key_places.append(seen + start)
            queries.append(queries[-1] + int(stop - first))
            keys.append(keys[-1] + len(seen))
    keys_seen = torch.from_numpy(np.concatenate(key_places))
    query_starts, key_starts = (torch.tensor(each, dtype=torch.int32) for each in (queries, keys))
    longest = int(max(np.diff(queries))), int(max(np.diff(keys)))
    return PackLayout(buckets, places_in_buckets, keys_seen, query_starts, key_starts, longest)


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Samples in groups of about one length."""
    groups: list[list[int]] = []
    for sample in sorted(range(len(lengths)), key=lambda sample: -lengths[sample]):
        if not groups or lengths[sample] < ALIKE * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(sample)
    return groups


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface. query: (1, heads, tokens, head size). Returns (1, tokens, heads, head size).

    With a keyword pack_layout, torch's varlen kernel where there is one, else SDPA by bucket. Without, plain SDPA."""
    if (pack_layout := kwargs.pop("pack_layout", None)) is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    query, key, value = _without_batch(query, key, value, kwargs)
    if not has_varlen_kernel(query.device, query.dtype, query.shape[-1]):
        return attend_by_bucket(query, key, value, pack_layout, kwargs.get("scaling")).unsqueeze(0), None
    from torch.nn.attention.varlen import varlen_attn

    return attend_by_piece(query, key, value, pack_layout, kwargs.get("scaling"), varlen_attn).unsqueeze(0), None


def sdpa_packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """packed_attention without the varlen kernel."""
    if (pack_layout := kwargs.pop("pack_layout", None)) is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    query, key, value = _without_batch(query, key, value, kwargs)
    return attend_by_bucket(query, key, value, pack_layout, kwargs.get("scaling")).unsqueeze(0), None


def _without_batch(query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> list[Tensor]:
    """(heads, tokens, head size) of each, in the dtype of the values, which rotary embeddings leave as it is."""
    assert not kwargs.get("dropout"), "the decoder's dropout is 0"
    groups = query.shape[1] // key.shape[1]
    return [each[0].to(value.dtype) for each in (query, repeat_kv(key, groups), repeat_kv(value, groups))]


def has_varlen_kernel(device: torch.device, dtype: torch.dtype, head_size: int = 64) -> bool:
    """FlashAttention's: for half precision, on NVIDIA's GPUs from Ampere (capability 8.0) on."""
    is_half = dtype in (torch.bfloat16, torch.float16)
    if device.type != "cuda" or torch.version.hip is not None or not is_half or head_size % 8 or head_size > 256:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def attend_by_bucket(query: Tensor, key: Tensor, value: Tensor, layout: PackLayout, scaling: float | None) -> Tensor:
    """query, key, value: (heads, tokens, head size). Returns (tokens, heads, head size)."""
    outputs = []
    for places, mask in layout.buckets:
        # (heads, tokens, size) to (samples, heads, length, size)
        q, k, v = (each[:, places.flatten()].unflatten(1, places.shape).transpose(0, 1) for each in (query, key, value))
        output = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[layout.places_in_buckets]


def attend_by_piece(
    query: Tensor, key: Tensor, value: Tensor, layout: PackLayout, scaling: float | None, kernel: Callable[..., Tensor]
) -> Tensor:
    """The same with a kernel of torch.nn.attention.varlen_attn's signature, which computes nothing for padding."""
    keys, values = (each.transpose(0, 1)[layout.key_places] for each in (key, value))
    starts = (layout.query_starts, layout.key_starts, *layout.longest)
    # The window is causal: the last query of a piece attends to its last key.
    return kernel(query.transpose(0, 1), keys, values, *starts, scale=scaling, window_size=(-1, 0))


for name, function in ((PACKED_ATTENTION, packed_attention), (SDPA_PACKED_ATTENTION, sdpa_packed_attention)):
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
