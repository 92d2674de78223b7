"""The processes of a developer cluster: recorded when they start, found again whatever happened."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from slurm.command import run, which
from slurm.devcluster.layout import Layout
from slurm.errors import SlurmError

OWNER = "SLURM_DEVCLUSTER_DAEMON"  # in the environment of every daemon: the cluster's state folder


def must(argv: Sequence[str], *, timeout_s: float = 30.0, env: Mapping[str, str] | None = None) -> str:
    """Run ``argv`` and return its stdout; SlurmError with the command's own words when it fails."""
    answer = run(argv, timeout_s=timeout_s, env=env)
    if not answer.ok:
        raise SlurmError(f"{' '.join(argv)}: {answer.said}")
    return answer.out


def start(layout: Layout, role: str, argv: Sequence[str], env: Mapping[str, str] | None = None) -> int:
    """Start a daemon in the foreground of a session of its own; its pid is on disk before this returns it."""
    program = which(argv[0])
    if program is None:
        raise SlurmError(f"{argv[0]}: not installed")
    with open(layout.state / "log" / f"start-{role}.log", "ab") as log:
        process = subprocess.Popen(
            [program, *argv[1:]],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=daemon_environment(layout) | dict(env or {}),
            cwd=layout.state,
            start_new_session=True,
        )
    with open(layout.state / "pids", "a") as pids:
        pids.write(f"{role} {process.pid} {_start_time(process.pid)}\n")
    process.returncode = 0  # it outlives us on purpose: Python need not warn that it still runs
    return process.pid


def daemon_environment(layout: Layout) -> dict[str, str]:
    """A small environment: nothing of the caller's Slurm settings may reach the daemons."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"))
    return {"PATH": path, "LC_ALL": "C.UTF-8", "SLURM_CONF": str(layout.conf), OWNER: str(layout.state)}


def recorded(layout: Layout) -> dict[str, int]:
    """Living daemons by role (``slurmctld``, ``slurmd-lab-n01``); a reused pid is not taken for ours."""
    living: dict[str, int] = {}
    try:
        lines = (layout.state / "pids").read_text().splitlines()
    except FileNotFoundError:
        return living
    for fields in (line.split() for line in lines):
        if len(fields) == 3 and alive(int(fields[1])) and str(_start_time(int(fields[1]))) == fields[2]:
            living[fields[0]] = int(fields[1])
    return living


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie that nobody has reaped yet does not count."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in "ZX"


def _start_time(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError):
        return 0


def members(state: Path, conf: Path) -> Iterator[int]:
    """Living processes that belong to a cluster: its daemons and the processes of its jobs, never this one.

    A shell that only has SLURM_CONF set is not one of them.
    """
    daemon = f"{OWNER}={state}".encode()
    task = (f"SLURM_CONF={conf}".encode(), b"SLURMD_NODENAME")
    for pid in _others():
        variables = _environment(pid)
        names = {variable.partition(b"=")[0] for variable in variables}
        if daemon in variables or (task[0] in variables and task[1] in names):
            yield pid


def in_namespaces(inodes: Iterable[int]) -> Iterator[int]:
    """Living processes that sit in one of these network namespaces."""
    wanted = set(inodes)
    for pid in _others():
        try:
            if os.stat(f"/proc/{pid}/ns/net").st_ino in wanted:
                yield pid
        except OSError:
            continue


def variable(pid: int, name: str) -> str | None:
    """One environment variable that a process was started with."""
    start = name.encode() + b"="
    found = [line[len(start) :] for line in _environment(pid) if line.startswith(start)]
    return found[0].decode(errors="replace") if found else None


def _others() -> Iterator[int]:
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and int(entry) != os.getpid() and alive(int(entry)):
            yield int(entry)


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # gone, or of another user
        return []


def kill_all(find: Callable[[], Iterable[int]], limit_s: float = 10.0) -> int:
    """SIGKILL what ``find()`` yields until none is left; returns how many. SlurmError after ``limit_s``."""
    seen: set[int] = set()
    end = time.monotonic() + limit_s
    while targets := set(find()):
        seen |= targets
        for pid in targets:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        _reap(targets)
        if time.monotonic() > end:
            raise SlurmError(f"processes {sorted(targets)} survive SIGKILL; they wait in the kernel")
        time.sleep(0.02)
    return len(seen)


def _reap(pids: Iterable[int]) -> None:
    for pid in pids:
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            continue


def last_words(layout: Layout, role: str) -> str:
    """The last error line of a daemon's logs, for the one-line error."""
    words = "no log"
    for log in (layout.state / "log" / f"start-{role}.log", layout.state / "log" / f"{role}.log"):
        try:
            lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        except OSError:
            continue
        bad = [line for line in lines if "fatal" in line or "error" in line.lower()]
        words = (bad or lines or [words])[-1]
    return words
