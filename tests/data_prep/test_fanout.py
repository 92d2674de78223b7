"""Results come in order from any number of processes; deaths and errors are one line, never a hang."""

from __future__ import annotations

import errno
import functools
import importlib.util
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import fanout, liveness
from data_prep.errors import DataError
from data_prep.fanout import EXCHANGE, by_mpi, run_all, tasks

pytestmark = pytest.mark.slow  # it starts workers

REPOSITORY = Path(__file__).parents[2]


def square(item: int) -> dict[str, int]:
    time.sleep(0.02 * (item % 3))  # so that processes finish out of order
    return {"square": item * item}


def fail(item: int) -> int:
    if item == 2:
        raise DataError("page 7: broken")
    return item


def full(_item: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "/data/x")


def defect(item: int) -> int:
    return item // 0


def die(item: int) -> int:
    if item == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def hungry(_item: int) -> None:
    raise MemoryError


class Stopped(Exception):
    """As a signal handler of the process raises it, in whose midst the work is done."""

    exit_code = 75


def stopped(_item: int) -> None:
    raise Stopped("stopped by SIGTERM")


def own_pid(item: int) -> int:
    time.sleep(0.05)
    return os.getpid() + 0 * item


def scaled(item: int, factor: int) -> int:
    return item * factor


def test_results_come_in_the_order_of_the_items() -> None:
    expected = [{"square": item * item} for item in range(7)]
    assert run_all(square, range(7), 1) == expected
    assert run_all(square, range(7), 3) == expected
    assert run_all(functools.partial(scaled, factor=3), [1, 2], 2) == [3, 6]
    assert run_all(square, [], 4) == []


def test_work_is_spread_over_processes() -> None:
    assert len(set(run_all(own_pid, range(6), 2))) == 2
    assert set(run_all(own_pid, range(3), 1)) == {os.getpid()}


def test_workers_begin_as_forks_but_not_under_other_threads(tmp_path: Path) -> None:
    (tmp_path / "kind.py").write_text(
        "import multiprocessing\ndef of(item):\n    return type(multiprocessing.current_process()).__name__\n"
    )
    program = (
        "import kind, numpy, threading\nfrom data_prep.fanout import run_all\nprint(run_all(kind.of, [1, 2], 2))\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\nprint(run_all(kind.of, [1, 2], 2))\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}", "OPENBLAS_NUM_THREADS": "2"}
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == [str(["ForkProcess"] * 2), str(["SpawnProcess"] * 2)]


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_come_back_as_they_were(workers: int) -> None:
    with pytest.raises(DataError, match=r"^page 7: broken$"):
        run_all(fail, range(4), workers)
    with pytest.raises(OSError) as caught:
        run_all(full, range(4), workers)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "/data/x")
    with pytest.raises(RuntimeError, match="ZeroDivisionError") as defective:
        run_all(defect, range(4), workers)
    assert "in defect" in str(defective.value)  # the worker's own traceback


def test_a_killed_worker_is_one_clear_line() -> None:
    with pytest.raises(DataError, match=r"worker process \d+ on \S+, at part 2 of 4, died \(SIGKILL\); .*memory"):
        run_all(die, range(4), 2)


@dataclass(frozen=True)
class Piece:
    path: Path
    stop: bool


def stand_still(piece: Piece) -> int:
    if piece.stop:
        os.kill(os.getpid(), signal.SIGSTOP)
    return 0


def wait_for_ever(piece: Piece) -> int:
    time.sleep(600 * piece.stop)
    return 0


@pytest.mark.parametrize(
    ("function", "limit", "how"),
    [(stand_still, "STOPPED_S", r"is stopped \(SIGSTOP\)"), (wait_for_ever, "STUCK_S", "has used no processor time")],
)
def test_a_worker_that_stands_still_is_named_and_given_up(
    function: Callable[[Piece], int], limit: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert liveness.STOPPED_S + 2 * liveness.WATCH_S < 60
    monkeypatch.setattr(liveness, "WATCH_S", 0.1)
    monkeypatch.setattr(liveness, limit, 1.0)
    pieces = [Piece(Path(f"/in/{number}.xml"), number == 2) for number in range(5)]
    who = rf"worker process \d+ on {re.escape(socket.gethostname())}, at part 3 of 5 \(/in/2\.xml\),"
    with pytest.raises(DataError, match=rf"{who} {how} for \d s: start it again"):
        run_all(function, pieces, 2)


def busy(_item: int) -> int:
    end = time.process_time() + 1.5
    while time.process_time() < end:
        pass
    return 0


def test_a_worker_that_works_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "WATCH_S", 0.1)
    monkeypatch.setattr(liveness, "STUCK_S", 1.0)
    assert run_all(busy, range(2), 2) == [0, 0]


