"""Micro-batches ahead of the loop: one thread reads them on the host and sends each to the device in one copy.

The loop never waits for reading, masking or packing while there is other work. The order is arithmetic, so nothing is
saved of it: a feed begins at any batch.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.batch import BatchPlan
from pipeline.engine.task import Array, MicroBatch, Task

AHEAD = 3  # micro-batches read before they are asked for
ALIGN = 16  # int32 words: every array starts on its own cache line


@dataclass(frozen=True)
class Fed:
    """One micro-batch on the device: ``inputs`` are its tensors and sizes by name."""

    index: int
    inputs: Mapping[str, Any]
    counts: Sequence[int]
    digest: int  # of the ids of its samples, 48 bits: exact in a float64, so that ranks can exchange it


@dataclass(frozen=True)
class Batch:
    """What is known of a batch before its micro-batches: how the ranks share it, and this rank's counts of the next."""

    number: int
    plan: BatchPlan
    next_counts: Sequence[int]


class Feed:
    """The batches of one rank from ``first`` on: each `batch`, then its micro-batches one by one."""

    def __init__(self, task: Task, rank: int, world_size: int, device: torch.device, first: int) -> None:
        self.task, self.rank, self.world_size, self.device = task, rank, world_size, device
        # The loop holds one micro-batch, AHEAD are ready, the thread fills one.
        self._slots = [_Slot(device) for _ in range(AHEAD + 2)]
        self._ready: queue.SimpleQueue[Batch | Fed | BaseException] = queue.SimpleQueue()
        self._permits: queue.SimpleQueue[None] = queue.SimpleQueue()  # one for each item that may be made
        for _ in range(AHEAD + 1):
            self._permits.put(None)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(first,), name="feed", daemon=True)
        self._thread.start()

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def batch(self) -> Batch:
        """The next batch; its micro-batches must have been taken before the one after it is asked for."""
        batch = self._take()
        assert isinstance(batch, Batch)
        return batch

    def micro_batch(self) -> Fed:
        """The next micro-batch of this rank."""
        fed = self._take()
        assert isinstance(fed, Fed)
        return fed

    def close(self) -> None:
        """End the thread; what it has read is dropped."""
        self._stopped.set()
        self._permits.put(None)
        self._thread.join()

    def _take(self) -> Batch | Fed:
        self._permits.put(None)  # for the item before, which the loop has done with
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def _work(self, first: int) -> None:
        try:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # a thread begins on device 0
            items = self._items(first)
            while True:
                self._permits.get()
                if self._stopped.is_set():
                    return
                self._ready.put(next(items))
        except BaseException as error:  # handed to the loop: a thread has nobody to raise to
            self._ready.put(error)

    def _items(self, first: int) -> Iterator[Batch | Fed]:
        task, number, place = self.task, first, 0
        while True:
            plan, next_plan = self.plan(number), self.plan(number + 1)
            yield Batch(number, plan, task.counts(number + 1, next_plan.range_of(self.rank)))
            for index in plan.range_of(self.rank):
                micro_batch = task.read(number, index)
                inputs = self._slots[place].send(micro_batch)
                place = (place + 1) % len(self._slots)
                yield Fed(index, inputs, micro_batch.counts, digest48(micro_batch))
            number += 1

    def plan(self, batch: int) -> BatchPlan:
        """How the ranks share a batch."""
        return BatchPlan(self.task.size(batch), self.task.settings.micro_batch, self.world_size)


class _Slot:
    """Host memory of one micro-batch, used again when the device has taken what was in it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.words = torch.empty(0, dtype=torch.int32)
        self.copied: torch.cuda.Event | None = None

    def send(self, micro_batch: MicroBatch) -> dict[str, Any]:
        """The arrays as tensors on the device, cut out of one copy of all of them; the sizes beside them."""
        cuts, end = {}, 0
        for name, array in micro_batch.arrays.items():
            cuts[name] = (end, array)
            end += -(-array.size // ALIGN) * ALIGN
        if self.copied is not None:
            self.copied.synchronize()
        if len(self.words) < end:
            self.words = torch.empty(end, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        words = self.words.numpy()
        for start, array in cuts.values():
            words[start : start + array.size] = array.reshape(-1).view(np.int32)
        sent = self.words[:end].to(self.device, non_blocking=True)
        if self.device.type == "cuda":
            self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.copied.record()
        tensors = {name: _cut(sent, start, array) for name, (start, array) in cuts.items()}
        return {**tensors, **micro_batch.sizes}


def _cut(words: Tensor, start: int, array: Array) -> Tensor:
    part = words.as_strided(array.shape, [step // words.itemsize for step in array.strides], start)
    return part.view(torch.float32) if array.dtype == np.float32 else part


def on_device(micro_batch: MicroBatch, device: torch.device) -> dict[str, Any]:
    """A single micro-batch as `Task.losses` takes it, without a feed."""
    return _Slot(device).send(micro_batch)


def digest48(micro_batch: MicroBatch) -> int:
    """48 bits of a hash of the ids of a micro-batch's samples."""
    return int.from_bytes(hashlib.blake2b(micro_batch.ids.tobytes(), digest_size=6).digest(), "little")
