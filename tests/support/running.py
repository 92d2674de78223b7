"""Running pipeline commands as a user does: whole, or in the background to be watched and disturbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SMALL = Path(__file__).parents[1] / "e2e" / "small.toml"
ROOT = Path(__file__).parents[2]
TWO_PHASES = str(Path(__file__).with_name("two_phases.toml"))


def command(module: str, *words: object) -> list[str]:
    return [sys.executable, "-m", f"pipeline.{module}", *map(str, words)]


def call(module: str, *words: object, cwd: Path = ROOT, **options: object) -> subprocess.CompletedProcess[str]:
    """A pipeline command run to its end."""
    return subprocess.run(command(module, *words), capture_output=True, text=True, check=False, cwd=cwd, **options)


def submit(run: Path, data: Path, *words: object) -> subprocess.CompletedProcess[str]:
    return call("submit", "--recipe", SMALL, "--cluster", "local", "--run", run, "--data", data, *words)


def one_line(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """The exit code, no traceback, and one line that says it all."""
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if all(word in line for word in words)]
    assert len(lines) == 1, done.stderr


def states(run: Path) -> dict[str, str]:
    return {row["name"]: row["state"] for row in json.loads(call("status", run, "--json").stdout)["stages"]}


def digests(run: Path) -> dict[tuple[str, int], str]:
    """Digest of weights and optimizer by stage and step, all verified."""
    found = json.loads(call("checkpoints", run, "--json", "--verify").stdout)["checkpoints"]
    assert all(entry["verified"] for entry in found)
    return {(entry["stage"], entry["step"]): entry["digest"] for entry in found}


class Background:
    """A submit in the background that a test watches and disturbs."""

    def __init__(self, run: Path, data: Path, *words: object) -> None:
        self.run = run
        self.process = subprocess.Popen(
            command("submit", "--recipe", SMALL, "--cluster", "local", "--run", run, "--data", data, *words),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            start_new_session=True,
        )

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, self.process.stdout.read() if self.process.stdout else ""
            assert time.monotonic() < deadline, "the condition did not come true in time"
            time.sleep(0.01)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def end(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=180)
        return self.process.returncode, output


def children_of(pid: int) -> list[int]:
    """Process ids of the direct children, from /proc."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[1]) == pid:
                found.append(int(entry.name))
    return found
