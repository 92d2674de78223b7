"""Families on a real Slurm: data and seeds sent in one call, and cancelled by one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.run.rundir import RunDir
from support.running import SMALL, digests
from support.sent_runs import SENDER, call, said, send

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


def test_rows_of_strong_scaling(slurm, folder, data) -> None:
    """1, 2 and 4 nodes in two precisions by one command: resumed after a cancel, finished rows are kept."""
    rows = folder / "rows"
    words = ["scaling", "--run", rows, "--recipe", SMALL, "--cluster", SENDER["cluster"], "--data", data]
    words += ["--nodes", "1,2,4", "--phase", "phase1", "--steps", 3, "--json"]
    sent = call("bench", *words, "--begin", "data=now+1hour")
    assert sent.returncode == 0, sent.stdout + sent.stderr
    assert [row["state"] for row in json.loads(sent.stdout)["rows"]] == ["waiting"] * 3
    assert call("cancel", rows).stdout.count("cancelled") == 4
    done = call("bench", *words, "--precision", "fp32,bf16")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 of 6 rows to measure" in done.stderr
    slurm.wait(lambda: not slurm.call("squeue", "-h"), "an empty queue", 200)
    again = call("bench", *words, "--precision", "fp32,bf16")
    assert "0 of 6 rows to measure" in again.stderr
    table = json.loads(again.stdout)["rows"]
    assert [(row["precision"], row["nodes"], row["gpus"], row["accumulation"]) for row in table] == [
        (precision, nodes, 1, count) for precision in ("bf16", "fp32") for nodes, count in ((1, 3), (2, 2), (4, 2))
    ], said(rows / "phase1-fp32-4")
    assert [row["state"] for row in table] == ["done"] * 6
    for row in table:
        assert row["step_s"] * row["sequences_per_s"] == pytest.approx(12, rel=1e-2)
        base = next(other for other in table if other["precision"] == row["precision"])
        assert row["scaling"] == round(row["sequences_per_s"] / base["sequences_per_s"], 3)
    assert not slurm.call("squeue", "-h")
