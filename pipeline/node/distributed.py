"""The ranks of one attempt as a torch.distributed group, and a lost peer or GPU as one clear error."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from data_prep.publish import publish_json
from pipeline.errors import PeerLost
from pipeline.node.device import fault_of
from pipeline.node.job import Job

PEER_TIMEOUT_S = 120.0  # longer than any honest wait between two collectives
Group = dist.ProcessGroup | None


@contextlib.contextmanager
def joined(job: Job, device: torch.device) -> Iterator[tuple[Group, TCPStore | None]]:
    """The group of all ranks of this attempt and the store where they met (None for a single one), left at the end.

    Rank 0 listens on a port that the system chooses and publishes it, with the launch as nonce, in the attempt's
    folder, readable by the owner only. Raises PeerLost when ranks do not come together or one goes away.
    """
    if job.world_size == 1:
        yield None, None
        return
    host = rendezvous_host()
    if host == "127.0.0.1":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with peers_named(job):
        store = _store(job, host, job.attempt.path / "rendezvous.json")
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=job.rank,
            world_size=job.world_size,
            timeout=datetime.timedelta(seconds=PEER_TIMEOUT_S),
            device_id=device if device.type == "cuda" else None,  # connects now: a broken fabric shows at the start
        )
        yield dist.group.WORLD, store
        dist.destroy_process_group()  # not after an error: it may wait for ever, and the process ends anyway


def rendezvous_host() -> str:
    """This machine's address for its peers: MASTER_ADDR if given, loopback outside Slurm, else the host name."""
    return os.environ.get("MASTER_ADDR") or (socket.gethostname() if "SLURM_JOB_ID" in os.environ else "127.0.0.1")


def _store(job: Job, host: str, meeting: Path) -> TCPStore:
    timeout = datetime.timedelta(seconds=PEER_TIMEOUT_S)
    if job.rank == 0:
        store = TCPStore(host, 0, job.world_size, True, timeout=timeout, wait_for_workers=False)
        previous = os.umask(0o077)
        try:
            publish_json(meeting, {"host": host, "port": store.port, "launch": job.topology.launch})
        finally:
            os.umask(previous)
        return store
    deadline = time.monotonic() + PEER_TIMEOUT_S
    while not meeting.exists():
        if time.monotonic() > deadline:
            raise PeerLost(f"rank {job.rank} waited {PEER_TIMEOUT_S:.0f} s for rank 0 to open its port")
        time.sleep(0.02)
    found = json.loads(meeting.read_text(encoding="utf-8"))
    return TCPStore(found["host"], found["port"], job.world_size, False, timeout=timeout)


@contextlib.contextmanager
def peers_named(job: Job, micro_batch: int | None = None) -> Iterator[None]:
    """Turn torch's errors about a peer into PeerLost with rank and host, those of CUDA into what they mean.

    ``micro_batch`` is the one in use, for the advice when memory does not suffice.
    """
    try:
        yield
    except RuntimeError as error:
        if (fault := fault_of(error, job, micro_batch)) is not None:
            raise fault from error
        text = str(error)
        if isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "NCCL", "Connection", "peer")):
            first = text.strip().splitlines()[0]
            raise PeerLost(f"rank {job.rank} on {socket.gethostname()} lost a peer: {first}") from error
        raise
