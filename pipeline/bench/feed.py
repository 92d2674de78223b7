"""``python -m pipeline.bench feed``: what the host does for a step, and whether the device has to wait for it.

The loop's own feed, accumulation, reduction and watch over slow ranks, on one process that is rank 0 of a world without
the others; samples are invented, the model is a number. First the processor time of a step and of a micro-batch beyond
reading, packing and the model itself, which must not grow with the ranks: a straight line through steps of few and of
many micro-batches. Its two threads share a core there: what waking another costs is the host's affair, and on a shared
one more than all the rest. Then the loop with a device that computes as long as a GPU does, against that time alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from data_prep.hdf5 import Shard, write_shard
from data_prep.manifest import publish_manifest
from pipeline.bert.packing import arrangement
from pipeline.config import OptimizerConfig, load_recipe
from pipeline.engine.accumulate import Accumulator
from pipeline.engine.feed import Feed
from pipeline.engine.metrics import Clock
from pipeline.engine.peers import WINDOW, SlowRanks, shares_of
from pipeline.engine.ranks import Ranks
from pipeline.engine.reduce import GradientBuffer, Reducer
from pipeline.engine.task import MicroBatch, Settings
from pipeline.pretrain.data import PretrainingData
from pipeline.pretrain.task import Pretraining
from pipeline.words import columns

WORLDS = (8, 256, 1024)
LOOKS = 3
FEW, MANY = 2, 10  # micro-batches of a step
STEP_MS, MICRO_BATCH_MS = 2.0, 0.3  # of processor time: the bars
OVERLAP = {32: 1.02, 1: 1.05}  # micro-batches of a step: the loop's time by the device's alone, on an idle host
SPECIAL = {"pad": 0, "unk": 100, "cls": 101, "sep": 102, "mask": 103}
Row = dict[str, Any]


class Stub(Pretraining):
    """A phase on invented samples whose losses cost nothing but ``device_s`` of sleep, as while a GPU computes."""

    def __init__(self, folder: Path, micro_batch: int, micro_batches: int, device_s: float = 0.0) -> None:
        recipe = load_recipe("bert_large")
        phase = recipe.phases["phase1"]
        self.data = PretrainingData(folder, "train", phase, recipe.train)
        self.samples, self.arranged = micro_batch * micro_batches, arrangement("cuda", phase.seq_len)
        self.phase, self.device_s, self.aside_s = phase, device_s, 0.0
        self.settings = Settings(
            steps=1, seed=1, micro_batch=micro_batch, precision="fp32", reduction="fast", max_grad_norm=1.0, warmup=0.0,
            optimizer=OptimizerConfig(backend="torch"), learning_rate=1.0, schedule="constant",
        )  # fmt: skip

    def size(self, batch: int) -> int:
        return self.samples

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What is no part of the figures: the samples, their lengths, the model."""
        before = time.thread_time()
        yield
        self.aside_s += time.thread_time() - before

    def read(self, batch: int, index: int) -> MicroBatch:
        with self.aside():
            return super().read(batch, index)

    def counts(self, batch: int, indices: range) -> Sequence[int]:
        with self.aside():
            return super().counts(batch, indices)

    def losses(self, model: nn.Module, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        with self.aside():
            time.sleep(self.device_s)
            total = next(model.parameters()).sum()
            return total, total


def main(arguments: list[str]) -> int:
    """Print a table, or its figures as JSON; 1 where a bar does not hold."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.bench feed", description=__doc__)
    parser.add_argument("--steps", type=int, default=15, help="of each measurement (15)")
    parser.add_argument("--micro-batch", type=int, default=64, help="samples (64)")
    parser.add_argument("--gpu-ms", type=float, default=120.0, help="what the device needs for a micro-batch (120)")
    parser.add_argument("--json", action="store_true", help="figures instead of the table")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench-feed-") as name:
        invent(Path(name), chosen.micro_batch)
        costs = [least_disturbed(Path(name), world, chosen.micro_batch, chosen.steps) for world in WORLDS]
        overlaps = [overlap(Path(name), chosen.micro_batch, count, chosen.gpu_ms / 1e3) for count in OVERLAP]
    held = all(row["step_ms"] <= STEP_MS and row["micro_batch_ms"] <= MICRO_BATCH_MS for row in costs)
    held &= all(row["ratio"] <= OVERLAP[row["micro_batches"]] for row in overlaps)
    print(
        json.dumps({"host": costs, "overlap": overlaps, "held": held})
        if chosen.json
        else "\n".join(table(costs, overlaps))
    )
    return 0 if held else 1


def invent(folder: Path, micro_batch: int) -> None:
    """A samples folder of 8 shards of sequences up to 128 tokens, two thirds of them full, as pretraining has them."""
    draw, listed = np.random.default_rng(0), []
    for number in range(8):
        rows = 20_000
        lengths = np.where(draw.random(rows) < 0.66, 128, draw.integers(16, 128, rows))
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = draw.integers(1000, 30_000, offsets[-1]).astype(np.uint16)
        shard = Shard(
            tokens, offsets, np.maximum(3, lengths // 2).astype(np.uint16), draw.integers(0, 2, rows).astype(np.uint8),
            np.zeros(rows, np.uint32), 128, "", 1, "",
        )  # fmt: skip
        name = f"train-{number:05d}.hdf5"
        listed.append({"file": name, "split": "train", **write_shard(folder / name, shard)})
    described = {"format": 1, "seq_len": 128, "vocab_size": 30_522, "vocab_sha256": "", "seed": 1, "special": SPECIAL}
    publish_manifest(folder, {**described, "shards": listed})


class Aside(Accumulator):
    """One whose backward, as the forward, is the model's affair."""

    def backward(self, sums: Tensor, gradient: Tensor) -> None:
        with cast(Stub, self.task).aside():
            super().backward(sums, gradient)


@contextlib.contextmanager
def on_one_core() -> Iterator[None]:
    """This process and the threads that it begins."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def steps_of(task: Stub, world: int) -> Generator[float, None, None]:
    """Endless steps of rank 0; gives the processor seconds of each, all threads, without what is aside."""
    model = nn.Linear(1, 1, bias=False)
    ranks = Ranks(0, world, None, torch.device("cpu"))
    reducer = Reducer(GradientBuffer(list(model.parameters())), 0, None, "fast")
    state = cast(Any, SimpleNamespace(model=model, scale=None))
    autocast = torch.autocast("cpu", enabled=False)
    accumulator = Aside("phase1", task, ranks, state, reducer, autocast, Clock())
    accumulator.begin(0)
    slow = SlowRanks(world)
    for _ in range(WINDOW):
        slow.add(np.ones(world), np.ones(world, int))
    with Feed(task, 0, world, ranks.device, 0) as feed:
        while True:
            before, aside_before = time.process_time(), task.aside_s
            sums = accumulator.accumulate(feed, lambda what: False)
            slow.add(sums.seconds, shares_of(sums.plan))
            yield time.process_time() - before - (task.aside_s - aside_before)


def least_disturbed(folder: Path, world: int, micro_batch: int, steps: int) -> Row:
    """The cheapest of several measurements, for others may use this machine, too."""
    return min(
        (host_cost(folder, world, micro_batch, steps) for _ in range(LOOKS)), key=lambda row: row["micro_batch_ms"]
    )


def host_cost(folder: Path, world: int, micro_batch: int, steps: int) -> Row:
    """Processor ms of a step and of a micro-batch."""
    spent = {}
    for count in (FEW, MANY):
        measured = steps_of(Stub(folder, micro_batch, count * world), world)
        with on_one_core():
            spent[count] = statistics.median([next(measured) for _ in range(steps + 5)][5:])  # the queue fills first
        measured.close()
    each = (spent[MANY] - spent[FEW]) / (MANY - FEW)
    return {"world": world, "step_ms": 1e3 * (spent[FEW] - FEW * each), "micro_batch_ms": 1e3 * each}


def overlap(folder: Path, micro_batch: int, count: int, device_s: float) -> Row:
    """The loop's time of a step of ``count`` micro-batches by that of the device alone, world size 8."""
    measured = steps_of(Stub(folder, micro_batch, 8 * count, device_s), 8)
    next(measured)
    steps = max(2, round(40 / count))
    before = time.perf_counter()
    for _ in range(steps):
        next(measured)
    took = (time.perf_counter() - before) / steps
    measured.close()
    return {"micro_batches": count, "device_ms": 1e3 * device_s, "ratio": took / (count * device_s)}


def table(costs: Sequence[Row], overlaps: Sequence[Row]) -> list[str]:
    """The figures in lines."""
    rows = [("ranks", "ms a step", "ms a micro-batch")]
    rows += [(f"{row['world']:,}", f"{row['step_ms']:.2f}", f"{row['micro_batch_ms']:.3f}") for row in costs]
    lines = [
        f"processor time beyond reading, packing and the model, on one core (bars: {STEP_MS} and {MICRO_BATCH_MS})",
        *columns(rows, (0, 1, 2)),
    ]
    lines.append("the loop's time by the device's alone, on this host")
    return lines + [
        f"{row['micro_batches']} micro-batches of {row['device_ms']:.0f} ms: {row['ratio']:.3f} "
        f"(bar on an idle host: {OVERLAP[row['micro_batches']]})"
        for row in overlaps
    ]
