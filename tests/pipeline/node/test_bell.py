"""Waiting together: a bell wakes, a stranger's costs a look, and what real ranks that wait open, counted by strace."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from faults import traced
from faults.starts import begun
from faults.training import STAGE
from pipeline.node.bell import Bell, ring, until
from pipeline.node.job import Topology
from support.running import ROOT, command

NODES, LOCAL_RANKS, LOOKED_AT_S = 16, 8, 20.0
TRACED = ("strace", "-f", "-ttt", "-e", "trace=open,openat,openat2", "-o")


def topology(local_rank: int, launch: str, nodes: int = 10**6) -> Topology:
    """So many nodes that who hears no bell looks once more after days."""
    return Topology(8 + local_rank, 8 * nodes, local_rank, launch, nodes=nodes)


def test_who_finds_it_rings_for_its_neighbours(tmp_path: Path) -> None:
    """Both look once, then the one that is to look does; the other hears of it."""
    found, looked = tmp_path / "found", threading.Event()

    def look() -> bool | None:
        looked.set()
        return found.exists() or None

    answers: list[bool | None] = []
    listener = threading.Thread(target=lambda: answers.append(until(topology(1, str(tmp_path)), "it", look, 30.0)))
    listener.start()
    assert looked.wait(20)
    found.touch()
    assert until(topology(0, str(tmp_path)), "it", look, 30.0)
    listener.join()
    assert answers == [True]


def test_a_bell_for_others_or_for_something_else_is_not_heard(tmp_path: Path) -> None:
    bell = Bell(topology(1, str(tmp_path)), "it")
    for launch, what in (("another", "it"), (str(tmp_path), "something else")):
        ring(topology(0, launch), what)
        assert not bell.due()
    ring(topology(0, str(tmp_path)), "it")
    ring(topology(0, str(tmp_path)), "it")
    assert (bell.due(), bell.due()) == (True, False)  # however often it rings before a look
    bell.close()


def test_who_is_asked_to_stop_waits_no_longer(tmp_path: Path) -> None:
    asked = threading.Event()
    threading.Timer(0.3, asked.set).start()
    assert until(topology(1, str(tmp_path)), "it", lambda: None, 1e6, asked=asked.is_set) is None


@pytest.mark.slow
@pytest.mark.skipif(bool(traced.missing()), reason=traced.missing() or "strace is there")
def test_ranks_that_wait_open_under_twenty_files_a_second_together(tmp_path: Path) -> None:
    """The ranks of one of 16 nodes wait for rank 0. Pauses grow as the nodes do: 128 nodes open as many together."""
    run = begun(tmp_path / "run")
    for number in range(20):
        run.stage(STAGE).new_attempt(f"old {number}")
    settings = {"WORLD_SIZE": str(NODES * LOCAL_RANKS), "SLURM_STEP_NUM_NODES": str(NODES), "PIPELINE_LAUNCH": "late"}
    waiting = [
        subprocess.Popen(
            [*TRACED, tmp_path / f"{rank}.log", *command("worker", run.path, STAGE)],
            env={**os.environ, **settings, "RANK": str(LOCAL_RANKS + rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            start_new_session=True,
        )
        for rank in range(LOCAL_RANKS)
    ]

    def opened(log: Path) -> list[float]:
        """When something in the folder of attempts was opened."""
        lines = log.read_text().splitlines() if log.exists() else []
        return [float(line.split()[1]) for line in lines if f"{STAGE}/attempts" in line]

    try:
        logs = [tmp_path / f"{rank}.log" for rank in range(LOCAL_RANKS)]
        deadline = time.monotonic() + 60
        while not all(map(opened, logs)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(LOOKED_AT_S + 1.0)
        first = max(min(opened(log)) for log in logs) + 1.0  # the old attempts' owners are read once, then
        counts = [sum(first < when < first + LOOKED_AT_S for when in opened(log)) for log in logs]
    finally:
        for process in waiting:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    together = NODES * sum(counts) / LOOKED_AT_S
    print(
        f"opened in {LOOKED_AT_S:.0f} s by the ranks of one of {NODES} nodes: {counts}; a second by all: {together:.1f}"
    )
    assert counts[0] > 0
    assert together < 20
