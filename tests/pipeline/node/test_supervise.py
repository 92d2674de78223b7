"""A child under watch: its exit code, its signals, its hangs, and a GPU that ends the attempt."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.node.heartbeat import Heartbeat
from pipeline.node.supervise import HANG_S, START_S, limit_s
from support.running import ROOT, children_of

SCRIPT = """
import os, re, sys, threading, time
from pathlib import Path
from pipeline.node import heartbeat
from pipeline.node import supervise as module
from pipeline.errors import NumericalError
from pipeline.node.job import Job, Topology
from pipeline.node.preempt import StopRequest
from pipeline.run.rundir import RunDir

module.HANG_S, module.PEERS_DUMP_S, module.LOOK_S, module.LEAVE_S, module.STOPPED_S = 1.0, 1.0, 0.1, 3.0, 0.5
heartbeat.LIVENESS_S = 0.05  # as far below HANG_S as in the product
{before}
run = RunDir(Path(sys.argv[1]))
attempt = run.stage("phase1").new_attempt("launch")
job = Job(run, "phase1", attempt, Topology(3, 4, {local_rank}, "launch"), workers=1, threads=1, stop=StopRequest())
job.stop.listen()

def work():
    job.heartbeat.beat("working", 6)  # the first step is done at the next beat
    job.heartbeat.beat("{where}", 7)
{body}

with module.looked_after():
    module.supervise(job, work)
print("whole")
"""


def start(
    folder: Path, body: str, where: str = "working", local_rank: int = 1, before: str = "", **environment: str
) -> subprocess.Popen[str]:
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    script = SCRIPT.replace("{body}", lines).replace("{where}", where).replace("{local_rank}", str(local_rank))
    return subprocess.Popen(
        [sys.executable, "-c", script.replace("{before}", before), str(folder)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


def verdict(folder: Path) -> dict[str, object]:
    return json.loads((folder / "stages/phase1/attempts/0001/verdict.json").read_text())


def test_a_child_that_ends_well_lets_the_parent_go_on(tmp_path):
    assert end(start(tmp_path, "print('from the child')")) == (0, "from the child\nwhole\n", "")


def test_a_refusal_is_one_line_and_its_code(tmp_path):
    code, output, errors = end(start(tmp_path, "raise NumericalError('step 3 is not finite')"))
    assert (code, output, errors) == (5, "", "step 3 is not finite\n")


def test_a_killed_child_is_named_with_its_signal(tmp_path):
    code, _, errors = end(start(tmp_path, "os.kill(os.getpid(), 9)"))
    assert code == verdict(tmp_path)["code"] == 76
    assert "rank 3 on " in errors
    assert "was killed by signal 9 (SIGKILL) after step 7" in errors


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group of this machine with 200 MB of memory, of either version."""
    group = next(
        line for line in Path("/proc/self/cgroup").read_text().splitlines() if re.match("0::|[0-9]+:memory:", line)
    )
    old = ":memory:" in group
    path = Path("/sys/fs/cgroup", "memory" if old else "", group.split(":")[2].strip("/"), f"small-{os.getpid()}")
    try:
        path.mkdir()
        (path / ("memory.limit_in_bytes" if old else "memory.max")).write_text("200000000")
    except OSError as error:
        pytest.skip(f"no control group can be made here ({error}): the kernel's kill is not tried")
    yield path
    path.rmdir()


def test_the_kernels_kill_is_forgiven_once(tmp_path, small_group: Path):
    """Out of memory for real; the second time in a row it is the micro-batch that does not fit."""
    (tmp_path / "run.json").write_text('{"recipe": {"phase1": {"micro_batch": 32}}}')
    before = f"open({str(small_group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))"
    for attempt, code, words in ((1, 76, "started again once"), (2, 2, "--set phase1.micro_batch=16 needs about half")):
        ended, _, errors = end(start(tmp_path, "held = bytearray(1 << 30)", before=before))
        found = json.loads((tmp_path / f"stages/phase1/attempts/{attempt:04d}/verdict.json").read_text())
        assert (ended, found["code"], found["cause"]) == (code, code, "memory"), errors
        assert words in found["line"]
        assert "killed by the kernel, out of memory, after step 7" in errors


