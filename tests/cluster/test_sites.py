"""Sites that set Slurm up otherwise: with accounting, and without a warning signal before a preemption."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm import queue
from slurm.devcluster import cluster
from support.running import digests, states
from support.sent_runs import LAST, call, metrics, resumed_at, sent, wait_done

pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.timeout(400)]
WORDS = ["--nodes", 2, "--stages", "phase1"]
SETTINGS = (("KillWait", "2"), ("MinJobAge", "2"), ("SlurmctldParameters", ""))


@pytest.fixture
def site(make_cluster, base: Path, slurm, monkeypatch: pytest.MonkeyPatch, request) -> Iterator[object]:
    made = make_cluster("site", 2, settings=SETTINGS, with_accounting=request.param)
    monkeypatch.setenv("SLURM_CONF", str(made.layout.conf))
    try:
        yield made
    finally:
        cluster.down(base, "site")


@pytest.mark.parametrize("site", [False], indirect=True)
def test_preempted_by_term_alone(site, prepared: Path, reference: Path, tmp_path: Path) -> None:
    """preempt_send_user_signal is not set: ten seconds between TERM and KILL, and still no step is done twice."""
    assert site.words("config")["SlurmctldParameters"] == "(null)"
    job = sent(prepared, *WORDS)["pretrain"]
    site.wait(lambda: len(metrics(prepared, 1)) >= 20, "phase 1 trains", 60)
    site.sbatch("sleep 2", tmp_path, "--partition=high", "--nodes=2", "--exclusive")
    site.wait_state(job, "PENDING", limit_s=40)
    assert "preempted; " in call("status", prepared).stdout
    wait_done(site, prepared, job)
    assert resumed_at(prepared, 2) == metrics(prepared, 1)[-1]["step"]
    assert digests(prepared)[LAST] == digests(reference)[LAST]


@pytest.mark.parametrize("site", [True], indirect=True)
def test_status_of_a_job_that_only_the_accounting_remembers(site, prepared: Path) -> None:
    job = sent(prepared, *WORDS)["pretrain"]
    site.wait(lambda: len(metrics(prepared, 1)) >= 5, "phase 1 trains", 60)
    site.call("scancel", "--signal=KILL", "--full", job)
    site.wait(lambda: job not in queue.jobs([job]), "squeue has forgotten the job", 150)
    assert queue.accounted([job])[job].ended
    assert states(prepared)["phase1"] in ("cancelled", "failed")
