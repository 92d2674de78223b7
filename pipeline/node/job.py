"""What one process of a stage learns at run time: its folder, rank and attempt, and whether it was asked to stop."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from data_prep.publish import APPEND, plain
from pipeline.node.heartbeat import Heartbeat
from pipeline.node.preempt import StopRequest
from pipeline.node.screen import Screen
from pipeline.run.files import patiently
from pipeline.run.rundir import Attempt, RunDir

T = TypeVar("T")
LOOPBACK = "127.0.0.1"
PLACES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_NTASKS", "SUBMITIT_LOCAL_LOCALID"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


@dataclass(frozen=True)
class Topology:
    """Which rank this process is, from the local runner's or Slurm's environment."""

    rank: int
    world_size: int
    local_rank: int
    launch: str  # the same for all ranks of one start, different for every start
    place: Mapping[str, str | int] = field(default_factory=dict)  # job_id, restart and step of a start by Slurm
    nodes: int = 1

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Topology:
        """By the local runner or torchrun, else by submitit's executor on one machine, by srun, or one process."""
        for names in PLACES:
            if all(name in environment for name in names):
                rank, world_size, local_rank = (int(environment[name]) for name in names)
                break
        else:
            rank, world_size, local_rank = 0, 1, 0
        on_each = int(environment.get("LOCAL_WORLD_SIZE") or world_size)  # by torchrun
        nodes = int(environment.get("SLURM_STEP_NUM_NODES") or max(1, world_size // on_each))
        if "PIPELINE_LAUNCH" in environment:
            return cls(rank, world_size, local_rank, environment["PIPELINE_LAUNCH"], nodes=nodes)
        if local := environment.get("SUBMITIT_LOCAL_JOB_ID"):
            return cls(rank, world_size, local_rank, f"submitit-{local}", nodes=nodes)
        job, restart, step = (environment.get(f"SLURM_{part}", "") for part in ("JOB_ID", "RESTART_COUNT", "STEP_ID"))
        if not job:
            return cls(rank, world_size, local_rank, f"{socket.gethostname()}-{os.getpid()}", nodes=nodes)
        place: dict[str, str | int] = {"job_id": job, "restart": int(restart or 0), "step": step}
        return cls(rank, world_size, local_rank, f"{job}-{restart}-{step}", place, nodes)


def rendezvous_host() -> str:
    """This machine's address for its peers: MASTER_ADDR if given, loopback where all are here, else the host name."""
    here = "SLURM_JOB_ID" not in os.environ or os.environ.get("SLURM_STEP_NUM_NODES") == "1"
    return os.environ.get("MASTER_ADDR") or (LOOPBACK if here else socket.gethostname())


@dataclass(frozen=True)
class Job:
    """One process of one attempt of a stage."""

    run: RunDir
    stage: str
    attempt: Attempt
    topology: Topology
    workers: int
    threads: int
    stop: StopRequest = field(default_factory=StopRequest)
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    screen: Screen = field(default_factory=Screen)

    @property
    def out(self) -> Path:
        return self.run.stage(self.stage).path

    @property
    def rank(self) -> int:
        return self.topology.rank

    @property
    def world_size(self) -> int:
        return self.topology.world_size

    def option(self, key: str, value: object) -> str:
        """What sets ``key`` for this stage, or a seed of it: an option of submit; without a recipe of the command."""
        of_run = (self.run.path / "run.json").is_file()
        return f"--set {self.stage.partition('-')[0]}.{key}={value}" if of_run else f"--{key.replace('_', '-')} {value}"

    def patiently(self, work: Callable[[], T]) -> T:
        """What ``work`` gives, once the file server is there, or this process is asked to stop."""
        return patiently(work, self.warn, self.stop.asked)

    def say(self, line: str, share: float | None = None) -> None:
        """One line to rank 0's log and standard output; other ranks are silent. ``share`` of the work is done."""
        if self.rank == 0:
            self._log(line)
            with contextlib.suppress(OSError):
                self.screen.show(f"  {self.stage}: {line}", share)

    def warn(self, line: str) -> None:
        self._log(f"warning (rank {self.rank}): {line}")
        with contextlib.suppress(OSError):
            print(f"  {self.stage}: warning (rank {self.rank}): {line}", file=sys.stderr, flush=True)

    def _log(self, line: str) -> None:
        # a full disk costs lines of the log, not the training
        with contextlib.suppress(OSError), os.fdopen(plain(self.attempt.log, APPEND), "ab") as file:
            file.write(f"{time.strftime('%H:%M:%S')} {line}\n".encode(errors="backslashreplace"))
