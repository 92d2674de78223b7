"""A stage that is somebody's command (``pipeline.guard``): started as a rank, stopped by TERM, judged by its end."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.fanout import die_with_parent
from data_prep.publish import APPEND, plain
from pipeline.errors import ConfigError, NodeFault, PeerLost, StoppedCleanly
from pipeline.node.bell import until
from pipeline.node.device import DEFAULTS
from pipeline.node.job import LOOPBACK, Job, rendezvous_host
from slurm import verdict
from slurm.environment import this_node

LOOK_S = 0.2  # between two looks whether the command has ended, or shall
SETTLE_S = 5.0  # what it saves counts once it has stood unchanged for so long
FINAL = (2, 126, 127)  # wrong words, no such program: starting it again mends nothing
PORTS = range(20_000, 32_000)  # below those that systems give away


def run(job: Job, *, command: Sequence[str], saves: str) -> dict[str, Any]:
    """Run the command to its end as this rank; returns when those of all ranks have ended with 0.

    Asked to stop, it gets SIGTERM and is started again later, whatever its code; so it is after 75, after 77 on other
    nodes, and after any other code but 2, 126 and 127 as long as ``saves``, a path from the run's folder, changes.
    Raises StoppedCleanly, NodeFault, PeerLost, ConfigError.
    """
    job.heartbeat.beat("waiting", 0)  # how often a stranger's loop shows life is not known
    path = job.run.path / saves
    counted = seen = newest(path)
    looked, is_told = time.monotonic(), False
    with started(job, command) as process:
        while (code := process.poll()) is None:
            time.sleep(LOOK_S)
            if job.stop.asked() and not is_told:
                is_told = True
                process.terminate()
            if job.rank == 0 and time.monotonic() - looked > SETTLE_S:
                looked, before, seen = time.monotonic(), seen, newest(path)
                if seen is not None and counted != seen == before:
                    counted = seen
                    verdict.made_progress()
    judge(job, code)
    os.close(plain(job.attempt.path / f"ended-{job.rank}", APPEND))
    if not until(job.topology, "done", lambda: all_ended(job), math.inf, opens=2, asked=job.stop.asked):
        judge(job, code)  # it may have been asked to stop meanwhile
        raise PeerLost(f"rank {job.rank}: its command ended with 0, another rank's did not")
    return {"command": list(command)}


def judge(job: Job, code: int) -> None:
    """Raise what the exit code of a command means; nothing for 0, unless it was asked to stop."""
    ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    line = f"rank {job.rank} on {this_node()}: the command {ended}"
    if job.stop.asked():
        raise StoppedCleanly(f"{line} after {job.stop.reason}", job.stop.cause)
    if code == StoppedCleanly.exit_code:
        raise StoppedCleanly(line)
    if code == NodeFault.exit_code:
        raise NodeFault(f"{line}: a bad node", (this_node(),))
    if code in FINAL:
        raise ConfigError(f"{line}, so it is not started again; look at its last lines in {job.attempt.log}")
    if code:
        raise PeerLost(line)


def all_ended(job: Job) -> bool | None:
    """Whether the commands of all ranks have ended with 0; None while it is not known."""
    if job.attempt.verdict or job.stop.asked():
        return False
    if job.rank > 0:
        return True if job.run.stage(job.stage).done else None
    return True if sum(1 for _ in job.attempt.path.glob("ended-*")) == job.world_size else None


@contextmanager
def started(job: Job, command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """The command at work, killed at the end if it still is; what rank 0's says is in the stage's log, too."""
    parent, to_log = os.getpid(), job.rank == 0

    def begin() -> None:
        die_with_parent(parent)
        # Slurm's warning reaches all processes of a step: ours hands it on, as SIGTERM
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)

    try:
        process = subprocess.Popen(
            command,
            env=environment(job, os.environ),
            stdout=subprocess.PIPE if to_log else None,
            stderr=subprocess.STDOUT if to_log else None,
            text=True,
            errors="replace",
            preexec_fn=begin,
        )
    except OSError as error:
        where = f"{socket.gethostname()}:{os.getcwd()}"
        raise ConfigError(f"{command[0]}: cannot be started on {where}: {error.strerror}") from None

    def show() -> None:
        for line in process.stdout or ():
            job.say(line.rstrip("\n"))

    reader = threading.Thread(target=show, name="output", daemon=True)
    reader.start()
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        reader.join(SETTLE_S)  # a process that it left behind may hold its output open


def environment(job: Job, inherited: Mapping[str, str]) -> dict[str, str]:
    """The variables as the user left them, without those for our own ranks; the rank's place by torchrun's names."""
    own = {name: value for name, value in inherited.items() if DEFAULTS.get(name) != value}
    ours = str(job.run.path.resolve() / "code")
    if own.get("PYTHONPATH", "").startswith(f"{ours}/"):
        for name in ("PYTHONSAFEPATH", "PYTHONDONTWRITEBYTECODE"):
            own.pop(name, None)
        own["PYTHONPATH"] = own["PYTHONPATH"].partition(":")[2]
    place = job.topology
    host = rendezvous_host()
    if host != LOOPBACK:
        host = str(job.attempt.owner.get("host", host))
    return own | {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_RANK": str(place.local_rank),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(PORTS[zlib.crc32(place.launch.encode()) % len(PORTS)]),
        "PYTHONUNBUFFERED": "1",
    }


def newest(path: Path) -> tuple[float, int] | None:
    """When what lies at ``path`` was last changed, by the file system's clock, and how many files it is.

    None while it changes, or cannot be read.
    """
    try:
        times = [file.lstat().st_mtime for file in [path, *path.rglob("*")] if file.is_file()]
    except OSError:
        return None
    return max(times, default=0.0), len(times)
