"""What takes longer on a real Slurm: limits of time and GPU-hours, a node cut off, a controller that is down."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time

import pytest

from slurm import queue
from slurm.devcluster import cluster, processes
from support.running import digests, states
from support.sent_runs import (
    LAST,
    call,
    metrics,
    rank_pid,
    resumed_at,
    said,
    script_pid,
    send,
    sent,
    site,
    wait_done,
)

pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.timeout(400)]


def test_stops_when_its_gpu_hours_are_spent(slurm, prepared, user) -> None:
    """0.05 GPU-hours are 90 s of two GPUs: saved half a minute before, ended with 2, refused when sent again."""
    blind = user.home / "python-without-gpus"  # those of this cluster are claimed only
    blind.write_text(f'#!/bin/sh\nCUDA_VISIBLE_DEVICES= exec {user.python} "$@"\n')
    blind.chmod(0o755)
    cluster = site(user, f'gpus_per_node = 1\npython = "{blind}"')
    words = ["--nodes", 2, "--stages", "phase1", "--set", "phase1.steps=100000", "--set", "phase1.warmup=0.01"]
    job = sent(prepared, *words, "--max-gpu-hours", "0.05", cluster=cluster)["pretrain"]
    slurm.wait(lambda: slurm.state(job) in ("FAILED", "COMPLETED"), "the job has ended", 120)
    assert slurm.words("job", job)["ExitCode"] == "2:0"
    assert "the 3 GPU-minutes that --max-gpu-hours allows are used up; not started again" in said(prepared)
    assert ("phase1", metrics(prepared, 1)[-1]["step"]) in digests(prepared)
    again = send(prepared, *words, cluster=cluster)
    assert again.returncode == 2
    assert "GPU-hours are spent, --max-gpu-hours allows 0.05" in again.stderr


@pytest.mark.parametrize("limit", [("-t", "1"), ("-t", "2", "--signal=B:TERM@60")], ids=["ranks", "shell"])
def test_stops_before_the_time_limit_and_goes_on(slurm, prepared, limit) -> None:
    """Each attempt saves half a minute before its limit and asks for the next one, whomever Slurm warns of it."""
    words = ["--nodes", 2, "--stages", "phase1", *limit]
    words += ["--set", "phase1.steps=100000", "--set", "phase1.warmup=0.01"]
    job = sent(prepared, *words)["pretrain"]
    slurm.wait(lambda: len(metrics(prepared, 2)) >= 5, "the second attempt trains", 200)
    said_why = (
        r"asked to stop \((SIGUSR2, )?\d+ s before its time or|by another rank"  # ours or Slurm's warning came first
    )
    assert re.search(said_why, said(prepared)), said(prepared)
    assert resumed_at(prepared, 2) == metrics(prepared, 1)[-1]["step"]
    assert slurm.state(job) == "RUNNING"


def test_a_batch_script_killed_again_and_again_ends_the_chain_with_the_reason(slurm, prepared) -> None:
    """Before any progress; what waits for it leaves the queue, and the report tells."""
    jobs = sent(prepared, "--nodes", 2, "--set", "train.checkpoint_every=400")
    for attempt in (1, 2):
        slurm.wait(lambda: (prepared / f"stages/phase1/attempts/000{attempt}").exists(), "it has begun", 60)  # noqa: B023
        for rank in (0, 1):
            os.kill(rank_pid(prepared, rank), signal.SIGSTOP)  # it saves nothing when it is told to stop
        os.kill(script_pid(jobs["pretrain"]), signal.SIGKILL)
    slurm.wait(lambda: slurm.state(jobs["report"]) == "COMPLETED", "the report is made", 90)
    rows = {row["name"]: row for row in json.loads(call("status", prepared, "--json").stdout)["stages"]}
    why = "exit 137: its batch script was killed, 2 attempts without progress"
    assert (rows["phase1"]["state"], rows["phase1"]["reason"].startswith(why)) == ("failed", True), rows["phase1"]
    assert not slurm.call("squeue", "-h")


def test_a_node_that_is_cut_off_writes_nothing_that_counts(slurm, prepared, reference) -> None:
    """Rank 0's node loses its network; the old rank lives on beside the next attempt, which others run."""
    job = sent(prepared, "--nodes", 2, "--stages", "phase1")["pretrain"]
    slurm.wait(lambda: len(metrics(prepared, 1)) >= 20, "phase 1 trains", 60)
    pid = rank_pid(prepared, 0)
    node = processes.variable(pid, "SLURMD_NODENAME")
    assert node
    cluster.cut(slurm.layout, node)
    try:
        slurm.wait(lambda: len(metrics(prepared, 2)) >= 5, "the second attempt trains", 90)
        wait_done(slurm, prepared, job, 120)
        first = metrics(prepared, 1)
        assert resumed_at(prepared, 2) <= first[-1]["step"]
        assert digests(prepared)[LAST] == digests(reference)[LAST]
        done = (prepared / "stages/phase1/done.json").read_bytes()
    finally:
        cluster.heal(slurm.layout, node)
    slurm.wait(lambda: not processes.alive(pid), "the old rank has ended", 150)
    assert metrics(prepared, 1) == first
    assert (prepared / "stages/phase1/done.json").read_bytes() == done
    assert digests(prepared)[LAST] == digests(reference)[LAST]