@given(st.lists(st.integers(0, 100), max_size=40), st.integers(1, 6))
def test_shares_are_whole_and_even(sizes: list[int], count: int) -> None:
    dealt = fanout.shares(sizes, count)
    assert sorted(index for share in dealt for index in share) == list(range(len(sizes)))
    weights = [sum(sizes[index] for index in share) for share in dealt]
    assert max(weights) <= sum(sizes) / count + max(sizes, default=0)
    assert all(sizes[a] >= sizes[b] for share in dealt for a, b in itertools.pairwise(share))


def test_the_longest_items_begin_first() -> None:
    sizes = [1, 9, 5, 9, 2]
    begun = run_all(now, range(5), 2, None, sizes)
    assert begun[0] == max(begun)  # the shortest is the last
    assert begun[1] < begun[4]


def now(_item: int) -> float:
    begun = time.time()
    time.sleep(0.2)
    return begun


def test_results_are_the_same_json_in_every_mode() -> None:
    for workers in (1, 2):
        assert run_all(tuple_of, range(2), workers) == [[0, 0], [1, 1]]


def tuple_of(item: int) -> tuple[int, int]:
    return (item, item)


def test_progress_counts_to_the_total() -> None:
    for workers in (1, 2):
        seen: list[tuple[int, int]] = []
        run_all(square, range(3), workers, lambda done, total, seen=seen: seen.append((done, total)))
        assert seen == [(1, 3), (2, 3), (3, 3)]


SLEEPER = """
import os, sys, time
sys.path.insert(0, {tests!r})
import sleeping_item
from data_prep.fanout import run_all
if __name__ == "__main__":
    run_all(sleeping_item.sleep, [1, 2], 2)
"""


