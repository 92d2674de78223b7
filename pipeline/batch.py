"""Nodes to micro_batch x accumulation per rank, exactly global_batch. Pure arithmetic, called by plan and training."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """How one optimizer step of ``global_batch`` samples is shared by ``world_size`` ranks.

    The step is cut into ``micro_batches`` pieces of ``micro_batch`` samples (the last may be shorter); rank r
    takes the contiguous range ``range_of(r)`` of them, so that ranks differ by at most one micro-batch and the
    members of a micro-batch never depend on the world size.
    """

    global_batch: int
    micro_batch: int
    world_size: int

    @property
    def micro_batches(self) -> int:
        return -(-self.global_batch // self.micro_batch)

    def range_of(self, rank: int) -> range:
        """The micro-batch indices of one rank; empty when there are more ranks than micro-batches."""
        count, world = self.micro_batches, self.world_size
        return range(rank * count // world, (rank + 1) * count // world)

    def samples_of(self, micro_batch_index: int) -> range:
        """Positions of one micro-batch inside the step's global batch."""
        start = micro_batch_index * self.micro_batch
        return range(start, min(start + self.micro_batch, self.global_batch))

    def rank_batch(self, rank: int) -> int:
        """Samples of one rank per optimizer step (NVIDIA's ``--train_batch_size``)."""
        own = self.range_of(rank)
        return min(own.stop * self.micro_batch, self.global_batch) - own.start * self.micro_batch if own else 0

    @property
    def rank_batches(self) -> list[int]:
        return [self.rank_batch(rank) for rank in range(self.world_size)]

    @property
    def shares(self) -> list[int]:
        """Micro-batches of each rank."""
        return [len(self.range_of(rank)) for rank in range(self.world_size)]

    @property
    def accumulation(self) -> int:
        """Micro-batches of the busiest rank."""
        return -(-self.micro_batches // self.world_size)

    @property
    def largest_rank_batch(self) -> int:
        """The largest of ``rank_batches``, without making them all: only the last micro-batch may be a short one."""
        busiest = self.micro_batches % self.world_size or self.world_size  # ranks, the last one among them
        if busiest > 1:
            return self.accumulation * self.micro_batch
        return max(self.rank_batch(self.world_size - 1), (self.accumulation - 1) * self.micro_batch)

    @property
    def balance(self) -> float:
        """Mean rank batch divided by the largest: 1 means that no rank waits for another."""
        return self.global_batch / self.world_size / self.largest_rank_batch


def plan(global_batch: int, micro_batch: int, world_size: int) -> BatchPlan:
    """The plan with ``micro_batch`` halved until every rank has at least one micro-batch.

    Raises ConfigError when there are more ranks than samples.
    """
    if world_size > global_batch:
        raise ConfigError(
            f"{world_size} ranks cannot share a global_batch of {global_batch}: use at most {global_batch} ranks"
        )
    shared = BatchPlan(global_batch, min(micro_batch, global_batch), world_size)
    while shared.micro_batches < world_size:
        shared = BatchPlan(global_batch, max(1, shared.micro_batch // 2), world_size)
    return shared


def better_micro_batch(current: BatchPlan, wanted: float = 0.9) -> int | None:
    """The largest smaller micro_batch whose balance reaches ``wanted``; None when there is none or no need."""
    if current.balance >= wanted:
        return None
    for micro_batch in range(current.micro_batch - 1, 0, -1):
        if BatchPlan(current.global_batch, micro_batch, current.world_size).balance >= wanted:
            return micro_batch
    return None