def test_a_stop_signal_reaches_the_child(tmp_path):
    body = "print('ready', flush=True)\nwhile job.stop.reason is None: time.sleep(0.01)\nprint(job.stop.reason)"
    process = start(tmp_path, body, "waiting")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert end(process) == (0, "SIGTERM\nwhole\n", "")


@pytest.mark.parametrize("done_s", [0, 2])
def test_a_stopped_watcher_goes_on(tmp_path, done_s):
    """While its child works, and when the child has nothing left to do."""
    body = f"os.kill(os.getppid(), 19)\nfor _ in range({done_s}0): time.sleep(0.1); job.heartbeat.beat('working', 8)"
    code, output, errors = end(start(tmp_path, body))
    assert (code, output.splitlines()[-1]) == (0, "whole"), errors
    assert ("was stopped (SIGSTOP)" in output + errors) == bool(done_s)


def test_a_stopped_process_without_a_child_goes_on(tmp_path):
    """That waits for rank 0, say, or does a stage of one process."""
    code, output, errors = end(start(tmp_path, "", before="with module.looked_after(): os.kill(os.getpid(), 19)"))
    assert (code, output) == (0, "whole\n")
    assert "was stopped (SIGSTOP); it goes on" in errors


@pytest.mark.slow
def test_a_stopped_runner_is_named(tmp_path):
    with subprocess.Popen(["sleep", "60"]) as runner:
        runner.send_signal(signal.SIGSTOP)
        body = "for _ in range(20): time.sleep(0.1); job.heartbeat.beat('working', 8)"
        code, output, errors = end(start(tmp_path, body, local_rank=0, PIPELINE_PARENT=str(runner.pid)))
        runner.kill()
    assert code == 0
    assert (output + errors).count(f"kill -CONT {runner.pid}") == 1


def test_a_child_does_not_outlive_its_parent(tmp_path):
    process = start(tmp_path, "print('ready', flush=True)\ntime.sleep(60)", "waiting")
    assert process.stdout is not None
    process.stdout.readline()
    children = children_of(process.pid)
    assert len(children) == 2  # the one that works, and the one that looks after its parent
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(Path(f"/proc/{child}").exists() for child in children)


@pytest.mark.parametrize(
    ("body", "frame"),
    [
        ("def sleeping_reader():\n    time.sleep(60)\nsleeping_reader()", "in sleeping_reader"),
        ("re.match(r'(a+)+$', 'a' * 60 + 'b')", "in match"),  # holds the interpreter's lock for ever
        ("os.kill(os.getpid(), 19)\ntime.sleep(60)", "in work"),  # SIGSTOP
    ],
    ids=["sleeps", "holds the lock", "stopped"],
)
def test_a_hang_is_named_with_its_stacks(tmp_path, body, frame):
    code, output, errors = end(start(tmp_path, body))
    assert (code, output) == (76, "")
    assert "rank 3 on " in errors
    assert "hung: no sign of life for 1 s while working, after step 7" in errors
    assert len(errors.splitlines()) == 1
    assert verdict(tmp_path)["code"] == 76
    stacks = (tmp_path / "stages/phase1/attempts/0001/stacks.txt").read_text()
    assert stacks.startswith("=== rank 3 on ")
    assert frame in stacks


@pytest.mark.slow
def test_waiting_for_others_is_no_hang(tmp_path):
    """Waiting, it may do so for longer than work may take; a busy machine may keep its liveness back for a while."""
    assert end(start(tmp_path, "time.sleep(5)", "waiting", before="module.HANG_S = 2.5")) == (0, "whole\n", "")


@pytest.mark.slow
def test_a_rank_that_waits_keeps_its_stacks_and_leaves_when_a_peer_hangs(tmp_path):
    process = start(tmp_path, "print('ready', flush=True)\ntime.sleep(60)", "waiting")
    assert process.stdout is not None
    process.stdout.readline()
    attempt = tmp_path / "stages/phase1/attempts/0001"
    (attempt / "verdict.json").write_text(json.dumps({"code": 76, "line": "rank 1 hung", "rank": 1}))
    assert end(process)[0] == 76
    assert json.loads((attempt / "verdict.json").read_text())["line"] == "rank 1 hung"
    assert "in work" in (attempt / "stacks.txt").read_text()


