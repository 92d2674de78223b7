"""A controller that is down, answers that get lost, and what Slurm refuses: one job or none, and one line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from pipeline import submit
from pipeline.run.journal import live_jobs
from pipeline.run.rundir import RunDir
from slurm import queue
from slurm.devcluster import cluster, processes
from slurm.errors import ControllerDown
from support.running import ROOT, SMALL, call, command

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]


@pytest.fixture
def slurm(idle, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_CONF", str(idle.layout.conf))
    return idle


@pytest.fixture
def run(tmp_path: Path, small_data: Path) -> list[object]:
    """The words that name a new run."""
    return ["--recipe", SMALL, "--cluster", "devcluster", "--run", tmp_path / "run", "--data", small_data, "--hold"]


def stop_controller(slurm) -> None:
    controller = processes.recorded(slurm.layout)["slurmctld"]
    processes.kill_all(lambda: [controller] if processes.alive(controller) else [])


def start_controller(slurm) -> None:
    cluster.start_controller(slurm.layout)


@pytest.fixture
def restarted(slurm):
    """A test that stops the controller leaves it up, with nodes that it knows."""
    yield
    cluster.wait_for_nodes(slurm.layout, slurm.layout.node_names)


def live(slurm) -> list[str]:
    return slurm.call("squeue", "-h", "-o", "%A").split()


def test_a_controller_that_comes_back_is_waited_for(slurm, restarted, run) -> None:
    stop_controller(slurm)
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "env": {**os.environ, "PYTHONUNBUFFERED": "1"}}
    with subprocess.Popen(command("submit", *run), text=True, cwd=ROOT, **out) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            if "does not answer" in line and not any("does not answer" in before for before in lines):
                start_controller(slurm)
            lines.append(line)
    said = "".join(lines)
    assert process.returncode == 0, said
    assert "asking again for 1" in said  # of the 120 s
    assert len(live(slurm)) == 4


def test_a_controller_that_stays_down_leaves_nothing_half_done(
    slurm, restarted, run, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(queue.patiently, "__kwdefaults__", {**(queue.patiently.__kwdefaults__ or {}), "patience_s": 3})
    monkeypatch.setattr("sys.argv", ["submit", *map(str, run)])
    stop_controller(slurm)
    try:
        with pytest.raises(ControllerDown, match="gave up after 3 s") as refusal:
            submit.main()
    finally:
        start_controller(slurm)
    assert refusal.value.exit_code == 9
    assert not (tmp_path / "run" / "run.json").exists()
    assert not (tmp_path / "run" / "jobs.json").exists()
    monkeypatch.undo()
    monkeypatch.setenv("SLURM_CONF", str(slurm.layout.conf))
    assert not live_jobs(RunDir(tmp_path / "run"))  # others may be back that it had no time to forget


def test_a_controller_that_goes_down_between_two_jobs(slurm, restarted, run, tmp_path) -> None:
    """What was accepted stays held; the next submit takes it away and sends one chain."""
    pid = processes.recorded(slurm.layout)["slurmctld"]
    real = shutil.which("sbatch")
    stub = f'{real} "$@"; rc=$?; [ "$1" != --parsable ] || {{ kill -9 {pid}; touch {tmp_path}/down; }}; exit $rc'
    env = with_stub(tmp_path, "sbatch", f'[ ! -e {tmp_path}/down ] || exec {real} "$@"\n{stub}')
    back = threading.Thread(target=lambda: (wait_for(tmp_path / "down"), time.sleep(3), start_controller(slurm)))
    back.start()
    done = call("submit", *run, env=env)
    (tmp_path / "down").touch()
    back.join()
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(live(slurm)) == 4


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.05)


def with_stub(folder: Path, name: str, body: str) -> dict[str, str]:
    (folder / "bin").mkdir()
    (folder / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / "bin" / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}"}


@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.chaos)])
def test_an_answer_that_got_lost_never_makes_two_jobs(slurm, run, tmp_path, times: int) -> None:
    """sbatch says that it timed out although each job was accepted."""
    lost = 'echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2; exit 1'
    env = with_stub(tmp_path, "sbatch", f'{shutil.which("sbatch")} "$@"; [ "$1" != --parsable ] || {{ {lost}; }}')
    for _ in range(times):
        done = call("submit", *run, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(live(slurm)) == 4
        slurm.clear()


def test_limits_that_scontrol_does_not_tell_are_said_not_to_be_looked_at(slurm, run, tmp_path) -> None:
    """Where a site keeps them from users; and where a machine has sbatch alone, as far as that goes: --test-only."""
    refuse = f'[ "$3" = partition ] && {{ echo "denied here" >&2; exit 1; }}; exec {shutil.which("scontrol")} "$@"'
    done = call("submit", *run, env=with_stub(tmp_path, "scontrol", refuse))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("the limits of the partitions were not looked at (denied here)\n") == 1
    assert len(live(slurm)) == 4
    slurm.clear()
    (tmp_path / "few").mkdir()
    for name in ("sbatch", "squeue", "sinfo", "scancel", "srun", "git"):
        (tmp_path / "few" / name).symlink_to(str(shutil.which(name)))
    done = call("submit", *run, "--test-only", env={**os.environ, "PATH": str(tmp_path / "few")})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the limits of the partitions were not looked at (no scontrol on PATH)" in done.stdout
    assert done.stdout.count("to start at") == 4


REJECTED = [
    (["-p", "nowhere"], "Invalid partition name", "--partition=nowhere from flag"),
    (["-w", "nowhere"], "Invalid node name", "--nodelist=nowhere from flag"),
    (["-x", "nowhere"], "Invalid node name", "--exclude=nowhere from flag"),
    (["--nodes", "6"], "configuration is not available", "--nodes=6 from flag"),
    (["--mem", "9999999G"], "configuration is not available", "--mem=9999999G from flag"),
    (["-c", "100"], "configuration is not available", "--cpus-per-task=100 from flag"),
    (["--gres", "foo:1"], "gres", "--gres=foo:1 from flag"),
    (["-C", "foo"], "feature", "--constraint=foo from flag"),
    (["--reservation", "foo"], "reservation is invalid", "--reservation=foo from flag"),
    (["-L", "foo:1"], "license", "--licenses=foo:1 from flag"),
    (["--begin", "someday"], "--begin", "--begin=someday from flag"),
    (["--signal", "FOO@2"], "--signal", "--signal=FOO@2 from flag"),
    (["--mail-type", "FOO"], "--mail-type", "--mail-type=FOO from flag"),
    (["--", "--switches=x"], "--switches", "--switches=x after --"),
    (["--tmp", "99999999"], "configuration is not available", "--tmp=99999999 from flag"),
]


@pytest.mark.parametrize(("words", "slurms", "ours"), REJECTED, ids=[" ".join(words) for words, _, _ in REJECTED])
def test_a_rejection_in_slurms_words_and_the_option(slurm, run, tmp_path, words, slurms, ours) -> None:
    """Nothing is begun and no job is left, also where sbatch would take a held job that can never start."""
    done = call("submit", *run, *words)
    assert done.returncode == 9, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1
    assert slurms in done.stderr
    assert re.search(rf"\(.*{re.escape(ours)}.*\)$", done.stderr.strip())
    assert not live(slurm)
    assert not (tmp_path / "run" / "run.json").exists()


def test_nodes_that_are_down_are_waited_for(slurm, run) -> None:
    slurm.call("scontrol", "update", "nodename=test-n04", "state=drain", "reason=test")
    try:
        done = call("submit", *run, "--nodes", 4)
    finally:
        slurm.call("scontrol", "update", "nodename=test-n04", "state=resume")
    assert done.returncode == 0, done.stderr
    assert "pretrain: no nodes for it now, 1 are down or reserved; it waits" in done.stdout
    assert len(live(slurm)) == 4
