"""Nodes that cannot do their part: nothing starts on one, the prolog of one fails; the job goes on without them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm import queue, script
from slurm.devcluster import cluster, processes
from slurm.flags import Setting
from slurm.resources import Resources
from slurm.script import Script
from support.running import states
from support.sent_runs import call, said, sent, wait_done

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]


def test_a_node_on_which_nothing_starts_is_left_out(idle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program's folder is empty on one node, as where a mount is missing: tried, found, gone on without it."""
    monkeypatch.setenv("SLURM_CONF", str(idle.layout.conf))
    program, empty = tmp_path / "bin" / "program", tmp_path / "empty"
    program.parent.mkdir()
    empty.mkdir()
    program.write_text("#!/bin/sh\n[ $# = 0 ] && echo on $(hostname) || echo 1.0\n")
    program.chmod(0o755)
    job = Script(
        resources=Resources(nodes=(3, 3), time_min=5),
        settings={"requeue": Setting("", "flag"), "nodelist": Setting("test-n[01-03]", "flag")},
        program=[str(program)],
        arguments=[],
        log_dir=str(tmp_path),
        state_dir=str(tmp_path / "jobs"),
    )
    (tmp_path / "job.sbatch").write_text(script.render(job))
    slurmd = processes.recorded(idle.layout)["slurmd-test-n02"]
    there = ["nsenter", f"--target={slurmd}", "--mount"]
    subprocess.run([*there, "mount", "--bind", empty, program.parent], check=True)
    try:
        sent_as = queue.submit(tmp_path / "job.sbatch", tag="-")
        idle.wait(lambda: idle.state(sent_as) in ("COMPLETED", "FAILED"), "the job has ended", 60)
    finally:
        subprocess.run([*there, "umount", program.parent], check=True)
    log = (tmp_path / f"{sent_as}.out").read_text()
    assert idle.state(sent_as) == "COMPLETED", log
    assert "attempt 0: the program does not start on test-n02\n" in log
    first, second = log.split("attempt 0: code 76, requeued\n")
    assert sorted(re.findall(r"^on (.+)$", second, re.MULTILINE)) == ["test-n01", "test-n03"], first


@pytest.fixture
def strict(make_cluster, base: Path, slurm, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A cluster of three nodes that runs a prolog before each job; on its first node the prolog fails."""
    prolog = slurm.layout.state / "prolog"
    prolog.write_text('#!/bin/sh\ntest "$SLURMD_NODENAME" != strict-n01\n')
    prolog.chmod(0o755)
    made = make_cluster("strict", 3, settings=(("Prolog", str(prolog)), ("KillWait", "2")))
    monkeypatch.setenv("SLURM_CONF", str(made.layout.conf))
    try:
        yield made
    finally:
        cluster.down(base, "strict")


@pytest.mark.chaos
def test_a_prolog_that_fails(strict, prepared: Path) -> None:
    """Slurm drains the node and holds the job; status says so; a second submit sends the job to other nodes."""
    words = ["--nodes", 2, "--stages", "phase1", "--set", "phase1.steps=40"]
    job = sent(prepared, *words)["pretrain"]
    strict.wait(lambda: "drain" in strict.call("sinfo", "-h", "-n", "strict-n01", "-o", "%T"), "the node is drained")
    strict.wait_state(job, "PENDING")
    told = call("status", prepared).stdout
    assert states(prepared)["phase1"] == "waiting"
    assert "held by Slurm after a failed launch" in told, told
    again = sent(prepared, *words)["pretrain"]
    assert again != job
    wait_done(strict, prepared, again)
    assert strict.words("job", again)["NodeList"] == "strict-n[02-03]"
    assert states(prepared)["phase1"] == "done", said(prepared)
