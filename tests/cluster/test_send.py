"""The chain on a real Slurm: sent, refused, taken over, cancelled; the weights do not notice."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from pipeline.run.rundir import RunDir
from support.running import SMALL, digests, states
from support.sent_runs import (
    DATA_STAGES,
    SENDER,
    call,
    metrics,
    resumed_at,
    said,
    send,
    sent,
    site,
    wait_done,
)

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]


def live(slurm) -> list[str]:
    return slurm.call("squeue", "-h", "-o", "%A").split()


def test_the_whole_chain_gives_what_the_local_runner_gives(slurm, small_run, data, folder, user, monkeypatch) -> None:
    """Sent by an ordinary user whose environment Slurm is told not to hand on."""
    run = folder / "chain"
    monkeypatch.setenv("SBATCH_EXPORT", "NONE")
    jobs = sent(run, "--recipe", SMALL, "--nodes", 2, "--data", data)
    assert list(jobs) == ["data", "pretrain", "finetune", "report"]
    slurm.wait(lambda: slurm.state(jobs["report"]) in ("COMPLETED", "FAILED"), "the report is made", 150)
    assert set(states(run).values()) == {"done"}, said(run)
    mine, local = digests(run), digests(small_run)
    assert [mine[key] for key in (("phase1", 24), ("phase2", 6))] == [
        local[key] for key in (("phase1", 24), ("phase2", 6))
    ]
    assert slurm.state(jobs["report"]) == "COMPLETED"
    assert slurm.call("squeue", "-h", "-t", "all", "-j", jobs["pretrain"], "-o", "%U") == str(user.uid)
    assert "everything is done" in send(run).stdout


def test_a_run_at_work_is_refused_replaced_and_cancelled(slurm, prepared) -> None:
    old = sent(prepared, "--nodes", 2, "--stages", "phase1")["pretrain"]
    slurm.wait(lambda: len(metrics(prepared, 1)) >= 5, "phase 1 trains", 60)
    settings = (prepared / "run.json").read_bytes()
    refused = send(prepared, "--nodes", 4, "--stages", "phase1")
    assert refused.returncode == 8, refused.stdout + refused.stderr
    assert f"pretrain (job {old}, running)" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert (prepared / "run.json").read_bytes() == settings
    assert call("submit", "--run", prepared, "--cluster", "local").returncode == 8
    new = sent(prepared, "--nodes", 2, "--stages", "phase1", "--replace")["pretrain"]
    slurm.wait(lambda: len(metrics(prepared, 2)) >= 5, "the second attempt trains", 60)
    assert slurm.state(old) == "CANCELLED"
    assert resumed_at(prepared, 2) == metrics(prepared, 1)[-1]["step"]
    assert states(prepared)["phase1"] == "running"
    cancelled = call("cancel", prepared)
    assert f"scancel {new}" in cancelled.stdout, cancelled.stderr
    slurm.wait_state(new, "CANCELLED")
    slurm.wait(lambda: states(prepared)["phase1"] == "cancelled", "status says cancelled", 10)
    assert ("phase1", metrics(prepared, 2)[-1]["step"]) in digests(prepared)
    assert "nothing is queued" in call("cancel", prepared).stdout


def test_submit_killed_between_two_jobs_leaves_no_duplicates(slurm, prepared, user) -> None:
    real, tmp_path = shutil.which("sbatch"), prepared
    stub = tmp_path / "sbatch"
    stub.write_text(
        f'#!/bin/sh\n{real} "$@"\n[ "$1" != --parsable ] || echo x >>{tmp_path}/n\n'
        f"[ $(cat {tmp_path}/n 2>/dev/null | wc -l) != 2 ] || kill -9 $PPID\n"
    )
    stub.chmod(0o755)
    env = slurm.env | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = ["--run", prepared, "--cluster", SENDER["cluster"], "--nodes", 2, "--hold"]
    killed = call("submit", *words, env=env)
    assert killed.returncode == -signal.SIGKILL
    left = live(slurm)
    assert len(left) == 2
    jobs = sent(prepared, "--nodes", 2, "--hold")
    assert sorted(live(slurm)) == sorted(jobs.values())
    assert not set(left) & set(live(slurm))
    again = sent(prepared, "--nodes", 2, "--hold")
    assert sorted(live(slurm)) == sorted(again.values())
    assert set(jobs.values()).isdisjoint(again.values())
    only = call("cancel", prepared, "squad")
    assert f"scancel {again['finetune']} {again['report']}" in only.stdout
    assert call("cancel", prepared).returncode == 0
    assert not live(slurm)


def test_a_refused_job_leaves_nothing_in_the_queue(slurm, prepared) -> None:
    done = send(prepared, "--nodes", 2, "-p", "finetune=nowhere")
    assert done.returncode == 9
    assert "partition" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not live(slurm)
    assert not (prepared / "jobs.json").exists()
    asked = send(prepared, "--test-only", "--nodes", 2)
    assert asked.stdout.count("to start at") == 4, asked.stdout + asked.stderr
    counts = send(prepared, "--test-only", "--nodes", "1,2,9").stdout.splitlines()
    assert [line.split()[0] for line in counts] == ["nodes", "1", "2", "9"]
    assert "never" in counts[3]
    assert counts[2].split()[1].startswith("20")


def test_a_failure_is_reported_and_not_tried_again(slurm, prepared) -> None:
    """phase 1 diverges: no requeue, what waited for it leaves, the report is made, submit goes on."""
    jobs = sent(prepared, "--set", "phase1.learning_rate=1e30", "--set", "phase1.warmup=0")
    slurm.wait(lambda: slurm.state(jobs["report"]) == "COMPLETED", "the report is made", 90)
    rows = {row["name"]: row for row in json.loads(call("status", prepared, "--json").stdout)["stages"]}
    assert rows["phase1"]["state"] == "failed"
    assert "exit 5" in rows["phase1"]["reason"]
    slurm.wait(lambda: not live(slurm), "what waited for it is gone", 30)
    rows = {row["name"]: row for row in json.loads(call("status", prepared, "--json").stdout)["stages"]}
    assert (rows["phase2"]["state"], rows["phase2"]["reason"]) == ("todo", "not begun: it needs phase1")
    assert (rows["squad"]["state"], rows["report"]["state"]) == ("todo", "done")
    last = call("status", prepared).stdout.splitlines()[-1]
    assert last == f"mend what failed, then go on:  python -m pipeline.submit --run {prepared}"
    assert len(list((prepared / "stages/phase1/attempts").glob("[0-9]*"))) == 1
    again = sent(prepared, "--hold", "--set", "phase1.learning_rate=1e-2", "--set", "phase1.warmup=0.1")
    assert sorted(live(slurm)) == sorted(again.values())


@pytest.mark.parametrize("way", ["files", "MPI"])
def test_data_stages_over_the_tasks_of_srun(slurm, folder, data, reference, user, way) -> None:
    """The same bytes from 2 x 2 tasks as from one process."""
    if way == "MPI" and not importlib.util.find_spec("mpi4py"):
        pytest.skip("NO MPI TEST: mpi4py is not installed (pip install mpi4py mpich)")
    run = folder / f"over {way}"
    cluster = site(user, "")
    if way == "MPI":
        cluster.write_text(cluster.read_text().replace("[data]", '[data]\nsrun_args = ["--mpi=pmi2"]', 1))
    many = ["--nodes", "data=2", "--ntasks-per-node", "data=2", "--stages", DATA_STAGES]
    job = sent(run, "--recipe", SMALL, "--data", data, *many, cluster=cluster)["data"]
    wait_done(slurm, run, job)
    for stage in ("extract", "shard", "samples_64"):
        mine, theirs = (
            {file.name: content(file) for file in (path / "stages" / stage).glob("*") if is_data(file)}
            for path in (run, reference)
        )
        assert mine == theirs, stage
    assert {event["world_size"] for event in RunDir(run).events if event["event"] == "started"} == {4}
    assert len([event for event in RunDir(run).events if event["event"] == "started"]) == 4


def content(file: Path) -> object:
    """Its bytes; of a manifest what it says of the data, and not which Python made them."""
    if file.name != "manifest.json":
        return file.read_bytes()
    return {
        key: value for key, value in json.loads(file.read_bytes()).items() if key not in ("made_by", "manifest_sha256")
    }


def is_data(file: Path) -> bool:
    return (
        file.is_file()
        and file.suffix in (".hdf5", ".h5", ".jsonl", ".txt", ".json")
        and file.name
        not in (
            "done.json",
            "stage.json",
        )
    )
