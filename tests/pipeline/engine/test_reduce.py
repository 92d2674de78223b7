"""Gradient sums over real gloo ranks: the tree is bitwise equal for any number of ranks, fast overlaps and is close.

Run as a script it forks the ranks themselves: importing torch once for all of them.
"""

import datetime
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipeline.batch import BatchPlan
from pipeline.engine.reduce import ALIGN, GradientBuffer, Reducer, _Buckets
from pipeline.errors import ConfigError

ROOT = Path(__file__).parents[3]
WORLDS = (1, 2, 3, 4, 5)
COUNTS = (8, 7, 3)  # micro-batches in a step; with 3 some of 4 or 5 ranks have none


class Model(nn.Module):
    """Two layers on a tied embedding, and a parameter that only micro-batch 0 uses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(50, 24)
        self.first, self.second = nn.Linear(24, 33), nn.Linear(33, 24)
        self.rare = nn.Linear(5, 1, bias=False)  # last, so in the bucket that goes first

    def loss(self, index):
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(0, 50, (6,), generator=generator)
        hidden = self.second(torch.tanh(self.first(self.embedding(tokens))))
        loss = (hidden @ self.embedding.weight.T).logsumexp(-1).sum() * 1.7**index
        return loss + self.rare.weight.pow(2).sum() if index == 0 else loss


def single(count):
    """Gradients [count, flat] of each micro-batch by itself, in one process."""
    model = Model()
    buffer = GradientBuffer(list(model.parameters()))
    rows = []
    for index in range(count):
        buffer.zero_()
        model.loss(index).backward()
        rows.append(buffer.flat.clone())
    return torch.stack(rows)


def tree_sum(rows):
    """The definition: neighbours are added, pair by pair, until one is left."""
    while len(rows) > 1:
        rows = [sum(rows[i + 1 : i + 2], rows[i]) for i in range(0, len(rows), 2)]
    return rows[0]


def one_step(reducer, plan, model, facts=None):
    """One step of the loop on one rank; returns the scalar totals."""
    reducer.begin(plan)
    for index in plan.range_of(reducer.rank):
        with reducer.micro_batch(index) as scalars:
            loss = model.loss(index)
            loss.backward()
            scalars += torch.stack([loss.detach(), torch.tensor(0.1 * index)])  # they begin at zero
        if facts is not None and reducer._buckets is not None:
            facts.append(len(reducer._buckets.sent))
    scalars, extra = reducer.finish(np.array([float(reducer.rank)]))
    return (*scalars.sum(0).tolist(), *extra)


# ---------------------------------------------------------------- what the forked ranks do


def rank_sums(rank, folder):
    """All worlds, counts and reductions in one group of ranks; saves what the tests look at."""
    for world in WORLDS[1:]:
        group = dist.new_group(list(range(world)))
        if rank >= world:
            continue
        for count in COUNTS:
            for reduction in ("tree", "fast"):
                model = Model()
                plan = BatchPlan(count, 1, world)
                buffer = GradientBuffer(list(model.parameters()))
                reducer = Reducer(buffer, rank, group, reduction, bucket_mb=0.003)
                facts, at_first_layer = [], []
                if reduction == "fast":
                    model.first.weight.register_post_accumulate_grad_hook(
                        lambda p, r=reducer, seen=at_first_layer: seen.append(len(r._buckets.sent))
                    )
                one_step(reducer, plan, model)
                first = buffer.flat.clone()
                facts.clear()
                at_first_layer.clear()
                totals = one_step(reducer, plan, model, facts)
                np.savez(
                    folder / f"{reduction}-{count}-{world}-{rank}.npz",
                    flat=buffer.flat.numpy(),
                    repeats=torch.equal(first, buffer.flat),
                    totals=np.array(totals),
                    sent=np.array(facts, dtype=int),
                    at_first_layer=np.array(at_first_layer, dtype=int),
                    buckets=len(reducer._buckets.slices) if reducer._buckets else 0,
                )


def start_rank(function, rank, world, store, folder, timeout_s):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(store), world),
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    function(rank, folder)
    dist.barrier()
    dist.destroy_process_group()


def rank_loses_its_peer(reduction):
    def step(rank, folder):
        model = Model()
        buffer = GradientBuffer(list(model.parameters()))
        plan = BatchPlan(4, 1, 2)
        reducer = Reducer(buffer, rank, dist.group.WORLD, reduction)
        one_step(reducer, plan, model)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        begin = time.monotonic()
        try:
            one_step(reducer, plan, model)
        except RuntimeError as error:
            (folder / "noticed").write_text(f"{time.monotonic() - begin:.3f} {type(error).__name__}")
        os._exit(0)

    return step


CASES = {
    "sums": (rank_sums, 5, 60),
    "dies-tree": (rank_loses_its_peer("tree"), 2, 10),
    "dies-fast": (rank_loses_its_peer("fast"), 2, 10),
}


def run_ranks(case, folder):
    """Fork the ranks of a case in a fresh interpreter, so that no thread of this one is forked with them."""
    command = [sys.executable, __file__, case, str(folder)]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def main(case, folder):
    function, world, timeout_s = CASES[case]
    one_step(*single_reducer(2, "tree"))  # autograd's lazy imports happen once, before the fork
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=start_rank, args=(function, r, world, folder / "store", folder, timeout_s))
        for r in range(world)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    allowed = (0,) if case == "sums" else (0, -signal.SIGKILL)
    sys.exit(any(rank.exitcode not in allowed for rank in ranks))


def single_reducer(count, reduction):
    model = Model()
    buffer = GradientBuffer(list(model.parameters()))
    return Reducer(buffer, 0, None, reduction), BatchPlan(count, 1, 1), model


# ---------------------------------------------------------------- one process


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 7, 8, 13, 16])
def test_one_process_follows_the_tree_bit_for_bit(count):
    reducer, plan, model = single_reducer(count, "tree")
    for _ in range(2):
        one_step(reducer, plan, model)
        assert torch.equal(reducer.gradients.flat, tree_sum(list(single(count))))


def test_each_step_may_have_a_plan_of_its_own():
    """The last batch of an epoch is smaller."""
    reducer, _, model = single_reducer(8, "tree")
    for count in (8, 3, 7):
        one_step(reducer, BatchPlan(count, 1, 1), model)
        assert torch.equal(reducer.gradients.flat, tree_sum(list(single(count))))


def test_a_rank_holds_few_buffers_and_uses_them_again():
    reducer, plan, model = single_reducer(100, "tree")
    held = []
    for _ in range(2):
        one_step(reducer, plan, model)
        held.append({buffer.data_ptr() for buffer in (*reducer._tree.free, *reducer._tree.blocks.values())})
    assert 2 <= len(held[0]) <= 8  # log2(100) + 1
    assert held[0] == held[1]


def test_fast_in_one_process_is_plain_accumulation():
    reducer, plan, model = single_reducer(5, "fast")
    totals = one_step(reducer, plan, model)
    plain = Model()
    losses = [plain.loss(index) for index in range(5)]
    for loss in losses:
        loss.backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert totals[0] == sum(loss.detach().double() for loss in losses)
    assert totals[1:] == (pytest.approx(1.0), 0.0)


def test_gradients_are_views_of_one_buffer():
    model = Model()
    buffer = GradientBuffer(list(model.parameters()))
    model.loss(0).backward()
    for parameter, (start, stop) in zip(buffer.parameters, buffer.spans, strict=True):
        assert start % ALIGN == 0
        assert parameter.grad.data_ptr() == buffer.flat[start:].data_ptr()
        assert torch.equal(parameter.grad.flatten(), buffer.flat[start:stop])
        assert parameter.grad.any()
    model.zero_grad(set_to_none=True)
    buffer.zero_()
    assert all(p.grad is not None and not p.grad.any() for p in buffer.parameters)


def test_other_dtypes_are_refused():
    with pytest.raises(ConfigError, match=r"parameter 0 of shape \(2, 2\) is torch\.bfloat16; .* torch\.float32"):
        GradientBuffer([nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))])


# ---------------------------------------------------------------- several ranks


def test_this_process_computes_as_the_ranks_do():
    # or the sums below differ by the method of a product, not by the order of a sum
    assert torch.get_num_threads() == 1


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """``(reduction, micro-batches, ranks) -> [facts of each rank]`` for 2 to 5 real ranks."""
    folder = tmp_path_factory.mktemp("sums")
    run_ranks("sums", folder)
    return {
        (reduction, count, world): [
            dict(np.load(folder / f"{reduction}-{count}-{world}-{rank}.npz")) for rank in range(world)
        ]
        for reduction in ("tree", "fast")
        for count in COUNTS
        for world in WORLDS[1:]
    }


@pytest.mark.parametrize("count", COUNTS)
def test_the_tree_is_bitwise_equal_for_any_number_of_ranks(sums, count):
    expected = tree_sum(list(single(count))).numpy()
    for world in WORLDS[1:]:
        for facts in sums["tree", count, world]:
            assert np.array_equal(facts["flat"], expected), (world,)


@pytest.mark.parametrize("count", COUNTS)
def test_fast_is_the_same_sum_to_a_millionth(sums, count):
    expected = single(count).double().sum(0).numpy()
    for world in WORLDS[1:]:
        for facts in sums["fast", count, world]:
            error = np.linalg.norm(facts["flat"] - expected) / np.linalg.norm(expected)
            assert error < 1e-6
            assert np.array_equal(facts["flat"], sums["fast", count, world][0]["flat"])  # same on every rank


def test_a_step_repeats_bit_for_bit(sums):
    assert all(facts["repeats"] for ranks in sums.values() for facts in ranks)


@pytest.mark.parametrize("count", COUNTS)
def test_scalars_do_not_depend_on_ranks_or_reduction(sums, count):
    reducer, plan, model = single_reducer(count, "tree")
    expected = one_step(reducer, plan, model)[:2]
    for (_, found, world), ranks in sums.items():
        if found == count:
            for facts in ranks:
                assert tuple(facts["totals"][:2]) == expected
                assert facts["totals"][2] == sum(range(world))  # the extras


def test_buckets_leave_during_the_last_backward_only(sums):
    overlapped = 0
    for (reduction, count, world), ranks in sums.items():
        for rank, facts in enumerate(ranks):
            share = len(BatchPlan(count, 1, world).range_of(rank))
            if reduction == "tree" or share == 0:
                continue
            assert facts["buckets"] >= 3
            assert not facts["sent"][:-1].any()
            if rank == 0 and share == 1:  # here the rare parameter has its gradient
                # two buckets were on their way while the embedding's gradient, the last, was still to come
                assert facts["at_first_layer"][-1] == facts["buckets"] - 1
                assert facts["sent"][-1] == facts["buckets"]
                overlapped += 1
    assert overlapped >= 3


def test_a_parameter_without_gradient_in_the_last_micro_batch_is_reduced_all_the_same(sums):
    start, stop = GradientBuffer(list(Model().parameters())).spans[-1]
    expected = single(1)[0][start:stop].numpy()
    assert expected.any()
    for (reduction, count, world), ranks in sums.items():
        for rank, facts in enumerate(ranks):
            np.testing.assert_array_equal(facts["flat"][start:stop], expected)
            if reduction == "fast" and len(BatchPlan(count, 1, world).range_of(rank)) > 1:
                assert facts["sent"][-1] == 0  # its bucket goes first, and only in finish()


def test_a_second_backward_is_refused():
    # no ranks are needed to see it: the refusal comes before anything is sent
    model = Model()
    buffer = GradientBuffer(list(model.parameters()))
    buckets = _Buckets(buffer, None, 1e-9)
    buckets._send_up_to = lambda bucket: None
    buckets.armed = True
    model.loss(0).backward()
    with pytest.raises(RuntimeError, match="second backward"):
        model.loss(0).backward()


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["tree", "fast"])
def test_a_killed_peer_is_noticed(tmp_path, reduction):
    run_ranks(f"dies-{reduction}", tmp_path)
    waited_s, kind = (tmp_path / "noticed").read_text().split()
    assert float(waited_s) < 10
    assert kind


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