def test_workers_die_with_their_parent(tmp_path: Path) -> None:
    (tmp_path / "sleeping_item.py").write_text(
        "import os, time\ndef sleep(item):\n"
        f"    open({str(tmp_path)!r} + f'/{{os.getpid()}}.pid', 'w').close()\n    time.sleep(60)\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(SLEEPER.format(tests=str(tmp_path)))
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    parent = subprocess.Popen([sys.executable, str(script)], env=environment)
    try:
        pids = wait_for(lambda: [int(path.stem) for path in tmp_path.glob("*.pid")], 2)
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 5
    while any(running(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.02)


def wait_for(look: object, count: int) -> list[int]:
    deadline = time.monotonic() + 30
    while len(found := look()) < count:  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found  # type: ignore[no-any-return]


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_launch_of_several_tasks_is_recognised() -> None:
    assert tasks({}) == 1
    assert tasks({"SLURM_NTASKS": "8"}) == 1  # a batch shell: one process
    assert tasks({"OMPI_COMM_WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2"}) == 4
    assert tasks({"PMI_SIZE": "3", "SLURM_STEP_NUM_TASKS": "3"}) == 3
    assert tasks({"PMIX_RANK": "0", "SLURM_STEP_NUM_TASKS": "5"}) == 5


def test_tasks_that_cannot_share_the_work_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """srun without MPI, or a broken mpi4py: over files where that is possible, else no silent N-fold work."""
    srun, shared = {"SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "2"}, {EXCHANGE: "/x"}
    monkeypatch.setattr(fanout, "_mpi_missing", lambda: "")
    assert by_mpi({**srun, "PMIX_RANK": "2"})
    assert not by_mpi(srun | shared)
    with pytest.raises(DataError, match=r"5 tasks were launched without a working MPI.*--mpi=pmi2"):
        by_mpi(srun)
    monkeypatch.setattr(fanout, "_mpi_missing", lambda: "no libmpi")
    assert not by_mpi({**srun, **shared, "PMIX_RANK": "2"})
    with pytest.raises(DataError, match=r"4 tasks .*no libmpi"):
        by_mpi({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"})


MPI_PROGRAM = """
import sys
from data_prep.errors import DataError
from data_prep.fanout import run_all
sys.path.insert(0, sys.argv[1])
import mpi_items
print(f"RESULT {run_all(mpi_items.square, range(7), 1)}", flush=True)
print(f"RESULT {run_all(mpi_items.square, [5], 1)}", flush=True)
try:
    run_all(mpi_items.fail, range(7), 1)
except DataError as error:
    print(f"ERROR {error}", flush=True)
"""


ITEMS = (
    "import os\nfrom data_prep.errors import DataError\n"
    "names = ('OMPI_COMM_WORLD_RANK', 'PMI_RANK', 'SLURM_PROCID')\n"
    "RANK = next(os.environ[name] for name in names if name in os.environ)\n"
    "def square(item):\n    print(f'RAN {item} {RANK}', flush=True)\n    return item * item\n"
    "def fail(item):\n    if item == 4:\n        raise DataError('page 4: broken')\n    return 0\n"
)


def check_shared(output: str) -> None:
    """Launchers pass on what ranks print in pieces, so lines may run together."""
    assert output.count("RESULT [0, 1, 4, 9, 16, 25, 36]") == 3
    assert output.count("RESULT [25]") == 3
    assert output.count("ERROR page 4: broken") == 3
    ran = re.findall(r"RAN (\d) (\d)", output)
    assert sorted(ran) == sorted([(str(item), str(item % 3)) for item in range(7)] + [("5", "0")])


def test_tasks_of_srun_share_the_work_over_files(tmp_path: Path) -> None:
    (tmp_path / "mpi_items.py").write_text(ITEMS)
    (tmp_path / "program.py").write_text(MPI_PROGRAM)
    (tmp_path / "exchange").mkdir()
    base = {**os.environ, "PYTHONPATH": str(REPOSITORY), "SLURM_STEP_NUM_TASKS": "3", EXCHANGE: f"{tmp_path}/exchange"}
    started = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "program.py"), str(tmp_path)],
            env={**base, "SLURM_PROCID": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    check_shared("".join(process.communicate(timeout=60)[0] for process in started))
    assert len(list((tmp_path / "exchange").glob("shared-*"))) == 3  # one for each call, whatever the number of tasks


def test_a_stopped_task_of_srun_is_named(tmp_path: Path) -> None:
    (tmp_path / "exchange").mkdir()
    program = (
        "import os, sys\nfrom data_prep import fanout, liveness\nliveness.WATCH_S, liveness.STOPPED_S = 0.1, 2.0\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\nimport stopping\nfanout.run_all(stopping.stop, range(4), 1)\n"
    )
    (tmp_path / "stopping.py").write_text(
        "import os, signal, time\ndef stop(item):\n    time.sleep(0.5)\n    if os.environ['SLURM_PROCID'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGSTOP)\n    return 0\n"
    )
    base = {**os.environ, "PYTHONPATH": str(REPOSITORY), "SLURM_STEP_NUM_TASKS": "2", EXCHANGE: f"{tmp_path}/exchange"}
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", program], env={**base, "SLURM_PROCID": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    )
    with first, second:
        try:
            error = first.communicate(timeout=60)[1]
        finally:
            first.kill()
            second.kill()
    assert re.search(rf"task 1 of the stage \(process {second.pid} on \S+\) has stood still for 2\.0 s", error), error


def test_mpi_ranks_share_the_work_and_all_get_the_results(tmp_path: Path) -> None:
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if mpirun is None or importlib.util.find_spec("mpi4py") is None:
        pytest.skip("MPI is not tested here: mpirun or mpi4py is missing")
    (tmp_path / "mpi_items.py").write_text(ITEMS)
    (tmp_path / "program.py").write_text(MPI_PROGRAM)
    version = subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=True).stdout
    launcher = [mpirun, *(["--allow-run-as-root", "--oversubscribe"] if "Open MPI" in version else []), "-n", "3"]
    done = subprocess.run(
        [*launcher, sys.executable, str(tmp_path / "program.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    check_shared(done.stdout)


@pytest.mark.parametrize("count", [1, 3])
def test_a_stop_in_the_midst_of_the_work_is_no_defect(count: int) -> None:
    """A vocabulary is one item of work, done by the process that Slurm asks to stop."""
    with pytest.raises(Stopped):
        run_all(stopped, range(count), 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_lack_of_memory_is_said_to_be_one(workers: int) -> None:
    with pytest.raises(MemoryError):
        run_all(hungry, range(3), workers)
