"""Ranks find each other, and nobody else: strangers, stale places and broken meetings are lost peers, never defects."""

from __future__ import annotations

import contextlib
import datetime
import json
import multiprocessing
import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from pipeline.errors import describe
from pipeline.node import distributed
from pipeline.node.distributed import joined, listening
from pipeline.node.job import Job, Topology
from pipeline.run.files import appeared, read_json
from pipeline.run.rundir import RunDir

FORK = multiprocessing.get_context("fork")


def rank_of(run: Path, rank: int, answers: Any, environment: dict[str, str], patience_s: float) -> None:
    """One rank: the sum over the group, or the error's line and code."""
    os.environ |= environment
    distributed.PEER_TIMEOUT_S = patience_s
    topology = Topology(rank, 2, rank, "launch")
    job = Job(RunDir(run), "phase1", RunDir(run).stage("phase1").attempts[-1], topology, workers=1, threads=1)
    try:
        with joined(job, torch.device("cpu")) as (group, store):
            value = torch.ones(1)
            dist.all_reduce(value, group=group)
            store.add("met", 1)
            listens = [line for line in listening_lines() if str(os.getpid()) in line]
            answers.put((rank, value.item(), [line for line in listens if "0.0.0.0:" in line or "*:" in line[:60]]))
            dist.barrier(group)
    except BaseException as error:
        answers.put((rank, *describe(error)))
    finally:
        answers.close()
        answers.join_thread()
        os._exit(0)


def listening_lines() -> list[str]:
    """Of this process's listening sockets the local address, from the kernel."""
    inodes = {os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink() and link.exists()}
    lines = []
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        if words[3] == "0A" and f"socket:[{words[9]}]" in inodes:
            lines.append(f"{os.getpid()} {'0.0.0.0:' if words[1].startswith('00000000') else words[1]}")
    return lines


def meet(run: Path, ranks: tuple[int, ...] = (0, 1), patience_s: float = 20.0, **environment: str) -> Any:
    """Start the ranks of a new attempt; gives the processes and the queue of their answers."""
    RunDir(run).stage("phase1").new_attempt("launch")
    answers = FORK.Queue()
    words = [(run, rank, answers, environment, patience_s) for rank in ranks]
    processes = [FORK.Process(target=rank_of, args=each, daemon=True) for each in words]
    for process in processes:
        process.start()
    return processes, answers


def place_of(run: Path) -> Path:
    return RunDir(run).stage("phase1").attempts[-1].path / "rendezvous.json"


def this_address() -> str:
    """An address of this machine that is not loopback; without one there is nothing to try."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # nothing is sent
        return str(probe.getsockname()[0])
    pytest.skip("this machine has no address but loopback: that strangers cannot enter is not tried")


def test_ranks_of_one_machine_meet_where_nobody_else_can_enter(tmp_path: Path) -> None:
    processes, answers = meet(tmp_path)
    assert sorted(answers.get(timeout=30) for _ in processes) == [(0, 2.0, []), (1, 2.0, [])]
    place = json.loads(place_of(tmp_path).read_text())
    assert "port" not in place
    assert stat.S_IMODE(place_of(tmp_path).stat().st_mode) == 0o600


def test_ranks_of_several_nodes_meet_at_one_address_with_a_stranger_there(tmp_path: Path) -> None:
    address = this_address()
    processes, answers = meet(tmp_path, MASTER_ADDR=address, GLOO_SOCKET_IFNAME="")
    place = appeared(lambda: read_json(place_of(tmp_path)), 20)
    assert place is not None
    assert place["host"] == address
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", place["port"]), timeout=5)
    for garbage in (b"\0" * 64, b"\xff" * 4096, b"GET / HTTP/1.0\r\n\r\n"):
        with contextlib.suppress(OSError), socket.create_connection((address, place["port"]), timeout=5) as stranger:
            stranger.sendall(garbage)
    assert sorted(answers.get(timeout=30) for _ in processes) == [(0, 2.0, []), (1, 2.0, [])]


@pytest.mark.parametrize("rank", [0, 1])
def test_whoever_does_not_know_the_token_is_a_lost_peer(tmp_path: Path, rank: int) -> None:
    """A stranger who reads all keys of the port and answers in a rank's place, but for what the token makes."""
    address = this_address()
    if rank == 0:  # the stranger is another rank
        _, answers = meet(tmp_path, ranks=(0,), MASTER_ADDR=address)
        place = appeared(lambda: read_json(place_of(tmp_path)), 20)
        assert place is not None
        store = TCPStore(place["host"], place["port"], None, False, timeout=datetime.timedelta(seconds=10))
    else:  # and here the one who listens
        RunDir(tmp_path).stage("phase1").new_attempt("launch")
        listener = listening(address)
        place = {"host": address, "port": listener.getsockname()[1], "token": "00" * 32, "launch": "launch"}
        store = TCPStore(address, place["port"], 2, True, wait_for_workers=False, master_listen_fd=listener.detach())
        answers = FORK.Queue()
        place_of(tmp_path).write_text(json.dumps(place))
        FORK.Process(target=rank_of, args=(tmp_path, 1, answers, {"MASTER_ADDR": address}, 10.0), daemon=True).start()
    prefix = distributed._proof(place["token"], "keys")  # what listing the keys tells
    store.set(f"{prefix}/rank {1 - rank}", "0" * 64)
    _, line, code = answers.get(timeout=30)
    assert code == 76
    assert f"who speaks as rank {1 - rank} does not know this attempt's token" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("written", "why"),
    [
        ('{"host": "127.0.0.1", "port": 1, "token": "00"}', "did not come together"),
        ('{"file": "/nowhere/at/all/store", "token": "00"}', "did not come together"),
        ('{"launch": "x"}', "did not come together"),
        ("[]", "waited 2 s for rank 0"),
        (None, "waited 2 s for rank 0"),
    ],
)
def test_no_failure_to_form_the_group_is_a_defect(tmp_path: Path, written: str | None, why: str) -> None:
    _, answers = meet(tmp_path, ranks=(), patience_s=2.0)
    if written is not None:
        place_of(tmp_path).write_text(written)
    FORK.Process(target=rank_of, args=(tmp_path, 1, answers, {}, 2.0), daemon=True).start()
    _, line, code = answers.get(timeout=30)
    assert code == 76
    assert why in line
