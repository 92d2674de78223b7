"""A command under guard: its words, its place, how its end is judged; on this machine, cancelled and gone on with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import describe
from pipeline.launch.local import run_chain
from pipeline.node.command import environment, judge, newest
from pipeline.node.device import DEFAULTS
from pipeline.node.job import Job, Topology
from pipeline.node.preempt import StopRequest
from pipeline.run.rundir import RunDir
from support.running import call, command, one_line, states

LOOP = Path(__file__).parents[1] / "support" / "loop.py"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    run = RunDir(tmp_path / "run")
    attempt = run.stage("command").new_attempt("7-0-0")
    return Job(run, "command", attempt, Topology(1, 2, 1, "7-0-0"), workers=1, threads=1)


@pytest.mark.parametrize("asked", [None, "SIGTERM"])
@pytest.mark.parametrize(("code", "means"), [(0, 0), (1, 76), (2, 2), (75, 75), (77, 77), (127, 2), (-9, 76)])
def test_how_a_command_ended(job: Job, code: int, means: int, asked: str | None) -> None:
    """Whatever the code of one that was asked to stop, it is started again."""
    job = Job(**{**vars(job), "stop": StopRequest(reason=asked)})
    if not means and not asked:
        return judge(job, code)
    with pytest.raises(Exception, match=r"rank 1 on .*: the command") as ended:
        judge(job, code)
    assert describe(ended.value)[1] == (75 if asked else means)


def test_the_command_finds_the_users_environment(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    users = {"PYTHONPATH": "/users/own", "HOME": "/users"}
    ours = {"PYTHONPATH": f"{job.run.path}/code/0123:/users/own", "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    found = environment(job, users | DEFAULTS | ours)
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": job.attempt.owner["host"]}
    assert 20_000 <= int(found.pop("MASTER_PORT")) < 32_000
    assert found == {**users, **place, "PYTHONUNBUFFERED": "1"}


def test_what_is_newest(tmp_path: Path) -> None:
    before = newest(tmp_path / "saved")
    (tmp_path / "saved").mkdir()
    assert newest(tmp_path / "saved") == before
    (tmp_path / "saved" / "1.pt").write_text("x")
    assert newest(tmp_path / "saved") != before


def test_another_command_in_run_json_is_not_run(tmp_path: Path) -> None:
    run, scripts = tmp_path / "run", tmp_path / "scripts"
    words = ["--run", run, "--cluster", "devcluster", "--nodes", 2, "--saves", "saved", "--write-scripts", scripts]
    assert call("guard", *words, "--", "echo", "a b", "--saves").returncode == 0
    text = (scripts / "command.sbatch").read_text()
    assert f"arguments=(-m pipeline.worker {run} command -- echo 'a b' --saves)\n" in text
    assert "#SBATCH --nodes=2\n" in text
    settings = json.loads((run / "run.json").read_text())
    settings["recipe"]["command"] = ["touch", str(tmp_path / "planted")]
    (run / "run.json").write_text(json.dumps(settings))
    done = call("worker", run, "command", "--", "echo", "a b", "--saves")
    one_line(done, 2, "run.json: its command is not the one that was sent")
    assert not (tmp_path / "planted").exists()
    one_line(call("report", run), 2, "a run of a command")


@pytest.mark.parametrize("others", ["may write it", "wrote it"])
def test_a_command_that_others_may_have_written_is_not_run(tmp_path: Path, others: str) -> None:
    run, planted = tmp_path / "run", tmp_path / "planted"
    begun = call("guard", "--run", run, "--cluster", "local", "--saves", tmp_path / "saved", "--", "true")
    assert begun.returncode == 0, begun.stdout + begun.stderr
    settings = json.loads((run / "run.json").read_text())
    settings["recipe"]["command"] = ["touch", str(planted)]
    (run / "run.json").write_text(json.dumps(settings))
    if others == "may write it":
        (run / "run.json").chmod(0o664)
    else:
        os.chown(run / "run.json", 12345, -1)
    for module in ("guard", "submit"):
        one_line(call(module, "--run", run, "--remake", "command"), 2, "is another user's, or others may write it")
    assert not planted.exists()
    (run / "run.json").unlink()
    words = ("--cluster", "local", "--saves", tmp_path / "saved", "--", "true")
    assert call("guard", "--run", run, *words).returncode == 0
    assert (run / "run.json").stat().st_mode & 0o777 == 0o644


def test_the_local_runner_starts_the_command_that_it_was_given(tmp_path: Path) -> None:
    run, planted = tmp_path / "run", tmp_path / "planted"
    assert call("guard", "--run", run, "--cluster", "local", "--saves", run, "--", "true").returncode == 0
    settings = json.loads((run / "run.json").read_text())
    settings["recipe"]["command"] = ["touch", str(planted)]
    (run / "run.json").write_text(json.dumps(settings))
    assert run_chain(RunDir(run), {"command": ""}, 1, 1, ("true",)) == 2
    assert not planted.exists()


def test_what_guard_must_be_told(tmp_path: Path) -> None:
    run = ["--run", tmp_path / "run"]
    one_line(call("guard", *run, "--", "true"), 2, "name a --cluster, --saves PATH and, behind --, the command")
    one_line(call("guard", *run, "--cluster", "local", "--", "true"), 2, "--saves PATH is missing")
    one_line(call("guard", *run, "--recipe", "tiny", "--", "true"), 2, "--recipe: no option of guard")


@pytest.mark.slow
def test_a_loop_on_this_machine(tmp_path: Path) -> None:
    run, saved = tmp_path / "run", tmp_path / "step"
    words = ["guard", "--run", run, "--cluster", "local", "--processes", 2, "--saves", saved]
    words += ["--", sys.executable, LOOP, 40, saved]
    with subprocess.Popen(command(*map(str, words))) as begun:
        until = time.monotonic() + 60
        while not Path(f"{saved}-0").exists() and time.monotonic() < until:
            time.sleep(0.05)
        assert "asked to stop" in call("cancel", run).stdout
    assert begun.returncode == 75
    assert int(Path(f"{saved}-0").read_text()) < 40
    assert states(run) == {"command": "cancelled"}
    done = call(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {Path(f"{saved}-{rank}").read_text() for rank in (0, 1)} == {"40"}
    log = call("status", run, "--log", "command").stdout
    assert "goes on at 0" not in log
    assert "rank 0 of 2 finished at 40" in log
