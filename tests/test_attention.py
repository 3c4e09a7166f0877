"""Attention over packed samples: it equals attention with the dense mask, and no sample attends to another."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import GPT2Config, LlamaConfig, Qwen2Config

from clip_phi.batching import attention as packing
from clip_phi.batching.attention import (
    attend_by_bucket,
    attend_by_piece,
    has_varlen_kernel,
    make_pack_layout,
)
from clip_phi.batching.encode import Encoded
from clip_phi.batching.packing import build_shared_prefix, pack_samples
from modeling_clip_phi import ClipPhiConfig, ClipPhiForCausalLM

# Trees of all shapes: captions, one conversation, text alone (also in two branches), one token, an empty prefix's end.
TREES = [
    [0] * 4 + [1] * 3 + [2] * 5 + [3] * 1,
    [0] * 4 + [1] * 40,
    [1] * 7,
    [1] * 2 + [2] * 2,
    [1],
    [0] * 4 + [1] * 2 + [2] * 9,
]


def visible(conversation_ids, window=None):
    """By definition: bool (tokens, tokens). With a window, so many tokens of the conversation, the query included."""
    tree = [number for number, ids in enumerate(conversation_ids) for _ in ids]
    conversation = [each for ids in conversation_ids for each in ids]
    position = [
        ids[:place].count(0) + ids[:place].count(each or None)
        for ids in conversation_ids
        for place, each in enumerate(ids)
    ]
    count = len(tree)
    return torch.tensor(
        [
            [
                tree[q] == tree[k]
                and conversation[k] in (0, conversation[q])
                and k <= q
                and position[q] - position[k] < (window or count)
                for k in range(count)
            ]
            for q in range(count)
        ]
    )


def dense(query, key, value, sees, scaling):
    return scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=sees, scale=scaling)[0]


def reference_kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
    """What torch's varlen kernel does, piece by piece: causal, aligned at the ends of queries and keys."""
    assert window_size[1] == 0 and query.shape[0] == cu_seq_q[-1] and key.shape[0] == cu_seq_k[-1]
    assert max_q == cu_seq_q.diff().max() and max_k == cu_seq_k.diff().max()
    outputs = []
    for piece in range(len(cu_seq_q) - 1):
        q, k, v = (
            each[starts[piece] : starts[piece + 1]].transpose(0, 1)
            for each, starts in ((query, cu_seq_q), (key, cu_seq_k), (value, cu_seq_k))
        )
        sees = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(offset := k.shape[1] - q.shape[1])
        sees = sees if window_size[0] < 0 else sees.triu(offset - window_size[0])
        outputs.append(dense(q, k, v, sees, scale).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("count", range(1, len(TREES) + 1))
def test_both_forms_of_packed_attention_equal_attention_with_the_whole_mask(count, window):
    torch.manual_seed(count)
    pack_layout, sees = make_pack_layout(TREES[:count]), visible(TREES[:count], window)
    query, key, value = (torch.randn(2, len(sees), 8) for _ in range(3))
    expected = dense(query, key, value, sees, 0.3).transpose(0, 1)
    for output in (
        attend_by_bucket(query, key, value, pack_layout, 0.3, window),
        attend_by_piece(query, key, value, pack_layout, 0.3, reference_kernel, window),
    ):
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)


