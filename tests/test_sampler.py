"""Batches: full packs, each sample once in an epoch, in an order that depends only on the position."""

import numpy as np
import pytest

from clip_phi.batching import sampler
from clip_phi.batching.sampler import (
    EndlessSampler,
    FixedBatches,
    Mixture,
    PackedBatches,
    assign_packs,
    samples_of_packs,
)


def llava_lengths(count, seed=0):
    """Tokens of LLaVA-Instruct-like samples: an image of 49 features, and conversations of a long-tailed length."""
    return (49 + np.random.default_rng(seed).lognormal(5.3, 0.7, count).clip(8, 1999)).astype(int)


def plan(lengths, budget):
    return [pack.tolist() for pack in samples_of_packs(lengths, assign_packs(lengths[None], budget)[0])]


def best_fit_decreasing(lengths, budget):
    """Sample by sample: into the pack where the least is left, the first of several."""
    packs, left = [], []
    for sample in sorted(range(len(lengths)), key=lambda sample: -lengths[sample]):
        fitting = [pack for pack in range(len(packs)) if left[pack] >= lengths[sample]]
        pack = min(fitting, key=lambda pack: left[pack], default=len(packs))
        if pack == len(packs):
            packs.append([])
            left.append(budget)
        packs[pack].append(sample)
        left[pack] -= lengths[sample]
    return packs


@pytest.mark.parametrize("budget", [2048, 4096, 8192])
def test_packs_hold_every_sample_once_keep_the_budget_and_are_full(budget):
    lengths = llava_lengths(20_000)
    packs = plan(lengths, budget)
    assert sorted(sample for pack in packs for sample in pack) == list(range(20_000))
    assert max(lengths[pack].sum() for pack in packs) <= budget
    assert lengths.sum() / (len(packs) * budget) >= 0.95
    assert plan(lengths, budget) == packs


@pytest.mark.parametrize("budget", [90, 700, 4096])
def test_rows_are_packed_as_each_alone_by_best_fit_decreasing(budget):
    rows = llava_lengths(900).reshape(3, 300)
    rows[2, 123:] = 0  # no samples
    for row, packs in zip(rows, assign_packs(rows, budget), strict=True):
        size = int((row > 0).sum())
        found = [pack.tolist() for pack in samples_of_packs(row[:size], packs[:size])]
        assert found == best_fit_decreasing(row[:size].tolist(), budget)
        assert packs.max() == len(found) - 1


def test_a_sample_longer_than_the_budget_is_a_pack_alone():
    assert plan(np.array([3, 12, 7, 3]), 10) == [[1], [2, 0], [3]]


def packed(weights=None, window=50, block=64):
    sizes = (300, 100)
    return PackedBatches(Mixture(sizes, weights, seed=4), llava_lengths(400), 2100, window, block)


@pytest.mark.parametrize("window", [50, 399, 1000], ids="{} samples together".format)
@pytest.mark.parametrize("weights", [None, (1, 2)])
def test_packed_epochs_follow_the_mixture_and_any_position_can_be_asked_for(weights, window):
    batches, fresh = packed(weights, window), packed(weights, window)
    first, both = batches.count(1), batches.count(2)
    stream = [batches.batch(number) for number in range(both)]
    for epoch, part in ((0, stream[:first]), (1, stream[first:])):
        places = [batches.mixture.place(epoch * 400 + position) for position in range(400)]
        assert sorted(place for pack in part for place in pack) == sorted(places)
    assert [fresh.batch(number) for number in (both - 1, 3, first, 0)] == [
        stream[number] for number in (both - 1, 3, first, 0)
    ]
    assert batches.fill > 0.9 and batches.count(0.5) == -(-first // 2)


def test_each_epoch_is_planned_once(monkeypatch):
    planned = []
    monkeypatch.setattr(sampler, "assign_packs", lambda *work: planned.append(1) or assign_packs(*work))
    batches = packed()
    size = batches.count(1)
    assert batches.fill > 0.9 and batches.count(1) == size and len(planned) == 1
    packs = [batches.batch(number) for number in range(size)]
    assert sorted(place for pack in packs for place in pack) == [(0, index) for index in range(400)]
    assert len(planned) == 1 and batches.count(2) > size and len(planned) == 2


def test_the_blocks_in_which_packs_are_planned_change_nothing_and_no_epoch_is_planned_at_once(monkeypatch):
    whole, rows = packed(weights=(1, 2), window=30), []
    counts, fill = [whole.count(epochs) for epochs in (0.3, 1, 2.5, 3)], whole.fill
    expected = [whole.batch(number) for number in range(counts[-1])]
    monkeypatch.setattr(sampler, "assign_packs", lambda *work: rows.append(len(work[0])) or assign_packs(*work))
    batches = packed(weights=(1, 2), window=30, block=4)
    assert [batches.count(epochs) for epochs in (0.3, 1, 2.5, 3)] == counts and batches.fill == fill
    assert rows == 3 * [4, 4, 4, 2]  # of 14 windows an epoch
    assert [batches.batch(number) for number in range(counts[-1])] == expected
    assert [batches.batch(number) for number in (counts[-1] - 1, 3, 0)] == [expected[number] for number in (-1, 3, 0)]
    assert set(rows) == {4, 2}


def places(batches, **options):
    defaults = {"gradient_accumulation_steps": 2, "num_steps": 5}
    return [place for batch in EndlessSampler(batches, **(defaults | options)) for place in batch]


def fixed(sizes=(10,), weights=None, seed=0, size=2):
    return FixedBatches(Mixture(sizes, weights, seed), size)


def test_every_epoch_sees_every_sample_once_and_steps_are_always_full():
    stream = places(fixed())
    assert len(stream) == 20
    assert sorted(stream) == [(epoch, index) for epoch in range(2) for index in range(10)]
    assert [index for _, index in stream[:10]] != [index for _, index in stream[10:]], "epochs have orders of their own"
    assert places(fixed(seed=1)) != stream
    assert [fixed(size=3).count(epochs) for epochs in (0.5, 1, 2)] == [2, 4, 7]


@pytest.mark.parametrize("batches", [fixed(), fixed((7, 3), (1, 3)), packed()], ids=["one", "mixed", "packed"])
def test_order_is_the_same_for_any_number_of_ranks_and_from_any_step(batches):
    one = list(EndlessSampler(batches, 2, 5))
    ranks = [list(EndlessSampler(batches, 1, 5, rank=rank, world_size=2)) for rank in range(2)]
    assert [batch for step in zip(*ranks, strict=True) for batch in step] == one
    assert list(EndlessSampler(batches, 2, 5, first_step=3)) == one[6:]
