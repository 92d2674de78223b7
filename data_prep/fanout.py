"""Run a function over many items: over the tasks of a launch (by MPI, else by files), over processes, or one by one."""

from __future__ import annotations

import ctypes
import heapq
import importlib.util
import itertools
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol, TypeVar

from data_prep import liveness
from data_prep.errors import DataError
from data_prep.liveness import Watch, keep_freed_memory
from data_prep.publish import WRITE, plain, publish_json

Item = TypeVar("Item")
Progress = Callable[[int, int], None]
Outcome = list[Any]
"""``["ok", value]`` | ``["data", line]`` | ``["os", errno, text, file]`` | ``["defect", line, traceback]``"""
EXCHANGE = "FANOUT_DIR"  # names a folder that all tasks of a launch see and no other launch uses
_calls: dict[Path, int] = {}  # calls of run_all by such folder: every task makes the same ones


@dataclass(frozen=True)
class Work:
    """What `run_all` is asked for."""

    function: Callable[[Any], Any]
    items: Sequence[Any]
    sizes: Sequence[int]
    workers: int
    progress: Progress | None


class Job(Protocol):
    """What a stage function is given: its own folder, how many processes it may use, where to report."""

    @property
    def out(self) -> Path: ...
    @property
    def workers(self) -> int: ...
    def say(self, line: str, share: float | None = None) -> None: ...


def run_all(
    function: Callable[[Item], Any],
    items: Sequence[Item],
    workers: int,
    progress: Progress | None = None,
    sizes: Sequence[int] | None = None,
) -> list[Any]:
    """Call ``function(item)`` for each item and return the results in the order of the items.

    ``function`` is a module-level function (or ``functools.partial`` of one) and returns JSON values; they
    pass through JSON in every mode, so that all modes give the same. Where several tasks were launched together,
    each calls ``run_all`` with the same arguments, gets the same results, and leaves only when all items are done;
    the single item of a one-item call is run by rank 0 alone. They talk over MPI where its launcher started them,
    else over files in the folder that EXCHANGE names. ``progress(done, total)`` is called as results arrive.
    ``sizes`` (in any unit) let the longest items begin first, and tasks get equal shares of the size.

    Raises the DataError, OSError or MemoryError of the first item that failed; DataError when a worker process was
    killed, or stopped or stuck (STOPPED_S, STUCK_S); RuntimeError with the worker's traceback for a defect.
    """
    keep_freed_memory()
    work = Work(function, items, sizes or [1] * len(items), workers, progress)
    if (size := tasks(os.environ)) == 1:
        return _values(_here(work))
    over = _over_mpi if by_mpi(os.environ) else _over_files
    return _values(over(work, shares(work.sizes, size)))


