"""Attention of packed sequences: many samples, concatenated without padding, each attending to itself only.

All other layers treat tokens independently. PackLayout says which tokens attend to which; nothing else is computed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# Names for set_attn_implementation: the varlen kernel where there is one, and SDPA by bucket everywhere.
PACKED_ATTENTION, SDPA_PACKED_ATTENTION = "clip_phi_packed", "clip_phi_sdpa_packed"
# What a decoder's layers pass to their attention without changing its result. Others, such as s_aux (attention sinks)
# and softcap, would change it.
HARMLESS = {"dropout", "is_causal", "num_items_in_batch", "output_attentions", "output_hidden_states", "position_ids"}
HARMLESS |= {"output_router_logits", "return_dict", "scaling", "sliding_window", "use_cache"}
ALIKE = 0.8  # samples at least so long, relative to the longest of them, are padded together in attention


class Bucket(NamedTuple):
    """Samples of about one length, padded together for SDPA.

    places: int64 (samples, length), the place of each token in the sequence; padding repeats place 0.
    mask: bool (samples, 1, length, length), True where a query attends to a key; None for plain causal attention, if
        each sample has one conversation.
    positions: int64 (samples, length), of each token in its conversation, prefix included; for sliding windows."""

    places: Tensor
    mask: Tensor | None
    positions: Tensor


class PackLayout(NamedTuple):
    """Which tokens attend to which: to the prefix and to their own conversation, up to themselves.

    buckets: for SDPA. places_in_buckets: int64 (tokens,), where each token is in their concatenated outputs.
    key_places: int64 (keys,), query_starts, key_starts: int32 (pieces + 1,), longest: (queries, keys): for kernels of
        variable length. A piece is a prefix or a conversation; its keys are the prefix's and its own, and its last
        query attends to all of them (causal, aligned at the end)."""

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
        positions = torch.zeros_like(places)
        ids = torch.full((len(samples), length), -1)  # padding is a conversation of its own: a query needs a key
        for number, sample in enumerate(samples):
            inside, its_ids = torch.arange(lengths[sample]), conversation_ids[sample]
            places[number, inside] = inside + starts[sample]
            ids[number, inside] = torch.tensor(its_ids)
            starts_at = torch.from_numpy(np.searchsorted(its_ids, its_ids))  # of each conversation
            positions[number, inside] = inside - starts_at + its_ids.count(0) * (ids[number, inside] > 0)
            places_in_buckets[inside + starts[sample]] = inside + filled + number * length
        several = any(len(set(conversation_ids[sample]) - {0}) > 1 for sample in samples)
        mask = ((ids[:, None] == 0) | (ids[:, None] == ids[..., None])).tril().unsqueeze(1) if several else None
        buckets.append(Bucket(places, mask, positions))
        filled += places.numel()
    sizes, key_places = [(0, 0)], list[np.ndarray]()  # of each piece, its queries and keys
    for start, ids in zip(starts, conversation_ids, strict=False):
        cuts = [0, *(np.flatnonzero(np.diff(ids)) + 1), len(ids)]
        prefix = cuts[1] if ids[0] == 0 else 0
        for first, stop in zip(cuts, cuts[1:], strict=False):
            seen = np.concatenate([np.arange(prefix if first else 0), np.arange(first, stop)])
            key_places.append(seen + start)
            sizes.append((int(stop - first), len(seen)))
    keys_seen = torch.from_numpy(np.concatenate(key_places))
    query_starts, key_starts = torch.tensor(sizes).T.cumsum(1).to(torch.int32)
    longest_query, longest_key = np.max(sizes, axis=0).tolist()
    return PackLayout(buckets, places_in_buckets, keys_seen, query_starts, key_starts, (longest_query, longest_key))


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Samples in groups of about one length."""
    groups: list[list[int]] = []
    for sample in sorted(range(len(lengths)), key=lambda sample: -lengths[sample]):
        if not groups or lengths[sample] < ALIKE * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(sample)
    return groups


