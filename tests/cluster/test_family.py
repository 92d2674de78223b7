"""Families on a real Slurm: data and seeds sent in one call, and cancelled by one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.run.rundir import RunDir
from support.running import SMALL, digests
from support.sent_runs import call, said, send

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

SHORT = ["--recipe", SMALL, "--stages", "phase1", "--set", "phase1.steps=4"]


def jobs_of(run: Path) -> list[str]:
    return [job["id"] for job in json.loads((run / "jobs.json").read_text())["jobs"]]


def test_one_call_sends_data_and_seeds_and_the_seeds_wait(slurm, folder, data) -> None:
    family = folder / "family"
    done = send(family, *SHORT, "--data", data, "--nodes", 2, "--seeds", "pretrain=0-1")
    assert done.returncode == 0, done.stdout + done.stderr
    (making,), *seeds = (jobs_of(family / name) for name in ("data", "seed-0", "seed-1"))
    slurm.wait(lambda: all(slurm.state(job) == "COMPLETED" for (job,) in seeds), "both seeds are trained", 120)
    ended = {job: slurm.words("job", job) for job in (making, *(job for (job,) in seeds))}
    assert all(ended[job]["StartTime"] >= ended[making]["EndTime"] for (job,) in seeds)
    first, second = (digests(family / f"seed-{seed}")["phase1", 4] for seed in (0, 1))
    assert first != second
    assert [event["world_size"] for event in RunDir(family / "seed-1").events if event["event"] == "started"] == [2]
    again = send(family, *SHORT, "--data", data, "--nodes", 2, "--seeds", "pretrain=0-1")
    assert again.stdout.count("nothing to do") == 3, again.stdout + again.stderr + said(family / "data")


def test_one_call_cancels_a_family(slurm, folder, data) -> None:
    family = folder / "cancelled"
    words = [*SHORT, "--data", data, "--seeds", "pretrain=0-1"]
    done = send(family, *words, "--begin", "data=now+1hour")
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = [job for name in ("data", "seed-0", "seed-1") for job in jobs_of(family / name)]
    assert {slurm.state(job) for job in jobs} == {"PENDING"}
    assert "in the queue" in send(family, *words).stdout
    done = call("cancel", family)
    assert done.stdout.count("cancelled") == 3, done.stdout + done.stderr
    assert {slurm.state(job) for job in jobs} == {"CANCELLED"}
