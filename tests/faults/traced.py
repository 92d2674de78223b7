"""Faults at the N-th system call of a trial, injected by strace into a forked process."""

from __future__ import annotations

import functools
import mmap
import os
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from faults import zygote

CALLS = ",".join(
    f"?{name}"  # not every machine has all of them
    for name in (
        *("open", "openat", "creat", "close", "read", "pread64", "readv", "write", "pwrite64", "writev", "lseek"),
        *("stat", "fstat", "lstat", "newfstatat", "statx", "access", "faccessat", "faccessat2", "statfs", "fstatfs"),
        *("fsync", "fdatasync", "truncate", "ftruncate", "fallocate", "flock", "fcntl", "getdents64"),
        *("mkdir", "mkdirat", "rmdir", "rename", "renameat", "renameat2", "unlink", "unlinkat", "link", "linkat"),
    )
)
LINE = re.compile(r"^(?:\d+ +)?(\w+)\(")


class Shared:
    """Eight numbers in memory that parent and trial share; writing one is no system call that a fault could hit."""

    def __init__(self, path: Path) -> None:
        with open(path, "a+b") as file:
            file.truncate(64)
            self.map = mmap.mmap(file.fileno(), 64)

    def __getitem__(self, index: int) -> int:
        return int.from_bytes(self.map[8 * index : 8 * index + 8], "little")

    def __setitem__(self, index: int, value: int) -> None:
        self.map[8 * index : 8 * index + 8] = value.to_bytes(8, "little")


def _gated(shared: str, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """In the trial: wait until strace is there, then work."""
    numbers = Shared(Path(shared))
    numbers[6] = 1
    while not numbers[7]:
        time.sleep(0.0005)
    function(numbers, *arguments)


@contextmanager
def traced(
    folder: Path, function: Callable[..., None], *arguments: Any, inject: str | None = None
) -> Iterator[tuple[ForkServerProcess, subprocess.Popen[str], Shared]]:
    """A fork of the warm parent running ``function(numbers, *arguments)`` under strace with a fault or none.

    Gives the trial, strace and the shared numbers. ``folder`` gets ``calls`` (strace's log) and ``output``.
    """
    numbers = Shared(folder / "numbers")
    trial = zygote.start(_gated, str(folder / "numbers"), function, arguments, output=folder / "output")
    zygote.until(lambda: numbers[6] == 1)
    options = ["-e", f"inject={inject}"] if inject else []
    command = ["strace", "-f", "-o", str(folder / "calls"), "-e", f"trace={CALLS}", *options, "-p", str(trial.pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace, zygote.ended(trial):
        try:
            assert strace.stderr is not None
            said = strace.stderr.readline()
            assert "attached" in said, said
            numbers[7] = 1
            yield trial, strace, numbers
        finally:
            strace.terminate()


def run(folder: Path, function: Callable[..., None], *arguments: Any, inject: str | None = None) -> tuple[int, Shared]:
    """As ``traced``, to its end: exit code and shared numbers."""
    with traced(folder, function, *arguments, inject=inject) as (trial, strace, numbers):
        code = zygote.code_of(trial)
        strace.wait(10)
    return code, numbers


def calls(folder: Path) -> list[tuple[str, int]]:
    """Every ``(call, its number)`` of a trial that ran with one thread."""
    names = Counter[str]()
    found = []
    for line in (folder / "calls").read_text().splitlines():
        if match := LINE.match(line):
            names[match[1]] += 1
            found.append((match[1], names[match[1]]))
    return found


@functools.cache
def missing() -> str:
    """Why strace cannot be used here; empty where it can."""
    if shutil.which("strace") is None:
        return "strace is missing (apt-get install strace): faults at single I/O calls are not tried"
    if subprocess.run(["strace", "-qq", "-o", os.devnull, "true"], capture_output=True, check=False).returncode:
        return "strace is not allowed to trace here: faults at single I/O calls are not tried"
    return ""