def encode(length, seed):
    """A branch of so many random tokens, whose second half is supervised."""
    ids = np.random.default_rng(seed).integers(1, 250, length).tolist()
    return Encoded(ids, [-100] * (length // 2) + ids[length // 2 :])


# (image tokens, branches) of each tree
CONTENT = [
    (4, [encode(5, 0), encode(9, 1), encode(3, 2)]),
    (4, [encode(30, 3)]),
    (0, [encode(12, 4)]),
    (4, [encode(6, 5), encode(21, 6)]),
]


TEXT_CONFIG = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TEXT_CONFIG |= {"num_attention_heads": 4, "max_position_embeddings": 256}
DECODERS = {
    "phi": None,
    "llama with grouped heads": LlamaConfig(**TEXT_CONFIG, num_key_value_heads=2),
    "qwen2": Qwen2Config(**TEXT_CONFIG, num_key_value_heads=1),
    "gpt2": GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=256),
}


@pytest.fixture(params=DECODERS)
def any_model(request, packed_model):
    text_config = DECODERS[request.param]
    if text_config is None:
        return packed_model
    config = packed_model.config
    torch.manual_seed(0)
    model = ClipPhiForCausalLM(
        ClipPhiConfig(vision_config=config.vision_config, text_config=text_config, image_token_id=config.image_token_id)
    ).eval()
    model.set_attn_implementation({"text_config": packing.PACKED_ATTENTION})
    return model


def check_that_no_tree_sees_another(model, processor):
    """A pack of trees against the plain form: each branch alone behind its image, without any of our packing."""
    image = processor.image_token_id
    pixels = torch.randn(len(CONTENT), 3, 32, 32, generator=torch.Generator().manual_seed(0))
    weight = model.model.projector.weight
    plain = torch.zeros(())
    for (prefix, conversations), pixel_values in zip(CONTENT, pixels.unsqueeze(1), strict=True):
        for ids, labels in conversations:
            plain = (
                plain
                + model(
                    input_ids=torch.tensor([[image] * prefix + ids]),
                    labels=torch.tensor([[-100] * prefix + labels]),
                    pixel_values=pixel_values if prefix else None,
                    num_items_in_batch=50,
                ).loss
            )
    trees = [build_shared_prefix(conversations, [image] * prefix, "x") for prefix, conversations in CONTENT]
    pictured = pixels[[index for index, (prefix, _) in enumerate(CONTENT) if prefix]]
    pack = pack_samples(trees, pictured, processor.tokenizer.pad_token_id)
    loss = model(**pack.inputs, use_cache=False, num_items_in_batch=50).loss
    assert abs(loss / plain - 1) < 1e-6, "loss"
    expected, gradient = (torch.autograd.grad(each, [weight])[0] for each in (plain, loss))
    assert (gradient - expected).norm() / expected.norm() < 1e-5, "gradient"


def test_no_tree_of_a_pack_sees_another_with_any_decoder(any_model, processor):
    check_that_no_tree_sees_another(any_model, processor)


def everything_causal(conversation_ids):
    return make_pack_layout([[1] * sum(map(len, conversation_ids))])


def branches_see_each_other(conversation_ids):
    return make_pack_layout([[0 if each == 0 else 1 for each in ids] for ids in conversation_ids])


def one_token_from_the_neighbour(conversation_ids):
    good = make_pack_layout(conversation_ids)
    places = good.buckets[0].places.clone()  # of the longest tree
    places[0, 1] = 0
    return good._replace(buckets=[good.buckets[0]._replace(places=places), *good.buckets[1:]])


@pytest.mark.parametrize("mutant", [everything_causal, branches_see_each_other, one_token_from_the_neighbour])
def test_a_wrong_mask_would_be_noticed(mutant, packed_model, processor, monkeypatch):
    monkeypatch.setattr("clip_phi.batching.packing.make_pack_layout", mutant)
    with pytest.raises(AssertionError, match="loss|gradient"):
        check_that_no_tree_sees_another(packed_model, processor)


def test_positions_that_do_not_restart_would_be_noticed(packed_model, processor, monkeypatch):
    original = build_shared_prefix

    def counted_through(*arguments):
        tree = original(*arguments)
        return replace(tree, position_ids=list(range(len(tree.input_ids))))

    monkeypatch.setitem(globals(), "build_shared_prefix", counted_through)
    with pytest.raises(AssertionError, match="loss|gradient"):
        check_that_no_tree_sees_another(packed_model, processor)


def test_other_attention_is_refused_and_generation_with_padding_is_not_harmed(model, packed_model):
    tree = build_shared_prefix([encode(12, 4)], [], "x")
    with pytest.raises(ValueError, match=r"'sdpa' attention takes no packs: set_attn_implementation"):
        model(**pack_samples([tree], None, 0).inputs)
    ids = torch.tensor([[294, 294, 5, 6, 7], [8, 9, 10, 11, 12]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 294).long()}
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(packed_model.generate(**inputs, **options), model.generate(**inputs, **options))


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "has"),
    [
        ("cuda", torch.bfloat16, (8, 0), True),
        ("cuda", torch.float16, (9, 0), True),
        ("cuda", torch.float16, (7, 5), False),  # a T4
        ("cuda", torch.float32, (9, 0), False),
        ("cpu", torch.bfloat16, (9, 0), False),
    ],
)
def test_the_varlen_kernel_is_used_only_where_it_is(device, dtype, capability, has, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_varlen_kernel(torch.device(device), dtype) is has
