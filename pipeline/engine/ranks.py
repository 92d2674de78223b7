"""The ranks of one training as what runs on them sees them: which one this is, sums and records over all of them."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from pipeline.errors import PeerLost
from pipeline.node.distributed import Group
from pipeline.node.heartbeat import Heartbeat, Where
from pipeline.node.supervise import START_S


@dataclass(frozen=True)
class Ranks:
    """This rank among its peers; ``group`` is None for a single one: ``Ranks(0, 1, None, device)``."""

    rank: int
    world_size: int
    group: Group
    device: torch.device
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    store: Store | None = None

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
        return [json.loads(bytes(sent.cpu().numpy())[:length]) for sent, length in zip(records, lengths, strict=True)]

    def meet(self, name: str) -> None:
        """Return when every rank has come to the place ``name``, over the store and not by a collective.

        For work that may take one rank much longer than another: a collective gives up after two minutes. Raises
        PeerLost after `START_S`.
        """
        if self.store is None:
            return
        key, deadline, pause_s = f"met/{name}", time.monotonic() + START_S, 0.01
        self.store.add(key, 1)
        while (arrived := self.store.add(key, 0)) < self.world_size:
            if time.monotonic() > deadline:
                raise PeerLost(f"{name}: {arrived} of {self.world_size} ranks came here in {START_S:.0f} s")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 1.0)

    def wait_for_all(self) -> None:
        if self.group is not None:
            self.alive("waiting")
            dist.barrier(self.group)
