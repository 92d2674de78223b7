"""The chain on a real Slurm: sent, preempted, killed, resized, taken over, cancelled; the weights do not notice."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import running
from pipeline.rundir import RunDir
from running import ROOT, SMALL, command, digests, states
from slurm import queue

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]
DATA_STAGES = "extract,shard,vocab,samples_64"
LONG = [
    w for value in ("phase1.steps=400", "train.eval_every=400", "train.checkpoint_every=20") for w in ("--set", value)
]
LAST = ("phase1", 400)
SENDER: dict[str, Any] = {"python": sys.executable, "options": {}}  # who runs our commands, and by which Python


def call(module: str, *words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    argv = [SENDER["python"], *command(module, *words)[1:]]
    options = {"cwd": ROOT, "capture_output": True, "text": True, "check": False} | SENDER["options"] | options
    return subprocess.run(argv, **options)


@pytest.fixture
def slurm(idle, user, monkeypatch: pytest.MonkeyPatch):
    """The cluster, and every command that a test starts talking to it, sent by an ordinary user."""
    monkeypatch.setenv("SLURM_CONF", str(idle.layout.conf))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HOME", str(user.home))
    monkeypatch.setenv("PYTHONPATH", user.packages)
    monkeypatch.setitem(SENDER, "python", user.python)
    monkeypatch.setitem(SENDER, "options", user.options)
    monkeypatch.setitem(SENDER, "cluster", user.profile)
    return idle


@pytest.fixture(scope="module")
def folder(user) -> Path:
    made = user.home / "sent"
    made.mkdir()
    user.give(made)
    return made


@pytest.fixture(scope="module")
def data(folder: Path, small_data: Path, user) -> Path:
    """The small corpora where an ordinary user may read them."""
    shutil.copytree(small_data, folder / "data")
    user.give(folder / "data")
    return folder / "data"


@pytest.fixture(scope="module")
def reference(folder: Path, data: Path) -> Path:
    """A longer phase 1, undisturbed, on this machine with two processes."""
    run = folder / "reference"
    words = ["--recipe", SMALL, "--cluster", "local", "--run", run, "--data", data]
    done = running.call("submit", *words, *LONG, "--stages", f"{DATA_STAGES},phase1")
    assert done.returncode == 0, done.stdout + done.stderr
    return run


@pytest.fixture
def prepared(reference: Path, user, request: pytest.FixtureRequest) -> Path:
    """A run whose data stages are done."""
    run = reference.parent / request.node.name
    shutil.copytree(reference, run, symlinks=True, ignore=lambda _, names: [n for n in names if n == "phase1"])
    user.give(run)
    return run


def send(run: Path, *words: object, cluster: object = None) -> subprocess.CompletedProcess[str]:
    return call("submit", "--run", run, "--cluster", cluster or SENDER["cluster"], *words)


def sent(run: Path, *words: object, cluster: object = None) -> dict[str, str]:
    """Submit; job ids by name."""
    done = send(run, *words, cluster=cluster)
    assert done.returncode == 0, done.stdout + done.stderr
    return {job["name"]: job["id"] for job in json.loads((run / "jobs.json").read_text())["jobs"]}


def metrics(run: Path, attempt: int) -> list[dict]:
    path = run / "stages" / "phase1" / "attempts" / f"{attempt:04d}" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in map(json.loads, lines) if "loss" in line]


def said(run: Path) -> str:
    return "".join(path.read_text() for path in sorted((run / "logs").glob("*.out")))


def wait_done(slurm, run: Path, job: str, limit_s: float = 90) -> None:
    slurm.wait(lambda: slurm.state(job) in ("COMPLETED", "FAILED", "CANCELLED"), f"{job} has ended", limit_s)
    assert slurm.state(job) == "COMPLETED", said(run)


def resumed_at(run: Path, attempt: int) -> int:
    found = json.loads((run / "stages/phase1/attempts" / f"{attempt:04d}" / "attempt.json").read_text())
    return found["resumed_from"]["step"]


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


def test_preempted_and_resumed_by_itself(slurm, prepared, reference, tmp_path) -> None:
    """A job of higher priority takes all nodes: nothing trained is lost, and the weights are the same."""
    job = sent(prepared, "--nodes", 2, "--stages", "phase1")["pretrain"]
    slurm.wait(lambda: len(metrics(prepared, 1)) >= 20, "phase 1 trains", 60)
    slurm.sbatch("sleep 2", tmp_path, "--partition=high", "--nodes=4", "--exclusive")
    slurm.wait_state(job, "PENDING", limit_s=40)
    assert states(prepared)["phase1"] == "waiting"
    wait_done(slurm, prepared, job)
    steps = metrics(prepared, 1)[-1]["step"]
    assert steps < 400
    assert resumed_at(prepared, 2) == steps
    assert digests(prepared)[LAST] == digests(reference)[LAST]


def test_a_killed_rank_is_started_again_by_itself(slurm, prepared, reference) -> None:
    job = sent(prepared, "--nodes", 2, "--stages", "phase1")["pretrain"]
    slurm.wait(lambda: len(metrics(prepared, 1)) >= 20, "phase 1 trains", 60)
    os.kill(rank_pid(prepared, 1), signal.SIGKILL)
    wait_done(slurm, prepared, job)
    assert digests(prepared)[LAST] == digests(reference)[LAST]
    assert "requeued" in said(prepared)


def rank_pid(run: Path, rank: int) -> int:
    """Process id of a rank of the run's training: the child that trains, not its parent that watches it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words, environ = (entry / "cmdline").read_bytes().split(b"\0"), (entry / "environ").read_bytes()
        except OSError:
            continue
        mine = b"pipeline.worker" in words and str(run).encode() in words
        if mine and b"python" in words[0] and f"SLURM_PROCID={rank}".encode() in environ.split(b"\0"):
            found.append(int(entry.name))
    assert found, f"no rank {rank} of {run}"
    return max(found)


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


