"""Trials as forked processes: a parent that has imported torch and taken one optimizer step forks each in 0.1 s."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def forking() -> ForkServerContext:
    """The context whose server is the warm parent; it computes with one thread, as a forked child must."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["faults.warm"])
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    wanted = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        multiprocessing.forkserver.ensure_running()  # type: ignore[attr-defined]
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
    return context


def _child(output: str | None, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    from pipeline.errors import describe

    assert "faults.warm" in sys.modules, "the parent did not import faults.warm"
    os.setpgid(0, 0)
    if output is not None:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
    try:
        function(*arguments)
    except BaseException as error:
        line, code = describe(error)
        with contextlib.suppress(OSError):  # writing may be what fails here
            print(line, file=sys.stderr, flush=True)
        os._exit(code)
    os._exit(0)


def start(function: Callable[..., None], *arguments: Any, output: Path | None = None) -> ForkServerProcess:
    """Run ``function`` in a fork of the warm parent; it leaves with the exit code of the error that it raises.

    What it prints, and the line of its error, go to ``output``.
    """
    process = forking().Process(target=_child, args=(str(output) if output else None, function, arguments), daemon=True)
    process.start()
    return process


def code_of(process: ForkServerProcess, timeout_s: float = 60.0) -> int:
    """The exit code, negative for a signal; a process that does not end in time is killed, AssertionError."""
    process.join(timeout_s)
    if process.exitcode is None:
        end(process)
        raise AssertionError(f"did not end in {timeout_s:.0f} s")
    return process.exitcode


def end(process: ForkServerProcess) -> None:
    """Kill a trial that may be stopped or running, and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.kill()
    process.join()


@contextlib.contextmanager
def ended(*processes: ForkServerProcess) -> Iterator[None]:
    """None of ``processes`` outlives the block."""
    try:
        yield
    finally:
        for process in processes:
            if process.exitcode is None:
                end(process)


def until(condition: Callable[[], bool], timeout_s: float = 30.0, pause_s: float = 0.002) -> None:
    """Wait until ``condition`` holds; AssertionError after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"nothing happened in {timeout_s:.0f} s"
        time.sleep(pause_s)
