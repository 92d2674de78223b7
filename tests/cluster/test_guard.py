"""Somebody's own loop under ``pipeline.guard`` on a real Slurm: preempted, its node killed, finished all the same."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
import submitit

from pipeline.errors import ConfigError
from pipeline.launch import launch
from slurm.devcluster import cluster
from support.running import ROOT, states
from support.running import call as call_here
from support.sent_runs import SENDER, call, said

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]
LOOP = Path(__file__).parents[1] / "support" / "loop.py"


def test_a_loop_through_preemption_and_a_killed_node(slurm, folder: Path, user, tmp_path: Path) -> None:
    run, loop = folder / "loop", folder / "loop.py"
    (folder / "saved").mkdir()
    loop.write_text(LOOP.read_text())
    user.give(folder)
    at_home = {"cwd": folder, "env": os.environ | {"PYTHONPATH": f"{ROOT}:{user.packages}"}}
    words = ["--run", run, "--cluster", SENDER["cluster"], "--nodes", 2, "--saves", "saved"]
    done = call("guard", *words, "--", user.python, "loop.py", 200, "saved/step", **at_home)
    assert done.returncode == 0, done.stdout + done.stderr
    (job,) = (sent["id"] for sent in json.loads((run / "jobs.json").read_text())["jobs"])

    def attempts() -> list[str]:
        return re.findall(r"rank 0 of 2 goes on at (\d+)", said(run))

    slurm.wait(lambda: attempts() and (folder / "saved/step-0").exists(), "the loop saves", 60)
    slurm.sbatch("sleep 2", tmp_path, "--partition=high", "--nodes=4", "--exclusive")
    slurm.wait_state(job, "PENDING", limit_s=40)
    assert "preempted" in call("status", run).stdout
    slurm.wait(lambda: len(attempts()) == 2, "the loop goes on", 60)
    assert f"rank 0 of 2 stopped at {attempts()[1]}\n" in said(run), "it saved where it was stopped"
    node = slurm.words("job", job)["BatchHost"]
    cluster.kill(slurm.layout, node)
    try:
        slurm.wait(lambda: len(attempts()) == 3, "the loop goes on without the node", 90)
        assert int(attempts()[2]) >= int(attempts()[1])
        assert node not in slurm.words("job", job)["NodeList"]
        assert f"preempted, lost node {node}" in call("status", run).stdout
        slurm.wait(lambda: slurm.state(job) in ("COMPLETED", "FAILED"), f"{job} has ended", 90)
        assert states(run) == {"command": "done"}, said(run)
        assert len(re.findall("finished at 200", said(run))) == 2
        assert "\x1b" not in said(run)  # no terminal: neither ours nor anybody's bars are drawn into the log
    finally:
        cluster.heal(slurm.layout, node)
    assert "everything is done" in call("guard", "--run", run, **at_home).stdout


def test_launch_gives_submitits_jobs(slurm, tmp_path: Path) -> None:
    """The text is that of --write-scripts, byte for byte; nothing is pickled, and what was planted is not read."""
    run, scripts, saved = tmp_path / "run", tmp_path / "scripts", tmp_path / "step"
    words = ["--run", run, "--cluster", "devcluster", "--nodes", 2, "--saves", saved, "--write-scripts", scripts]
    assert call_here("guard", *words, "--", sys.executable, LOOP, 40, saved).returncode == 0
    (job,) = launch(run, nodes=2, time="0:10:00", replace=False)
    assert isinstance(job, submitit.SlurmJob)
    slurm.wait(lambda: "rank 0 of 2 goes on at 0" in (job.stdout() or ""), "the loop runs")
    assert job.state == "RUNNING"
    job.cancel()
    job.wait()
    assert job.state == "CANCELLED"
    (again,) = launch(run)
    assert (run / "jobs/command.sbatch").read_bytes() == (scripts / "command.sbatch").read_bytes()
    again.wait()
    assert (again.state, again.done()) == ("COMPLETED", True)
    assert "rank 1 of 2 finished at 40" in again.stdout()
    assert not list(run.rglob("*.pkl"))
    again.paths.result_pickle.write_bytes(b"cposix\nsystem\n(S'touch planted'\ntR.")
    for unpickled in (again.result, again.results, again.exception, again.submission):
        with pytest.raises(ConfigError, match="has no pickles"):
            unpickled()
    assert launch(run) == []
    with pytest.raises(ConfigError, match="launch sends to Slurm"):
        launch(run, dry_run=True)
