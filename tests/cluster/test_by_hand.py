"""Stages started by hand: ``sbatch slurm/stage.sbatch RUN STAGE``, and ``srun`` inside ``salloc``."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.running import ROOT, SMALL, digests, states
from support.sent_runs import LAST, call, metrics, resumed_at, said

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]


@pytest.fixture
def who(slurm, user) -> dict[str, object]:
    """The ordinary user, and the Python that this user may run."""
    return {"user": user.uid, "SLURM_CONF": str(slurm.layout.conf), "PYTHON": user.python}


def test_a_phase_by_hand(slurm, prepared, reference, user, who) -> None:
    """Begun by ``sbatch slurm/stage.sbatch RUN STAGE``, known to status and cancel; ended by ``srun`` in ``salloc``."""
    words = ["--parsable", "--nodes=2", f"--output={prepared}/%j.out", f"--chdir={ROOT}", "slurm/stage.sbatch"]
    inside = {
        "SLURM_NTASKS": "1",
        "SLURM_NPROCS": "1",
        "SLURM_TRES_PER_TASK": "gres/gpu=1",
        "MASTER_ADDR": "login",
        "SQUEUE_FORMAT": "%i",
    }  # of an salloc -n1 --gpus-per-task=1
    job = slurm.call("sbatch", *words, str(prepared), "phase1", **who, **inside)
    slurm.wait(lambda: len(metrics(prepared, 1)) >= 20, "phase 1 trains", 60)
    assert states(prepared)["phase1"] == "running"
    cancelled = slurm.call(
        user.python, "-m", "pipeline.cancel", str(prepared), PYTHONPATH=f"{ROOT}:{user.packages}", **who
    )
    assert f"cancelled phase1 (job {job}); it saves first" in cancelled
    slurm.wait_state(job, "CANCELLED")
    alloc = ["salloc", "--nodes=2", "srun", "--ntasks-per-node=1", "--overcommit", f"--chdir={ROOT}"]
    slurm.call(*alloc, user.python, "-m", "pipeline.worker", str(prepared), "phase1", timeout_s=90, **who)
    assert resumed_at(prepared, 2) == metrics(prepared, 1)[-1]["step"]
    assert digests(prepared)[LAST] == digests(reference)[LAST]


@pytest.mark.chaos
@pytest.mark.parametrize("way", ["sbatch", "salloc"])
def test_every_stage_by_hand(slurm, folder: Path, data: Path, user, who, small_run, way: str) -> None:
    """The whole chain, a job or a step for each stage, on two nodes: what the local runner gives."""
    run = folder / f"by {way}"
    words = ["--run", run, "--recipe", SMALL, "--cluster", user.profile, "--nodes", 2, "--data", data]
    begun = call("submit", *words, "--write-scripts", run / "scripts")
    assert begun.returncode == 0, begun.stderr
    stages = list(states(run))
    if way == "sbatch":
        job = ""
        for stage in stages:
            flags = ["--parsable", "--nodes=2", f"--output={run}/logs/%j.out", f"--chdir={ROOT}"]
            flags += [f"--dependency=afterok:{job}"] if job else []
            job = slurm.call("sbatch", *flags, "slurm/stage.sbatch", str(run), stage, **who)
        slurm.wait(lambda: slurm.state(job) in ("COMPLETED", "FAILED"), "the last stage has ended", 300)
    else:
        step = 'srun --ntasks-per-node=1 --overcommit "$PYTHON" -m pipeline.worker "$0" "$stage" || exit'
        loop = f"cd {ROOT}; for stage in $*; do {step}; done"
        slurm.call("salloc", "--nodes=2", "bash", "-c", loop, str(run), *stages, timeout_s=300, **who)
    assert set(states(run).values()) == {"done"}, said(run)
    assert digests(run) == digests(small_run)
