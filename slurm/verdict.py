"""What an attempt of a job tells the batch script: why it ended, and that it made progress.

srun mixes the exit codes of the ranks, so the first rank that knows better leaves a line: ``CODE [NODE …]``. Every
attempt notes itself when it starts; progress strikes all notes out, and when ``TRIES_WITHOUT_PROGRESS`` of them have
come together the job is not started again.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable, Mapping
from typing import Literal, TextIO

VERDICT = "JOB_VERDICT"  # path of the verdict of this attempt
TRIES = "JOB_TRIES"  # path of the list of attempts since the last progress, one a line
DEADLINE = "JOB_DEADLINE"  # when this attempt must end, in seconds since 1970; absent when there is no limit
LIMIT = "JOB_LIMIT"  # "gpu_hours" where the deadline is not that of Slurm's time limit
TRIES_WITHOUT_PROGRESS = 2
LEAST_S = 60  # of the allowed GPU time: with less left nothing is started


def give(code: int, bad_nodes: Iterable[str] = (), environ: Mapping[str, str] | None = None) -> bool:
    """Leave the verdict of this attempt; False when another rank was first, or nobody waits for one or can read it."""
    path = (os.environ if environ is None else environ).get(VERDICT)
    if not path:
        return False
    nodes = [node for node in bad_nodes if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", node)]
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except OSError:
        return False
    try:
        os.write(handle, (" ".join([str(code), *nodes]) + "\n").encode())
        os.fsync(handle)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def read_over(path: str | os.PathLike[str]) -> tuple[int, str] | None:
    """Exit code and reason of a job that its batch script ended for good; None where it did not."""
    try:
        with _plain(path, os.O_RDONLY) as file:
            line = re.match(r"([0-9]{1,3}) (.{1,300})", file.read(4096))
    except (FileNotFoundError, FileExistsError):
        return None
    return (int(line[1]), line[2]) if line else None


def _plain(path: str | os.PathLike[str], flags: int) -> TextIO:
    """A file, opened; FileExistsError where a pipe, which would be waited for, or a link was planted in its place.

    As `data_prep.publish.plain`, of which this package, which stands alone, knows nothing.
    """
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
    else:
        if stat.S_ISREG(os.fstat(handle).st_mode):
            return os.fdopen(handle, "r" if flags == os.O_RDONLY else "a", encoding="utf-8", errors="replace")
        os.close(handle)
    raise FileExistsError(errno.EEXIST, "no plain file lies there, take it away", os.fspath(path))


def begin_try(name: str, path: str | os.PathLike[str]) -> None:
    """Note an attempt before it starts; the batch script does the same with ``echo``."""
    with _plain(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as file:
        file.write(f"{name}\n")


def may_try_again(path: str | os.PathLike[str]) -> bool:
    """Whether fewer than ``TRIES_WITHOUT_PROGRESS`` attempts have started since the last progress."""
    try:
        with _plain(path, os.O_RDONLY) as file:
            return file.read(1 << 16).count("\n") < TRIES_WITHOUT_PROGRESS
    except FileNotFoundError:
        return True


def made_progress(environ: Mapping[str, str] | None = None) -> None:
    """Strike the attempts out: called when something new is safely stored."""
    path = (os.environ if environ is None else environ).get(TRIES)
    if path:
        try:
            os.unlink(path)
        except FileNotFoundError:
            return


def deadline(environ: Mapping[str, str] | None = None) -> float | None:
    """When this attempt must end, in seconds since 1970; None without a limit."""
    text = (os.environ if environ is None else environ).get(DEADLINE, "")
    return float(text) if re.fullmatch(r"\d{1,12}", text, re.ASCII) else None


def limit(environ: Mapping[str, str] | None = None) -> Literal["time_limit", "gpu_hours"]:
    """Which limit the deadline of this attempt is."""
    return "gpu_hours" if (os.environ if environ is None else environ).get(LIMIT) == "gpu_hours" else "time_limit"