def test_a_failure_is_reported_and_not_tried_again(slurm, prepared) -> None:
    """phase 1 diverges: no requeue, its children never start, the report is made, submit takes the stuck ones over."""
    jobs = sent(prepared, "--set", "phase1.learning_rate=1e30", "--set", "phase1.warmup=0")
    slurm.wait(lambda: slurm.state(jobs["report"]) == "COMPLETED", "the report is made", 90)
    rows = {row["name"]: row for row in json.loads(call("status", prepared, "--json").stdout)["stages"]}
    assert rows["phase1"]["state"] == "failed"
    assert "exit 5" in rows["phase1"]["reason"]
    assert rows["squad"]["state"] == "waiting"
    assert "can never start" in rows["squad"]["reason"]
    assert len(list((prepared / "stages/phase1/attempts").iterdir())) == 1
    again = sent(prepared, "--hold", "--set", "phase1.learning_rate=1e-2", "--set", "phase1.warmup=0.1")
    assert sorted(live(slurm)) == sorted(again.values())


def site(user, changes: str) -> Path:
    """A profile like devcluster's with other lines."""
    file = user.home / f"site-{len(list(user.home.iterdir()))}.toml"
    text = user.profile.read_text()
    for line in changes.splitlines():
        text = re.sub(rf"^{line.split()[0]} = .*\n", "", text, flags=re.MULTILINE)
    file.write_text(text.replace("[data]", f"{changes}\n[data]", 1))
    return file


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


def test_stages_by_hand(slurm, prepared, reference, user) -> None:
    """Begun by ``sbatch slurm/stage.sbatch RUN STAGE``, ended by ``srun`` inside ``salloc``."""
    who = {"user": user.uid, "SLURM_CONF": str(slurm.layout.conf), "PYTHON": user.python}
    words = ["--parsable", "--nodes=2", f"--output={prepared}/%j.out", f"--chdir={ROOT}", "slurm/stage.sbatch"]
    job = slurm.call("sbatch", *words, str(prepared), "phase1", **who)
    slurm.wait(lambda: len(metrics(prepared, 1)) >= 20, "phase 1 trains", 60)
    slurm.call("scancel", job)
    slurm.wait_state(job, "CANCELLED")
    alloc = ["salloc", "--nodes=2", "srun", "--ntasks-per-node=1", "--overcommit", f"--chdir={ROOT}"]
    slurm.call(*alloc, user.python, "-m", "pipeline.worker", str(prepared), "phase1", timeout_s=90, **who)
    assert resumed_at(prepared, 2) == metrics(prepared, 1)[-1]["step"]
    assert digests(prepared)[LAST] == digests(reference)[LAST]


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
            {file.name: file.read_bytes() for file in (path / "stages" / stage).glob("*") if is_data(file)}
            for path in (run, reference)
        )
        assert mine == theirs, stage
    assert {event["world_size"] for event in RunDir(run).events if event["event"] == "started"} == {4}
    assert len([event for event in RunDir(run).events if event["event"] == "started"]) == 4


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


@pytest.mark.chaos
def test_stops_when_its_gpu_hours_are_spent(slurm, prepared, user) -> None:
    """0.05 GPU-hours are 90 s of two GPUs: saved half a minute before, ended with 2, refused when sent again."""
    cluster = site(user, "gpus_per_node = 1")
    words = ["--nodes", 2, "--stages", "phase1", "--set", "phase1.steps=100000", "--set", "phase1.warmup=0.01"]
    job = sent(prepared, *words, "--max-gpu-hours", "0.05", cluster=cluster)["pretrain"]
    slurm.wait(lambda: slurm.state(job) in ("FAILED", "COMPLETED"), "the job has ended", 120)
    assert queue.details(job)["ExitCode"] == "2:0"
    assert "the 3 GPU-minutes that --max-gpu-hours allows are used up; not started again" in said(prepared)
    assert ("phase1", metrics(prepared, 1)[-1]["step"]) in digests(prepared)
    again = send(prepared, *words, cluster=cluster)
    assert again.returncode == 2
    assert "GPU-hours are spent, --max-gpu-hours allows 0.05" in again.stderr


@pytest.mark.chaos
def test_stops_before_the_time_limit_and_goes_on(slurm, prepared) -> None:
    """A limit of one minute: each attempt saves half a minute before it and asks for the next one."""
    words = [
        "--nodes",
        2,
        "--stages",
        "phase1",
        "-t",
        "1",
        "--set",
        "phase1.steps=100000",
        "--set",
        "phase1.warmup=0.01",
    ]
    job = sent(prepared, *words)["pretrain"]
    slurm.wait(lambda: len(metrics(prepared, 2)) >= 5, "the second attempt trains", 110)
    assert "before the time limit" in said(prepared) or "by another rank" in said(prepared)
    assert resumed_at(prepared, 2) == metrics(prepared, 1)[-1]["step"]
    assert slurm.state(job) == "RUNNING"
