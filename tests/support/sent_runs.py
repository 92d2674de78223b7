"""Runs sent to a real Slurm by whoever SENDER says, and what their folders tell."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.running import ROOT, command

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


def site(user, changes: str) -> Path:
    """A profile like devcluster's with other lines."""
    file = user.home / f"site-{len(list(user.home.iterdir()))}.toml"
    text = user.profile.read_text()
    for line in changes.splitlines():
        text = re.sub(rf"^{line.split()[0]} = .*\n", "", text, flags=re.MULTILINE)
    file.write_text(text.replace("[data]", f"{changes}\n[data]", 1))
    return file


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


def script_pid(job: str) -> int:
    """Process id of a job's batch script: the child of slurmstepd, not what it has started itself."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words, environ = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes().split(b"\0")
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            above = Path("/proc", parent, "comm").read_text()
        except OSError:
            continue
        if b"slurm_script" in words and f"SLURM_JOB_ID={job}".encode() in environ and above.startswith("slurmstepd"):
            return int(entry.name)
    raise AssertionError(f"no batch script of job {job}")