def once(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)`` as `run_all` would: by one task alone, the result for all of them."""
    return run_all(lambda _: function(*arguments), [None], 1)[0]


def shares(sizes: Sequence[int], tasks: int) -> list[list[int]]:
    """Which items each task does: the longest first, each to the task that has least (Graham 1969)."""
    lightest = [(0, task) for task in range(tasks)]
    dealt: list[list[int]] = [[] for _ in range(tasks)]
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        weight, task = heapq.heappop(lightest)
        dealt[task].append(index)
        heapq.heappush(lightest, (weight + sizes[index], task))
    return dealt


def _here(work: Work) -> list[Outcome]:
    """The outcomes of the items in order, up to the first failure; by processes where that helps."""
    if min(work.workers, len(work.items)) > 1:
        return _over_processes(work)
    outcomes: list[Outcome] = []
    for item in work.items:
        outcomes.append(_attempt(work.function, item))
        if outcomes[-1][0] != "ok":
            break
        if work.progress:
            work.progress(len(outcomes), len(work.items))
    return outcomes


def tasks(environment: Mapping[str, str]) -> int:
    """Number of tasks that were launched together, by srun or mpirun; 1 without a launcher."""
    # under mpirun the SLURM_STEP_* variables describe its daemons, so its own count comes first
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        if name in environment:
            return int(environment[name])
    return 1


def by_mpi(environment: Mapping[str, str]) -> bool:
    """Whether the tasks of this launch can talk over MPI: its launcher started them, and mpi4py works.

    Raises DataError when they could not share the work in any way: each of them would do all of it.
    """
    launched = not {"PMIX_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"}.isdisjoint(environment)
    missing = "srun has no --mpi=pmi2 or --mpi=pmix" if not launched else _mpi_missing()
    if missing and not (EXCHANGE in environment and "SLURM_PROCID" in environment):
        raise DataError(
            f"{tasks(environment)} tasks were launched without a working MPI, each would do the whole work "
            f"({missing}): start one task with more --cpus-per-task"
        )
    return not missing


def _mpi_missing() -> str:
    """Why mpi4py does not work here; "" when it does."""
    try:
        importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:  # not installed, or it finds no MPI library
        return f"mpi4py in {sys.prefix}: {str(error).splitlines()[0]}"
    return ""


def _over_mpi(work: Work, dealt: list[list[int]]) -> list[Outcome]:
    import numpy as np
    from mpi4py import MPI

    world, size = MPI.COMM_WORLD, len(dealt)
    if world.size != size:
        raise DataError(
            f"MPI sees {world.size} rank(s) where {size} were launched, each would do the whole work: mpi4py in "
            f"{sys.prefix} uses another MPI than the launcher; try srun --mpi=pmix or --mpi=pmi2, or its own mpirun"
        )
    own: list[Outcome] = []
    for index in dealt[world.rank]:
        own.append(_attempt(work.function, work.items[index]))
        if own[-1][0] != "ok":
            break  # the other ranks learn of it when they have finished theirs
        if work.progress and world.rank == 0:
            work.progress(min(len(own) * world.size, len(work.items)), len(work.items))
    # JSON bytes, not objects: nothing that comes over the network is unpickled
    packed = np.frombuffer(json.dumps(own).encode(), np.uint8)
    sizes = np.empty(world.size, np.int64)
    world.Allgather(np.array([len(packed)], np.int64), sizes)
    gathered = np.empty(int(sizes.sum()), np.uint8)
    world.Allgatherv(packed, (gathered, sizes))
    parts = np.split(gathered, np.cumsum(sizes)[:-1])
    return _in_order([json.loads(part.tobytes()) for part in parts], dealt)


def _in_order(by_rank: list[list[Outcome]], dealt: list[list[int]]) -> list[Outcome]:
    """The outcomes in the order of the items, which were dealt to the ranks; or the first failure alone."""
    for outcomes in by_rank:
        if outcomes and outcomes[-1][0] != "ok":
            return [outcomes[-1]]
    places = {index: (rank, place) for rank, share in enumerate(dealt) for place, index in enumerate(share)}
    return [by_rank[rank][place] for rank, place in map(places.__getitem__, range(len(places)))]


def _over_files(work: Work, dealt: list[list[int]]) -> list[Outcome]:
    """Rank 0 gathers what each rank leaves in a file and publishes all of it in one.

    A rank that dies takes the others with it (srun --kill-on-bad-exit); one that is stopped is noticed because its
    file ``alive-RANK`` grows old.
    """
    rank, folder = int(os.environ["SLURM_PROCID"]), Path(os.environ[EXCHANGE])
    call = _calls[folder] = _calls.get(folder, 0) + 1
    if call == 1:
        threading.Thread(target=_show_life, args=(folder / f"alive-{rank}",), daemon=True).start()
    items, sizes = ([values[index] for index in dealt[rank]] for values in (work.items, work.sizes))
    own = _here(replace(work, items=items, sizes=sizes, progress=work.progress if rank == 0 else None))
    whole = folder / f"shared-{call}.json"
    if rank > 0:
        publish_json(folder / f"shared-{call}-{rank}.json", {"outcomes": own})
        by_rank = _read_when_there(whole, 0)["by_rank"]
    else:
        parts = {other: folder / f"shared-{call}-{other}.json" for other in range(1, len(dealt))}
        by_rank = [own, *(_read_when_there(part, other)["outcomes"] for other, part in parts.items())]
        publish_json(whole, {"by_rank": by_rank})
        for part in parts.values():
            part.unlink()
    return _in_order(by_rank, dealt)


def _show_life(path: Path) -> None:
    """Say every few seconds, in a file, that this task is not stopped."""
    for number in itertools.count():
        with suppress(OSError):  # by rename: whoever is stopped just then has still said who it is
            with os.fdopen(plain(path.with_suffix(".new"), WRITE), "w") as file:
                file.write(f"{number} process {os.getpid()} on {socket.gethostname()}")
            path.with_suffix(".new").replace(path)
        time.sleep(liveness.WATCH_S)


def _read_when_there(path: Path, rank: int) -> Any:
    """The content of a file that task ``rank`` is going to write; DataError when that task stands still."""
    pause_s, since = 0.01, time.monotonic()
    seen: str | None = None  # until the task has begun, which may take long
    while True:
        with suppress(FileNotFoundError):
            return json.loads(path.read_text(encoding="utf-8"))
        os.listdir(path.parent)  # makes a network file system look again
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 2.0)
        with suppress(OSError):
            alive = (path.parent / f"alive-{rank}").read_text()
            if alive != seen:
                seen, since = alive, time.monotonic()
        if seen is not None and time.monotonic() - since > liveness.STOPPED_S:
            who = seen.partition(" ")[2]
            raise DataError(
                f"task {rank} of the stage ({who}) has stood still for {liveness.STOPPED_S} s: start it again"
            )


def _over_processes(work: Work) -> list[Outcome]:
    context = multiprocessing.get_context("fork") if _is_one_thread() else multiprocessing.get_context("spawn")
    items = work.items
    outcomes: list[Outcome] = [[] for _ in items]
    waiting = shares(work.sizes, 1)[0][::-1]
    busy: dict[Connection, tuple[BaseProcess, int]] = {}
    processes: list[BaseProcess] = []
    watch = Watch()
    done = 0
    try:
        for _ in range(min(work.workers, len(items))):
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(target=_serve, args=(theirs, os.getpid()), daemon=True)
            process.start()
            theirs.close()  # so that a dead worker means end of file, never a hang
            processes.append(process)
            index = waiting.pop()
            busy[ours] = (process, index)
            _send(ours, work.function, items[index])
        while busy:
            for ready in wait(list(busy), liveness.WATCH_S):
                assert isinstance(ready, Connection)
                process, index = busy.pop(ready)
                try:
                    outcomes[index] = json.loads(ready.recv_bytes())
                except (EOFError, OSError):
                    outcomes[index] = ["data", f"{_who(process, index, items)} {_death(process)}"]
                if outcomes[index][0] != "ok":
                    return [outcomes[index]]
                done += 1
                if work.progress:
                    work.progress(done, len(items))
                if waiting:
                    index = waiting.pop()
                    busy[ready] = (process, index)
                    _send(ready, work.function, items[index])
                else:
                    ready.close()
            for process, index in busy.values():
                if fault := watch.fault(process.pid or 0):
                    return [["data", f"{_who(process, index, items)} {fault}: start it again, what is done is kept"]]
        return outcomes
    finally:
        for process in processes:
            process.kill()  # they hold nothing: every file is published whole or not at all
        for process in processes:
            process.join()


def _is_one_thread() -> bool:
    """Whether workers may begin as forks, with all that is imported and read: no other thread holds a lock."""
    if sys.platform != "linux" or threading.active_count() > 1:
        return False
    if (first := os.fork()) == 0:  # before any fork OpenBLAS ends its threads
        os._exit(0)
    os.waitpid(first, 0)
    return len(os.listdir("/proc/self/task")) == 1


def _who(process: BaseProcess, index: int, items: Sequence[Any]) -> str:
    """Which process of which host worked on what."""
    item = items[index]
    named = (
        item.get("file")
        if isinstance(item, Mapping)
        else next((getattr(item, name) for name in ("path", "file", "name") if hasattr(item, name)), None)
    )
    what = f"part {index + 1} of {len(items)}" + (f" ({named})" if named else "")
    return f"worker process {process.pid} on {socket.gethostname()}, at {what},"


def _send(connection: Connection, function: Callable[[Item], Any], item: Item) -> None:
    with suppress(BrokenPipeError):  # the worker is dead: the next read says so
        connection.send((function, item))


def _death(process: BaseProcess) -> str:
    process.join()
    code = process.exitcode or 0
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    advice = "probably out of memory: ask for more memory or fewer workers" if code == -9 else "start it again"
    return f"died ({how}); {advice}"


def _serve(connection: Connection, parent: int) -> None:
    """Life of a worker process: receive (function, item), send the outcome, until the pipe closes."""
    die_with_parent(parent)
    keep_freed_memory()
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
    except MemoryError:
        return ["memory"]
    except Exception as error:
        if hasattr(error, "exit_code"):
            raise  # the signal handler's of whoever runs this here: no fault of the item, but a stop that was asked for
        return ["defect", f"{type(error).__name__}: {error}", traceback.format_exc()]


def _values(outcomes: list[Outcome]) -> list[Any]:
    if outcomes and outcomes[-1][0] != "ok":
        kind, *details = outcomes[-1]
        if kind == "data":
            raise DataError(details[0])
        if kind == "os":
            raise OSError(*details)
        if kind == "memory":
            raise MemoryError
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