def test_a_controller_that_is_down_when_a_rank_dies(slurm, prepared, reference) -> None:
    """For a minute nobody confirms the requeue: the batch script asks until somebody does."""
    job = sent(prepared, "--nodes", 2, "--stages", "phase1")["pretrain"]
    slurm.wait(lambda: len(metrics(prepared, 1)) >= 20, "phase 1 trains", 60)
    os.kill(rank_pid(prepared, 1), signal.SIGKILL)
    stop_controller(slurm)
    time.sleep(60)
    start_controller(slurm)
    wait_done(slurm, prepared, job, 150)
    assert "requeue not confirmed" in said(prepared)
    assert digests(prepared)[LAST] == digests(reference)[LAST]


def test_a_controller_that_has_lost_its_memory(slurm, prepared) -> None:
    """Slurm ends the job that it no longer knows; status tells from the run's files, and submit goes on."""
    words = ["--nodes", 2, "--stages", "phase1", "--set", "phase1.steps=100000", "--set", "phase1.warmup=0.01"]
    old = sent(prepared, *words)["pretrain"]
    slurm.wait(lambda: len(metrics(prepared, 1)) >= 20, "phase 1 trains", 60)
    pid = rank_pid(prepared, 0)
    stop_controller(slurm)
    assert call("status", prepared, "--short").stdout.startswith(f"{prepared.name}  Slurm does not answer")
    for kept in (slurm.layout.state / "controller").iterdir():
        shutil.rmtree(kept) if kept.is_dir() else kept.unlink()
    conf = slurm.layout.conf.read_text()  # job ids are counted from another number: no folder of an old job is met
    slurm.layout.conf.write_text(re.sub(r"(FirstJobId=)\d+", rf"\g<1>{int(old) + 1000}", conf))
    start_controller(slurm)
    slurm.wait(lambda: not processes.alive(pid), "the job that nobody knows has ended", 60)
    assert not queue.jobs([old])
    assert states(prepared)["phase1"] in ("todo", "cancelled", "failed")
    sent(prepared, *words)
    slurm.wait(lambda: len(metrics(prepared, 2)) >= 5, "the second attempt trains", 60)
    assert resumed_at(prepared, 2) >= metrics(prepared, 1)[-1]["step"] - 40  # the interval, and a save in progress


def stop_controller(slurm) -> None:
    """As a site does it: with its state saved. (Killed, it forgets the jobs of its last seconds.)"""
    controller = processes.recorded(slurm.layout)["slurmctld"]
    os.kill(controller, signal.SIGTERM)
    slurm.wait(lambda: not processes.alive(controller), "the controller has ended")


def start_controller(slurm) -> None:
    cluster.start_controller(slurm.layout)
    cluster.wait_for_nodes(slurm.layout, slurm.layout.node_names)
