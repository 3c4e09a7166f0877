"""Packs: trees one behind the other in one row, without padding, planned ahead so that every row is full.

Every layer but attention treats tokens alone, so a row of many trees costs what its tokens cost. Attention is told by
PackLayout who sees whom, and computes nothing between trees.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED_ATTENTION = "clip_phi_packed"
ALIKE = 0.8  # trees at least so long, relative to the longest of them, are padded together in attention


class Bucket(NamedTuple):
    """Trees of about one length, padded together for SDPA.

    places: int64 (trees, length): where in the row each token stands; padding repeats place 0.
    sees: bool (trees, 1, length, length), or None if every tree has one branch: plain causal attention."""

    places: torch.Tensor
    sees: torch.Tensor | None


class PackLayout(NamedTuple):
    """Who sees whom in a row of trees: the prefix and the own branch, up to itself.

    buckets, back: for SDPA; back: int64 (tokens,): where in the buckets' outputs, one behind the other, each token is.
    key_places: int64 (keys,), query_starts, key_starts: int32 (pieces + 1,), longest: of (query, key) pieces. For
    kernels of variable length: a piece is a prefix or a branch; its keys are the prefix's and its own, and its last
    query sees all of them (causal, aligned at the end)."""

    buckets: list[Bucket]
    back: torch.Tensor
    key_places: torch.Tensor
    query_starts: torch.Tensor
    key_starts: torch.Tensor
    longest: tuple[int, int]

    def map(self, function: Any) -> "PackLayout":
        """Apply a function to every tensor."""
        buckets = [Bucket(function(places), None if sees is None else function(sees)) for places, sees in self.buckets]
        back, key_places, query_starts, key_starts = map(function, self[1:5])
        return PackLayout(buckets, back, key_places, query_starts, key_starts, self.longest)


def make_pack_layout(conversation_ids: Sequence[Sequence[int]]) -> PackLayout:
    """conversation_ids: of each sample and token: 0 in the prefix, 1, 2, ... in the conversations; none is empty."""
    lengths = [len(ids) for ids in conversation_ids]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    buckets, back, filled = [], torch.empty(int(starts[-1]), dtype=torch.long), 0
    for trees in _alike(lengths):
        length = max(lengths[tree] for tree in trees)
        places = torch.zeros((len(trees), length), dtype=torch.long)
        ids = torch.full((len(trees), length), -1)  # padding is a branch of its own, so that no row is left blind
        for row, tree in enumerate(trees):
            inside = torch.arange(lengths[tree])
            places[row, : lengths[tree]] = inside + starts[tree]
            ids[row, : lengths[tree]] = torch.tensor(conversation_ids[tree])
            back[inside + starts[tree]] = inside + filled + row * length
        several = any(len(set(conversation_ids[tree]) - {0}) > 1 for tree in trees)
        sees = ((ids[:, None] == 0) | (ids[:, None] == ids[..., None])).tril().unsqueeze(1) if several else None
        buckets.append(Bucket(places, sees))
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
    return PackLayout(
        buckets,
        back,
        torch.from_numpy(np.concatenate(key_places)),
        torch.tensor(queries, dtype=torch.int32),
        torch.tensor(keys, dtype=torch.int32),
        (int(max(np.diff(queries))), int(max(np.diff(keys)))),
    )


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Trees in groups of about one length."""
    groups: list[list[int]] = []
    for tree in sorted(range(len(lengths)), key=lambda tree: -lengths[tree]):
        if not groups or lengths[tree] < ALIKE * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(tree)
    return groups


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    pack_layout: PackLayout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface. query: (1, heads, tokens, head size); returns (1, tokens, heads, head size).

    With segments, torch's varlen kernel where there is one, else SDPA by bucket; without, plain SDPA."""
    if pack_layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    assert not dropout, "the decoder's dropout is 0"
    groups = query.shape[1] // key.shape[1]
    query, key, value = query[0], repeat_kv(key, groups)[0], repeat_kv(value, groups)[0]
    if has_varlen_kernel(query.device, query.dtype):
        from torch.nn.attention.varlen import varlen_attn

        return attend_by_piece(query, key, value, pack_layout, scaling, varlen_attn).unsqueeze(0), None
    return attend_by_bucket(query, key, value, pack_layout, scaling).unsqueeze(0), None


def has_varlen_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """It is FlashAttention's: for half precision, on GPUs from Ampere (capability 8.0) on."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def attend_by_bucket(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack_layout: PackLayout, scaling: float | None
) -> torch.Tensor:
    """query, key, value: (heads, tokens, head size). Returns (tokens, heads, head size)."""
    outputs = []
    for places, sees in pack_layout.buckets:
        # (heads, tokens, size) to (trees, heads, length, size)
        q, k, v = (each[:, places.flatten()].unflatten(1, places.shape).transpose(0, 1) for each in (query, key, value))
        output = scaled_dot_product_attention(q, k, v, attn_mask=sees, is_causal=sees is None, scale=scaling)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[pack_layout.back]


def attend_by_piece(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pack_layout: PackLayout,
    scaling: float | None,
    kernel: Any,
) -> torch.Tensor:
    """The same with a kernel of torch.nn.attention.varlen_attn's signature, which computes nothing for padding."""
    return kernel(
        query.transpose(0, 1),
        key.transpose(0, 1)[pack_layout.key_places],
        value.transpose(0, 1)[pack_layout.key_places],
        pack_layout.query_starts,
        pack_layout.key_starts,
        *pack_layout.longest,
        scale=scaling,
        window_size=(-1, 0),  # causal, the last query of a piece seeing its last key
    )


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
