"""A training process under watch: a child does the work, its parent, free of torch, looks after it.

The parent notices a hang whatever the child's threads do (also one that holds the interpreter's lock, or a stopped
process), keeps the stacks, and watches the node's GPUs without taking time from training.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import select
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, NoReturn

from data_prep.fanout import die_with_parent
from data_prep.publish import APPEND, plain
from pipeline.errors import Cause, exit_code_of
from pipeline.monitor.sampler import Sampler
from pipeline.node.bell import Bell, ring
from pipeline.node.device import too_large
from pipeline.node.heartbeat import Beat
from pipeline.node.job import Job
from pipeline.node.preempt import STOP_SIGNALS
from pipeline.run.gpu_samples import begun_at
from slurm import verdict

HANG_S = 45.0  # without a beat while working; or five times the longest honest pause, if that is more
START_S = 1800.0  # without a beat before the first step is done: imports, hashing all shards, compiling
LOOK_S = 1.0
SUSPENDED_S = 10.0  # this process itself stood still (scontrol suspend): no reason to blame the child
STOPPED_S = 10.0  # between two looks whether the other process is stopped
PEERS_DUMP_S = 5.0  # for the other ranks to keep their stacks, before they see this one die
NCCL_S = 1.0  # for the verdict of a rank that knows better why NCCL gave up
LEAVE_S = 60.0  # for a child that was asked to stop, or whose peers have ended
STACKS = signal.SIGUSR1
Facts = dict[str, Any]  # of a health finding: stage, attempt, node, gpu, uuid, verdict, line


def supervise(job: Job, work: Callable[[], None]) -> None:
    """Run ``work`` in a child process. Raises SystemExit with the child's exit code unless it is 0.

    The child prints its own error line. 76: it was killed, or hung, and then the attempt's ``stacks.txt`` shows where
    every rank was; 77: a GPU of this node is unfit.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    with tempfile.TemporaryFile() as stacks:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # none may come between fork and forwarding
        pid = os.fork()
        if pid == 0:
            _be_child(parent, stacks, job, work)
        with _forwarding(pid), _gpus_watched(job) as unfit:
            code = Watch(job, pid, stacks, unfit).to_the_end()
    if code:
        raise SystemExit(code)


def _be_child(parent: int, stacks: BinaryIO, job: Job, work: Callable[[], None]) -> NoReturn:
    code = 1
    try:
        die_with_parent(parent)
        faulthandler.register(STACKS, file=stacks)  # in C: works whatever holds the interpreter's lock
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        job.heartbeat.show_liveness()
        code = exit_code_of(work)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        _let_go_on(parent)
        os._exit(code)


@contextlib.contextmanager
def looked_after() -> Iterator[None]:
    """Beside all that this process does, and before it has threads: another that lets it go on when it is stopped.

    A job that Slurm suspends stands as a whole, so the other does not look then. A local runner may have been stopped
    by its user's Ctrl-Z: that is only said.
    """
    own = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            die_with_parent(own)
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            _look_after(own)
        finally:
            os._exit(1)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _look_after(pid: int) -> NoReturn:
    runner = int(os.environ.get("PIPELINE_PARENT", "0")) if os.environ.get("LOCAL_RANK", "0") == "0" else 0
    while True:
        time.sleep(STOPPED_S)
        if runner and is_stopped(runner):
            _say(f"the runner, process {runner}, is stopped: nothing follows this stage; fg, or kill -CONT {runner}")
            runner = 0
        if is_stopped(pid):
            time.sleep(LOOK_S)  # a job that is about to be suspended
            if is_stopped(pid):
                _say(f"process {pid} was stopped (SIGSTOP); it goes on")
                _let_go_on(pid)


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        print(f"warning: {line}", file=sys.stderr, flush=True)