def test_an_unfit_gpu_stops_training_cleanly_with_77(tmp_path):
    """The sampler reports a fatal finding: training is asked to stop, and the verdict blames the node."""
    fake = """
class Sick(module.Sampler):
    def __enter__(self):
        self.fatal = {"node": "here", "gpu": 0, "verdict": "fatal", "line": "GPU 0 is lost"}
        self._on_fatal("GPU 0 is lost")
        return self
    def __exit__(self, *problem):
        pass
module.Sampler = Sick
"""
    body = "while job.stop.reason is None: time.sleep(0.01)\nprint(job.stop.reason)"
    process = start(tmp_path, body, "waiting", 0, fake, JOB_VERDICT=str(tmp_path / "told"))
    code, output, errors = end(process)
    assert (code, output) == (77, "SIGUSR2\n"), errors
    assert "GPU 0 is lost; phase1 stops here and goes on without" in errors
    assert (tmp_path / "told").read_text() == f"77 {os.uname().nodename}\n"
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert (event["event"], event["verdict"]) == ("gpu_health", "fatal")


def test_the_limit_grows_with_honest_pauses():
    assert limit_s("working", 0.1) == HANG_S < 60
    assert limit_s("working", 30.0) == 150.0
    assert limit_s("starting", 0.0) == START_S


def test_work_counts_as_starting_until_the_first_step_is_done():
    """Compiling and slow machines: no limit but that of starting, whatever the step that training resumes at."""
    beat = Heartbeat()
    for where, step, told in (
        ("starting", 100, "starting"),
        ("working", 100, "starting"),
        ("waiting", 100, "waiting"),
        ("working", 100, "starting"),
        ("working", 101, "working"),
        ("starting", 101, "starting"),  # again before something that nobody knows the time of
        ("working", 101, "starting"),
        ("working", 102, "working"),
    ):
        beat.beat(where, step)
        assert beat.read().where == told, step


@pytest.mark.slow
def test_a_slow_machine_is_no_hang(tmp_path):
    """Micro-batches of 2.5 s, longer than HANG_S: nothing is known before the first, later five times that is."""
    body = "\n".join(
        [
            "job.heartbeat.beat('starting', 7)",
            *["job.heartbeat.beat('working', 7)", "time.sleep(2.5)"] * 2,
            "job.heartbeat.beat('working', 8)",
            "time.sleep(2.5)",
        ]
    )
    assert end(start(tmp_path, body)) == (0, "whole\n", "")


def test_the_first_pause_of_work_sets_the_limit_only_while_there_is_no_other():
    beat = Heartbeat()
    beat.beat("working", 0)
    time.sleep(0.3)
    beat.beat("working", 0)
    assert beat.read().longest_s >= 0.3
    time.sleep(0.01)
    beat.beat("working", 1)
    assert 0.01 <= beat.read().longest_s < 0.3


@pytest.mark.slow
def test_a_rank_that_nccl_ends_while_it_waits_lost_its_peers(tmp_path):
    code, _, errors = end(start(tmp_path, "os.abort()", "waiting"))
    assert code == 76
    assert "lost its peers: NCCL ended it (SIGABRT) while it waited for them after step 7" in errors
    code, _, errors = end(start(tmp_path / "working", "os.abort()"))
    assert code == 76
    assert "was killed by signal 6 (SIGABRT) after step 7" in errors


def test_a_heartbeat_is_read_by_the_process_that_forked(tmp_path):
    beat = Heartbeat()
    pid = os.fork()
    if pid == 0:
        beat.beat("working", 5)
        time.sleep(0.05)
        beat.beat("waiting", 6)
        os._exit(0)
    os.waitpid(pid, 0)
    found = beat.read()
    assert (found.where, found.step) == ("waiting", 6)
    assert 0.05 <= found.longest_s < 5


@pytest.mark.slow
def test_a_rank_that_is_stopped_while_it_waits_is_found_by_its_pulse(tmp_path):
    code, _, errors = end(start(tmp_path, "os.kill(os.getpid(), 19)\ntime.sleep(60)", "waiting"))
    assert code == 76
    assert "hung" in errors
    assert "while waiting" in errors
