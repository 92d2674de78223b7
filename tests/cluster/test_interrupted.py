"""Training on a real Slurm, preempted, killed or given other nodes: it goes on, and the weights do not notice."""

from __future__ import annotations

import json
import os
import signal

import pytest

from pipeline.run.rundir import RunDir
from support.running import digests, states
from support.sent_runs import LAST, call, metrics, rank_pid, resumed_at, said, script_pid, sent, site, wait_done

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]


def test_preempted_and_resumed_by_itself(slurm, prepared, reference, tmp_path) -> None:
    """A job of higher priority takes all nodes: nothing trained is lost, and the weights are the same.

    So it is after somebody's signal and after a requeue by hand, and status tells the three apart.
    """
    job = sent(prepared, "--nodes", 2, "--stages", "phase1")["pretrain"]
    slurm.wait(lambda: len(metrics(prepared, 1)) >= 20, "phase 1 trains", 60)
    slurm.sbatch("sleep 2", tmp_path, "--partition=high", "--nodes=4", "--exclusive")
    slurm.wait_state(job, "PENDING", limit_s=40)
    assert states(prepared)["phase1"] == "waiting"
    assert "preempted; " in call("status", prepared).stdout
    for attempt, stop in ((2, ("scancel", "--signal=TERM")), (3, ("scontrol", "requeue"))):
        slurm.wait(lambda n=attempt: len(metrics(prepared, n)) >= 20, f"attempt {attempt} trains", 60)
        slurm.call(*stop, job)
    slurm.wait(lambda: metrics(prepared, 4), "attempt 4 trains", 60)
    assert "preempted, stopped by a signal, requeued by hand, " in call("status", prepared).stdout
    wait_done(slurm, prepared, job)
    for attempt in (1, 2, 3):
        steps = metrics(prepared, attempt)[-1]["step"]
        assert steps < 400
        assert resumed_at(prepared, attempt + 1) == steps
    assert digests(prepared)[LAST] == digests(reference)[LAST]


def test_a_killed_rank_is_started_again_by_itself(slurm, prepared, reference) -> None:
    job = sent(prepared, "--nodes", 2, "--stages", "phase1")["pretrain"]
    slurm.wait(lambda: len(metrics(prepared, 1)) >= 20, "phase 1 trains", 60)
    os.kill(rank_pid(prepared, 1), signal.SIGKILL)
    wait_done(slurm, prepared, job)
    assert digests(prepared)[LAST] == digests(reference)[LAST]
    assert "requeued" in said(prepared)


def test_a_killed_batch_script_does_not_end_the_chain(slurm, prepared, reference) -> None:
    """The step beside it has the job queued again while Slurm ends it; the whole chain follows, and nothing is left."""
    jobs = sent(prepared, "--nodes", 2)
    slurm.wait(lambda: len(metrics(prepared, 1)) >= 30, "phase 1 trains past a checkpoint", 60)
    os.kill(script_pid(jobs["pretrain"]), signal.SIGKILL)
    slurm.wait(lambda: len(metrics(prepared, 2)) >= 1, "the second attempt trains", 60)
    rows = {row["name"]: row for row in json.loads(call("status", prepared, "--json").stdout)["stages"]}
    assert (rows["phase1"]["state"], rows["phase1"]["job"]) == ("running", jobs["pretrain"])
    assert f"lost its batch script, resumed at step {resumed_at(prepared, 2)}" in rows["phase1"]["reason"]
    assert resumed_at(prepared, 2) >= 20
    slurm.wait(lambda: slurm.state(jobs["report"]) in ("COMPLETED", "FAILED", "CANCELLED"), "the report is made", 150)
    assert set(states(prepared).values()) == {"done"}, said(prepared)
    assert digests(prepared)[LAST] == digests(reference)[LAST]
    assert "attempt 1: the batch script of the attempt before was killed; queued again" in said(prepared)
    assert not slurm.call("squeue", "-h")


def test_a_killed_batch_script_that_may_not_be_requeued_is_told(slurm, prepared, user) -> None:
    job = sent(prepared, "--nodes", 2, "--stages", "phase1", cluster=site(user, "requeue = false"))["pretrain"]
    slurm.wait(lambda: len(metrics(prepared, 1)) >= 5, "phase 1 trains", 60)
    os.kill(script_pid(job), signal.SIGKILL)
    slurm.wait_state(job, "FAILED")
    rows = {row["name"]: row for row in json.loads(call("status", prepared, "--json").stdout)["stages"]}
    assert (rows["phase1"]["state"], rows["phase1"]["reason"]) == ("failed", "failed: its batch script was killed")


def test_four_nodes_then_three_while_the_old_job_is_pending(slurm, prepared, reference) -> None:
    """The same samples in every step: losses equal up to the order of sums."""
    old = sent(prepared, "--nodes", 4, "--stages", "phase1")["pretrain"]
    slurm.wait(lambda: len(metrics(prepared, 1)) >= 20, "phase 1 trains", 60)
    slurm.call("scontrol", "requeue", old)
    slurm.wait_state(old, "PENDING")
    new = sent(prepared, "--nodes", 3, "--stages", "phase1")["pretrain"]
    assert slurm.state(old) == "CANCELLED"
    wait_done(slurm, prepared, new)
    losses = {line["step"]: line["loss"] for attempt in (1, 2) for line in metrics(prepared, attempt)}
    assert len(losses) == 400
    for line in metrics(reference, 1)[:100]:
        assert losses[line["step"]] == pytest.approx(line["loss"], rel=1e-5)


def test_spare_jobs_go_on_where_preemption_cancels(slurm, prepared, reference, user, tmp_path) -> None:
    cluster = site(user, "requeue = false\nspares = 2")
    words = ["--nodes", 2, "--stages", "phase1", "-p", "spot"]
    jobs = sent(prepared, *words, cluster=cluster)
    assert list(jobs) == ["pretrain", "pretrain-2", "pretrain-3"]
    slurm.wait(lambda: len(metrics(prepared, 1)) >= 20, "phase 1 trains", 60)
    slurm.sbatch("sleep 2", tmp_path, "--partition=high", "--nodes=4", "--exclusive")
    wait_done(slurm, prepared, jobs["pretrain-2"])
    assert slurm.state(jobs["pretrain"]) in ("FAILED", "PREEMPTED")
    slurm.wait_state(jobs["pretrain-3"], "CANCELLED")
    assert resumed_at(prepared, 2) == metrics(prepared, 1)[-1]["step"]
    assert digests(prepared)[LAST] == digests(reference)[LAST]


def test_a_range_of_nodes_takes_what_there_is(slurm, prepared, reference, tmp_path) -> None:
    """Starts on four; a job of higher priority takes two of them and keeps them; goes on with the other two."""
    job = sent(prepared, "--nodes", "2-4", "--stages", "phase1")["pretrain"]
    slurm.wait(lambda: len(metrics(prepared, 1)) >= 20, "phase 1 trains", 60)
    other = slurm.sbatch("sleep 300", tmp_path, "--partition=high", "--nodes=2", "--exclusive")
    wait_done(slurm, prepared, job)
    slurm.call("scancel", other)
    started = [event["world_size"] for event in RunDir(prepared).events if event["event"] == "started"]
    assert started[-2:] == [4, 2]
    losses = {line["step"]: line["loss"] for attempt in (1, 2) for line in metrics(prepared, attempt)}
    for line in metrics(reference, 1)[:100]:
        assert losses[line["step"]] == pytest.approx(line["loss"], rel=1e-5)