def attend_packed(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface. query: (1, heads, tokens, head size). Returns (1, tokens, heads, head size).

    With a keyword pack_layout, torch's varlen kernel where there is one, else or with kernel=False SDPA by bucket; of
    each query, the last sliding_window keys. Without it, plain SDPA. Raises ValueError for keywords of another kind."""
    kernel = kwargs.pop("kernel", True)
    if (pack_layout := kwargs.pop("pack_layout", None)) is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    assert not kwargs.get("dropout"), "the decoder's dropout is 0"
    if unknown := sorted(name for name in kwargs.keys() - HARMLESS if kwargs[name] is not None):
        raise ValueError(f"packed attention has no {', '.join(unknown)}")
    scaling, window = kwargs.get("scaling"), kwargs.get("sliding_window")
    query, key, value = without_batch(query, key, value)
    if kernel and has_varlen_kernel(query.device, query.dtype, query.shape[-1]):
        from torch.nn.attention.varlen import varlen_attn

        return attend_by_piece(query, key, value, pack_layout, scaling, varlen_attn, window).unsqueeze(0), None
    return attend_by_bucket(query, key, value, pack_layout, scaling, window).unsqueeze(0), None


def without_batch(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """(heads, tokens, head size) of each, in the dtype of the values, which rotary embeddings leave as it is."""
    groups = query.shape[1] // key.shape[1]
    return [each[0].to(value.dtype) for each in (query, repeat_kv(key, groups), repeat_kv(value, groups))]


def context_length(config: Any) -> int | None:
    """The longest conversation, in tokens, of a ClipPhiConfig's decoder; None if it has no limit.

    With "longrope" positions (Phi-3, Phi-4) it is that of the pretraining: beyond, a long conversation would change
    the positions of all that are packed or batched with it."""
    text = config.get_text_config()
    positions = getattr(text, "rope_parameters", None) or {}
    original = positions.get("original_max_position_embeddings") if positions.get("rope_type") == "longrope" else None
    return original or getattr(text, "max_position_embeddings", None)


def has_varlen_kernel(device: torch.device, dtype: torch.dtype, head_size: int = 64) -> bool:
    """FlashAttention's: for half precision, on NVIDIA's GPUs from Ampere (capability 8.0) on."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    is_fit = dtype in (torch.bfloat16, torch.float16) and head_size % 8 == 0 and head_size <= 256
    return is_nvidia and is_fit and torch.cuda.get_device_capability(device) >= (8, 0)


def attend_by_bucket(
    query: Tensor, key: Tensor, value: Tensor, layout: PackLayout, scaling: float | None, window: int | None = None
) -> Tensor:
    """query, key, value: (heads, tokens, head size). Returns (tokens, heads, head size)."""
    outputs = []
    for places, mask, positions in layout.buckets:
        if window is not None and window < places.shape[1]:
            near = (positions.unsqueeze(-1) - positions.unsqueeze(-2) < window).unsqueeze(1)
            mask = near.tril() if mask is None else near & mask
        # (heads, tokens, size) to (samples, heads, length, size)
        q, k, v = (each[:, places.flatten()].unflatten(1, places.shape).transpose(0, 1) for each in (query, key, value))
        output = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[layout.places_in_buckets]


def attend_by_piece(
    query: Tensor, key: Tensor, value: Tensor, layout: PackLayout, scaling: float | None, kernel: Callable[..., Tensor],
    window: int | None = None,
) -> Tensor:  # fmt: skip
    """The same with a kernel of torch.nn.attention.varlen_attn's signature, which computes nothing for padding."""
    keys, values = (each.transpose(0, 1)[layout.key_places] for each in (key, value))
    starts = (layout.query_starts, layout.key_starts, *layout.longest)
    # The window is causal: the last query of a piece attends to its last key. Its left side does not count the query.
    left = -1 if window is None else window - 1
    return kernel(query.transpose(0, 1), keys, values, *starts, scale=scaling, window_size=(left, 0))


@contextmanager
def decoder_attention(model: Any, name: str = PACKED_ATTENTION) -> Iterator[None]:
    """Inside, the decoder of a ClipPhiForCausalLM has this attention; then it has its own again."""
    own = model.config.get_text_config()._attn_implementation
    try:
        model.set_attn_implementation({"text_config": name})
        yield
    finally:
        model.set_attn_implementation({"text_config": own})


@torch.no_grad()
def refuse_other_attention(model: Any) -> None:
    """Raises ValueError for a decoder in which packed samples would change each other's results.

    model: a ClipPhiForCausalLM in eval mode; its decoder keeps its attention. Layers that carry a state from token to
    token are known by their class and names. All else is found by running it, with short sliding windows where it has
    any: a pack of random tokens, and each conversation of it alone."""
    decoder, config, device = model.model.language_model, model.config.get_text_config(), model.device
    refused = f"{config.model_type!r} decoders are not supported"
    hint = "choose one with causal attention alone, such as Phi, Llama, Qwen 2 or 3, SmolLM, Mistral or Gemma 3"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds or decoder._is_stateful:
        raise ValueError(f"{refused}: {', '.join(sorted(kinds)) or 'recurrent'} layers mix packed samples; {hint}")
    ids = torch.randint(config.vocab_size, (24,), generator=torch.Generator().manual_seed(0)).to(device)
    prefix, first, second, other = ids.split((3, 6, 7, 8))
    layout = make_pack_layout([[0] * 3 + [1] * 6 + [2] * 7, [1] * 8])
    pack = {
        "position_ids": torch.tensor([[*range(9), *range(3, 10), *range(8)]], device=device),
        "attention_mask": torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device),  # or it makes one of its own
        "pack_layout": tree_map_only(Tensor, lambda tensor: tensor.to(device), layout),
    }
    try:
        with _sliding_windows_of(4, decoder):
            conversations = torch.cat([prefix, first]), torch.cat([prefix, second]), other
            alone = [decoder(each[None], use_cache=False).last_hidden_state[0] for each in conversations]
            with decoder_attention(model):
                packed = decoder(ids[None], use_cache=False, **pack).last_hidden_state[0]
    except Exception as error:  # of the decoder's own code, which may be anything
        reason = " ".join(str(error).split())[:150]
        raise ValueError(f"{refused}: it does not run with packed attention ({reason}); {hint}") from error
    expected = torch.cat([alone[0], alone[1][3:], alone[2]])
    difference = ((packed - expected).norm(dim=-1) / expected.norm(dim=-1)).float()
    # Nothing comes before the first conversation: its difference is rounding, of half precision and quantised layers.
    coarse, tensors = {torch.bfloat16, torch.float16, torch.int8, torch.uint8}, (decoder.parameters, decoder.buffers)
    is_exact = device.type == "cpu" and not coarse & {each.dtype for all_of in tensors for each in all_of()}
    # A kernel for few tokens rounds in another way: with nf4 on CUDA the first conversation may be equal, and no other.
    least, rounding = (1e-4, 1e-4) if is_exact else (0.02, 0.05)
    if not difference[9:].median() < difference[:9].median().mul(10).clamp(least, rounding):
        raise ValueError(f"{refused}: packed samples would change each other's results; {hint}")


@contextmanager
def _sliding_windows_of(size: int, decoder: Any) -> Iterator[None]:
    """Where the decoder has sliding windows, windows of another size."""
    with ExitStack() as restore:
        for part in (decoder.config, *decoder.modules()):
            if getattr(part, "sliding_window", None):
                restore.callback(setattr, part, "sliding_window", part.sliding_window)
                part.sliding_window = size
        yield


for name, kernel in ((PACKED_ATTENTION, True), (SDPA_PACKED_ATTENTION, False)):
    AttentionInterface.register(name, partial(attend_packed, kernel=kernel))
    AttentionMaskInterface.register(name, sdpa_mask)
