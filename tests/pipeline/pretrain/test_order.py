"""The sample order: a keyed shuffle by arithmetic, every sample once per epoch, the same for any reader."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.splitmix import key
from pipeline.pretrain.data import SampleOrder, permuted


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1))
def test_permuted_is_a_bijection(size, seed):
    found = permuted(np.arange(size), size, key(seed))
    assert np.array_equal(np.sort(found), np.arange(size))


def test_permuted_handles_sizes_element_by_element():
    sizes = np.array([5] * 5 + [9] * 9)
    found = permuted(np.concatenate([np.arange(5), np.arange(9)]), sizes, key(3))
    assert sorted(found[:5]) == list(range(5))
    assert sorted(found[5:]) == list(range(9))


@settings(deadline=None)
@given(
    rows=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    seed=st.integers(0, 1000),
    window=st.integers(1, 5),
)
def test_every_sample_once_per_epoch(rows, seed, window):
    order = SampleOrder(rows, seed, window)
    every = [(shard, row) for shard, count in enumerate(rows) for row in range(count)]
    seen = []
    for epoch in range(2):
        epochs, shard, row = order[np.arange(epoch * order.total, (epoch + 1) * order.total)]
        assert set(epochs.tolist()) == {epoch}
        seen.append(list(zip(shard.tolist(), row.tolist(), strict=True)))
        assert sorted(seen[-1]) == every
    if len(every) > 20:
        assert seen[0] != seen[1]


@settings(deadline=None)
@given(start=st.integers(0, 500), length=st.integers(1, 200))
def test_any_part_can_be_asked_for_by_itself(start, length):
    order = SampleOrder([50, 60, 70], 7, window=2)
    whole = np.stack(order[np.arange(700)])
    part = np.stack(SampleOrder([50, 60, 70], 7, window=2)[np.arange(start, start + length)])
    assert np.array_equal(part, whole[:, start : start + length])


def test_shards_of_a_window_are_mixed_and_windows_are_not():
    order = SampleOrder([1000] * 8, 1, window=4)
    _, shard, _ = order[np.arange(8000)]
    assert len(set(shard[:100].tolist())) == 4
    assert set(shard[:4000].tolist()).isdisjoint(shard[4000:].tolist())


def test_the_shuffle_is_uniform_enough():
    first = [int(SampleOrder([100], seed)[np.arange(1)][2][0]) for seed in range(2000)]
    counts = np.bincount(first, minlength=100)
    assert counts.max() < 50  # expectation 20, standard deviation 4.5
    assert (counts > 0).mean() > 0.98


@pytest.mark.parametrize(("seed", "expected"), [(42, [(0, 1, 4), (0, 1, 0), (0, 0, 2)])])
def test_the_order_never_changes_between_versions(seed, expected):
    order = SampleOrder([5, 5, 5], seed)
    found = [tuple(int(part[i]) for part in order[np.arange(3)]) for i in range(3)]
    assert found == expected