def _let_go_on(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # gone meanwhile
        os.kill(pid, signal.SIGCONT)


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped the process; False when it is gone or there is no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


@contextlib.contextmanager
def _forwarding(pid: int) -> Iterator[None]:
    def forward(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    previous = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _gpus_watched(job: Job) -> Iterator[list[Facts]]:
    """Sample the node's GPUs beside its first rank; the list gets the finding that one of them is unfit."""
    unfit: list[Facts] = []
    if job.topology.local_rank != 0:
        yield unfit
        return
    begun = job.patiently(lambda: begun_at(job.run.stage(job.stage))) or time.time()
    labels: dict[str, str | int] = {"stage": job.stage, "attempt": job.attempt.number, "node": socket.gethostname()}

    def warn(line: str, facts: Facts) -> None:
        job.warn(line)
        job.run.event("gpu_health", **facts)

    def end(line: str) -> None:
        unfit.append(sampler.fatal or {"line": line})

    sampler = Sampler(job.run.path / "gpu", labels, say=job.say, on_warning=warn, on_fatal=end, begun=begun)
    with sampler:
        yield unfit


class Watch:
    """Looks at one child every second until it has ended."""

    def __init__(self, job: Job, pid: int, stacks: BinaryIO, unfit: list[Facts]) -> None:
        self.job, self.pid, self.stacks, self.unfit = job, pid, stacks, unfit
        self.host = socket.gethostname()
        self.kills = kernel_kills()
        self.code: int | None = None  # decided here rather than by the child
        self.leave_by: float | None = None
        self.dumped = False
        self.bell = Bell(job.topology, "verdict")

    def to_the_end(self) -> int:
        """The exit code."""
        handle = os.pidfd_open(self.pid)
        poller = select.poll()
        poller.register(handle, select.POLLIN)
        looked = resumed = time.monotonic()
        while not poller.poll(LOOK_S * 1000):
            now = time.monotonic()
            if now - looked > SUSPENDED_S:
                resumed = now
            looked = now
            self._look(now, resumed)
        os.close(handle)
        self.bell.close()
        _, status = os.waitpid(self.pid, 0)
        own = os.waitstatus_to_exitcode(status)
        if self.code is None and own < 0:
            self._killed(-own)
        return own if self.code is None else self.code

    def _killed(self, number: int) -> None:
        """A signal ended the child. NCCL's own watchdog does so with SIGABRT when other ranks do not answer."""
        beat = self.job.heartbeat.read()
        if number == signal.SIGKILL and kernel_kills() > self.kills:
            return self._starved(beat.step)
        what = f"was killed by signal {number} ({signal.Signals(number).name})"
        if number == signal.SIGABRT and beat.where == "waiting":
            time.sleep(NCCL_S)  # the rank that is to blame says so first
            what = "lost its peers: NCCL ended it (SIGABRT) while it waited for them"
        self._decide(76, f"rank {self.job.rank} on {self.host} {what} after step {beat.step}", "peer")

    def _starved(self, step: int) -> None:
        """The kernel killed the child for want of memory: once for a neighbour's fault, twice in a row for its own."""
        line = f"rank {self.job.rank} on {self.host}: killed by the kernel, out of memory, after step {step}"
        number, folder = self.job.attempt.number, self.job.run.stage(self.job.stage)
        before = next((one.verdict for one in reversed(folder.attempts) if one.number < number), None)
        if before is None or before["cause"] != "memory":
            return self._decide(76, f"{line}; a neighbour may have taken it: started again once", "memory")
        name = self.job.stage.partition("-")[0]  # of a seed's stage its task's
        config = self.job.run.settings["recipe"].get(name)
        micro_batch = config.get("micro_batch") if isinstance(config, dict) else None
        return self._decide(2, f"{line}, as before; {too_large(self.job, micro_batch, 'machine')}", "memory")

    def _look(self, now: float, resumed: float) -> None:
        beat = self.job.heartbeat.read()
        still_s = now - max(beat.time_s, resumed)
        if self.leave_by is not None:
            if now > self.leave_by:
                if self.code == 76 and not self.dumped:  # once: on a busy machine a child takes seconds to die
                    self.dumped = True  # and only now: a stopped child goes on for it, and so would its peers
                    self._keep_stacks()
                os.kill(self.pid, signal.SIGKILL)
        elif self.unfit:
            self._stop_for_gpu(now)
        elif beat.where != "waiting" and still_s > limit_s(beat.where, beat.longest_s):
            self._hung(still_s, beat, now)
        elif beat.where != "working" and (silent_s := now - max(beat.alive_s, resumed)) > HANG_S:
            self._hung(silent_s, beat, now)
        elif beat.where != "working" and still_s > PEERS_DUMP_S - LOOK_S:
            self._ask_peers(beat.where, now)

    def _hung(self, still_s: float, beat: Beat, now: float) -> None:
        """This rank is the one that hangs: say so, give the peers time to keep their stacks, and end it."""
        line = (
            f"rank {self.job.rank} on {self.host} hung: no sign of life for {still_s:.0f} s while {beat.where}, after "
            f"step {beat.step}; the stacks of all ranks are in attempts/{self.job.attempt.path.name}/stacks.txt"
        )
        self._decide(76, line, "hang")
        self.leave_by = now + PEERS_DUMP_S

    def _stop_for_gpu(self, now: float) -> None:
        """Let training save what it can, then leave this node."""
        facts = self.unfit[0]
        line = f"{facts['line']}; {self.job.stage} stops here and goes on without {self.host}"
        with contextlib.suppress(OSError):
            self.job.run.event("gpu_health", **facts)
        self._decide(77, line, "gpu", bad_nodes=[self.host])
        os.kill(self.pid, signal.SIGUSR2)
        self.leave_by = now + LEAVE_S

    def _ask_peers(self, where: str, now: float) -> None:
        """While the child waits for others: when one of them has ended the attempt, this rank leaves too."""
        if not self.bell.due():
            return
        try:
            ended = self.job.attempt.verdict
        except OSError:  # a file server that is away says nothing
            return
        if ended is None or ended["rank"] == self.job.rank:
            return
        if ended["code"] == 76:
            self._keep_stacks()
        self.leave_by = now + (PEERS_DUMP_S if where == "starting" else LEAVE_S)  # nothing to save before a step

    def _decide(self, code: int, line: str, cause: Cause, bad_nodes: list[str] | None = None) -> None:
        self.code = code
        if self.job.attempt.write_verdict(code, line, self.job.rank, cause):
            print(line, file=sys.stderr, flush=True)
        ring(self.job.topology, "verdict")
        verdict.give(code, bad_nodes or [])

    def _keep_stacks(self) -> None:
        """Append the child's stacks, all threads, to the attempt's stacks.txt in one write."""
        os.kill(self.pid, signal.SIGCONT)  # a stopped process answers only when it goes on
        os.kill(self.pid, STACKS)
        time.sleep(0.5)
        stacks = os.pread(self.stacks.fileno(), 1 << 20, 0)
        head = f"=== rank {self.job.rank} on {self.host}, process {self.pid}\n".encode()
        with contextlib.suppress(OSError), os.fdopen(plain(self.job.attempt.path / "stacks.txt", APPEND), "ab") as file:
            file.write(head + stacks + b"\n")


def kernel_kills() -> int:
    """How many processes of this one's control group the kernel has killed for want of memory; 0 where nothing says."""
    kills = 0
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            kind, group = line.split(":", 2)[1:]
            files = {
                "": f"/sys/fs/cgroup{group}/memory.events",
                "memory": f"/sys/fs/cgroup/memory{group}/memory.oom_control",
            }
            with contextlib.suppress(OSError):
                match = re.search(r"^oom_kill (\d+)$", Path(files.get(kind, "")).read_text(), re.MULTILINE)
                kills += int(match[1]) if match else 0
    return kills


def limit_s(where: str, longest_s: float) -> float:
    """How long a child may give no sign of life, in seconds."""
    return START_S if where == "starting" else max(HANG_S, 5 * longest_s)
