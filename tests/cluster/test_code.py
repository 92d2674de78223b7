"""The jobs of a chain run the run's own copy of the code, and a changed copy starts nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.sent_runs import LONG, metrics, rank_pid, said, sent

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]


def test_a_rank_runs_the_copy(slurm, prepared: Path) -> None:
    """What it has imported lies in the copy, though it works in the checkout."""
    job = sent(prepared, "--nodes", 2, "--stages", "phase1", *LONG)["pretrain"]
    slurm.wait(lambda: len(metrics(prepared, 1)) >= 2, "phase 1 trains", 90)
    environ = Path(f"/proc/{rank_pid(prepared, 1)}/environ").read_bytes().split(b"\0")
    (copy,) = (prepared / "code").iterdir()
    assert f"PYTHONPATH={copy}".encode() in [line.partition(b":")[0] for line in environ]
    assert b"PYTHONSAFEPATH=1" in environ
    slurm.call("scancel", job)
    slurm.wait_state(job, "CANCELLED")
    assert not list(copy.rglob("__pycache__"))


def test_a_changed_copy_ends_the_job(slurm, prepared: Path) -> None:
    job = sent(prepared, "--nodes", 2, "--stages", "phase1", "--hold", *LONG)["pretrain"]
    (copy,) = (prepared / "code").iterdir()
    (copy / "pipeline" / "added.py").write_text("")
    slurm.call("scontrol", "release", job)
    slurm.wait_state(job, "FAILED")
    assert slurm.words("job", job)["ExitCode"] == "7:0"
    assert len(re.findall(r"code/\w{64}: missing, or changed since this job was sent", said(prepared))) == 1
    assert metrics(prepared, 1) == []
    again = sent(prepared, "--nodes", 2, "--stages", "phase1", *LONG)["pretrain"]  # made anew from the same code
    slurm.wait(lambda: len(metrics(prepared, 1)) >= 2, "phase 1 trains", 90)
    slurm.call("scancel", again)
    slurm.wait_state(again, "CANCELLED")
