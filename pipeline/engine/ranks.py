"""The ranks of one training as what runs on them sees them: which one this is, sums and records over all of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.node.distributed import Group
from pipeline.node.heartbeat import Heartbeat, Where


@dataclass(frozen=True)
class Ranks:
    """This rank among its peers; ``group`` is None for a single one: ``Ranks(0, 1, None, device)``."""

    rank: int
    world_size: int
    group: Group
    device: torch.device
    heartbeat: Heartbeat = field(default_factory=Heartbeat)

    def alive(self, where: Where) -> None:
        """A sign of life, and what comes next: one's own work, or waiting for others."""
        self.heartbeat.beat(where, self.heartbeat.read().step)

    def sum(self, values: Tensor) -> Tensor:
        """``values`` summed over the ranks, in place."""
        if self.group is not None:
            self.alive("waiting")
            dist.all_reduce(values, group=self.group)
            self.alive("working")
        return values

    def gather(self, record: Any) -> list[Any]:
        """Every rank's JSON ``record``, by rank. They travel as bytes: objects would travel as pickles."""
        if self.group is None:
            return [record]
        text = json.dumps(record).encode()
        sizes = torch.zeros(self.world_size, dtype=torch.int64, device=self.device)
        sizes[self.rank] = len(text)
        longest = int(self.sum(sizes).max())
        padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(self.device)
        records = [torch.empty_like(padded) for _ in range(self.world_size)]
        self.alive("waiting")
        dist.all_gather(records, padded, group=self.group)
        self.alive("working")
        lengths = sizes.tolist()
        return [json.loads(bytes(found.cpu().numpy())[:length]) for found, length in zip(records, lengths, strict=True)]

    def wait_for_all(self) -> None:
        """Return when every rank has come here."""
        if self.group is not None:
            self.alive("waiting")
            dist.barrier(self.group)
