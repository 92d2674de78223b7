"""Batch arithmetic: exact for any number of ranks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.batch import BatchPlan, better_micro_batch, plan
from pipeline.errors import ConfigError


@given(global_batch=st.integers(1, 5000), micro_batch=st.integers(1, 600), world_size=st.integers(1, 700))
def test_every_sample_exactly_once_and_ranks_differ_by_one_micro_batch(global_batch, micro_batch, world_size):
    if world_size > global_batch:
        with pytest.raises(ConfigError, match=f"{world_size} ranks"):
            plan(global_batch, micro_batch, world_size)
        return
    found = plan(global_batch, micro_batch, world_size)
    taken = [
        sample for rank in range(world_size) for index in found.range_of(rank) for sample in found.samples_of(index)
    ]
    assert taken == list(range(global_batch))
    counts = [len(found.range_of(rank)) for rank in range(world_size)]
    assert min(counts) >= 1
    assert max(counts) - min(counts) <= 1
    assert sum(found.rank_batches) == global_batch
    assert max(counts) == found.accumulation
    assert counts == found.shares
    assert max(found.rank_batches) == found.largest_rank_batch
    assert found.micro_batch <= micro_batch


@given(world_size=st.integers(1, 64))
def test_members_of_a_micro_batch_do_not_depend_on_the_world_size(world_size):
    one = BatchPlan(96, 4, 1)
    many = BatchPlan(96, 4, world_size)
    assert [one.samples_of(index) for index in range(24)] == [
        many.samples_of(index) for rank in range(world_size) for index in many.range_of(rank)
    ]


def test_more_ranks_than_micro_batches_leaves_ranks_idle_when_the_micro_batch_is_kept():
    kept = BatchPlan(8, 4, 3)
    assert sum(kept.rank_batches) == 8
    assert sorted(kept.rank_batches) == [0, 4, 4]


def test_the_micro_batch_that_repairs_the_balance_is_named():
    assert better_micro_batch(plan(64, 32, 2)) is None
    bad = plan(65536, 256, 8 * 40)
    better = better_micro_batch(bad)
    assert bad.balance < 0.9
    assert better is not None
    assert BatchPlan(65536, better, 8 * 40).balance >= 0.9
