"""Run a function over many items: over MPI ranks when MPI launched us, else processes, else one by one."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol, TypeVar

from data_prep.errors import DataError

Item = TypeVar("Item")
Progress = Callable[[int, int], None]
Outcome = list[Any]
"""``["ok", value]`` | ``["data", line]`` | ``["os", errno, text, file]`` | ``["defect", line, traceback]``"""


class Job(Protocol):
    """What a stage function is given: its own folder, how many processes it may use, where to report."""

    @property
    def out(self) -> Path: ...
    @property
    def workers(self) -> int: ...
    def say(self, line: str) -> None: ...


def run_all(
    function: Callable[[Item], Any], items: Sequence[Item], workers: int, progress: Progress | None = None
) -> list[Any]:
    """Call ``function(item)`` for each item and return the results in the order of the items.

    ``function`` is a module-level function (or ``functools.partial`` of one) and returns JSON values; they
    pass through JSON in every mode, so that all modes give the same. Under MPI every rank calls ``run_all``
    with the same arguments, gets the same results, and leaves only when all items are done; the single item
    of a one-item call is run by rank 0 alone. ``progress(done, total)`` is called as results arrive.

    Raises the DataError or OSError of the first item that failed; DataError when a worker process was killed;
    RuntimeError with the worker's traceback for a defect.
    """
    if mpi_size(os.environ) > 1:
        return _values(_over_mpi(function, items, progress))
    if min(workers, len(items)) <= 1:
        outcomes = []
        for item in items:
            outcomes.append(_attempt(function, item))
            if outcomes[-1][0] != "ok":
                break
            if progress:
                progress(len(outcomes), len(items))
        return _values(outcomes)
    return _values(_over_processes(function, items, workers, progress))


def mpi_size(environment: Mapping[str, str]) -> int:
    """Number of MPI ranks that were launched together, 1 without MPI; MPI itself is not touched.

    Raises DataError when srun started several tasks that cannot talk (no PMI, or mpi4py is missing): each of
    them would do the whole work.
    """
    # under mpirun the SLURM_STEP_* variables describe its daemons, so its own count comes first
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if name in environment:
            size = int(environment[name])
            break
    else:
        size = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
        if size > 1 and not {"PMIX_RANK", "PMI_RANK"} & environment.keys():
            raise DataError(
                f"srun started {size} tasks without MPI, each would do the whole work: start the data stages "
                "with --ntasks=1 and more --cpus-per-task, or with srun --mpi=pmix"
            )
    if size > 1 and importlib.util.find_spec("mpi4py") is None:
        raise DataError(
            f"{size} MPI ranks were launched but mpi4py is not installed in {sys.prefix}: "
            "pip install mpi4py, or start one task"
        )
    return size


def _over_mpi(function: Callable[[Item], Any], items: Sequence[Item], progress: Progress | None) -> list[Outcome]:
    import numpy as np
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    expected = mpi_size(os.environ)
    if world.size != expected:
        raise DataError(
            f"MPI sees {world.size} rank(s) where {expected} were launched: mpi4py in {sys.prefix} was built "
            "for another MPI; use the launcher it was built for (srun --mpi=pmix or its own mpirun)"
        )
    mine: list[Outcome] = []
    for item in items[world.rank :: world.size]:
        mine.append(_attempt(function, item))
        if mine[-1][0] != "ok":
            break  # the other ranks learn of it when they have finished theirs
        if progress and world.rank == 0:
            progress(min(len(mine) * world.size, len(items)), len(items))
    # JSON bytes, not objects: nothing that comes over the network is unpickled
    packed = np.frombuffer(json.dumps(mine).encode(), np.uint8)
    sizes = np.empty(world.size, np.int64)
    world.Allgather(np.array([len(packed)], np.int64), sizes)
    gathered = np.empty(int(sizes.sum()), np.uint8)
    world.Allgatherv(packed, (gathered, sizes))
    parts = np.split(gathered, np.cumsum(sizes)[:-1])
    by_rank: list[list[Outcome]] = [json.loads(part.tobytes()) for part in parts]
    for outcomes in by_rank:
        if outcomes and outcomes[-1][0] != "ok":
            return [outcomes[-1]]
    return [by_rank[index % world.size][index // world.size] for index in range(len(items))]


def _over_processes(
    function: Callable[[Item], Any], items: Sequence[Item], workers: int, progress: Progress | None
) -> list[Outcome]:
    # spawn: safe whatever threads this process runs (progress bars, Rust pools)
    context = multiprocessing.get_context("spawn")
    outcomes: list[Outcome] = [[] for _ in items]
    waiting = list(range(len(items) - 1, -1, -1))
    busy: dict[Connection, tuple[BaseProcess, int]] = {}
    processes: list[BaseProcess] = []
    done = 0
    try:
        for _ in range(min(workers, len(items))):
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(target=_serve, args=(theirs, os.getpid()), daemon=True)
            process.start()
            theirs.close()  # so that a dead worker means end of file, never a hang
            processes.append(process)
            index = waiting.pop()
            busy[ours] = (process, index)
            _send(ours, function, items[index])
        while busy:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                process, index = busy.pop(ready)
                try:
                    outcomes[index] = json.loads(ready.recv_bytes())
                except (EOFError, OSError):
                    outcomes[index] = _death(process, index, len(items))
                if outcomes[index][0] != "ok":
                    return [outcomes[index]]
                done += 1
                if progress:
                    progress(done, len(items))
                if waiting:
                    index = waiting.pop()
                    busy[ready] = (process, index)
                    _send(ready, function, items[index])
                else:
                    ready.close()
        return outcomes
    finally:
        for process in processes:
            process.kill()  # they hold nothing: every file is published whole or not at all
        for process in processes:
            process.join()


def _send(connection: Connection, function: Callable[[Item], Any], item: Item) -> None:
    with suppress(BrokenPipeError):  # the worker is dead: the next read says so
        connection.send((function, item))


def _death(process: BaseProcess, index: int, total: int) -> Outcome:
    process.join()
    code = process.exitcode or 0
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    advice = "probably out of memory: ask for more memory or fewer workers" if code == -9 else "start it again"
    return ["data", f"a worker process died ({how}) on part {index + 1} of {total}; {advice}"]


def _serve(connection: Connection, parent: int) -> None:
    """Life of a worker process: receive (function, item), send the outcome, until the pipe closes."""
    die_with_parent(parent)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # sent to the whole group; the parent decides and we die with it
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = "1"  # one process is one core
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    while True:
        try:
            function, item = connection.recv()
        except EOFError:
            return
        connection.send_bytes(json.dumps(_attempt(function, item)).encode())


def _attempt(function: Callable[[Item], Any], item: Item) -> Outcome:
    try:
        return ["ok", json.loads(json.dumps(function(item)))]
    except DataError as error:
        return ["data", str(error)]
    except OSError as error:
        return ["os", error.errno, error.strerror or str(error), error.filename and str(error.filename)]
    except Exception as error:
        return ["defect", f"{type(error).__name__}: {error}", traceback.format_exc()]


def _values(outcomes: list[Outcome]) -> list[Any]:
    if outcomes and outcomes[-1][0] != "ok":
        kind, *details = outcomes[-1]
        if kind == "data":
            raise DataError(details[0])
        if kind == "os":
            raise OSError(*details)
        raise RuntimeError(f"{details[0]}\n{details[1]}")
    return [value for _, value in outcomes]


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent (pid ``parent``) dies; does nothing outside Linux.

    ``prctl(PR_SET_PDEATHSIG, SIGKILL)``; a parent that died before the call is noticed by ``getppid``.
    """
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
