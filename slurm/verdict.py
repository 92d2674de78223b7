"""Why an attempt of a job ended, written by the rank that failed first and read by the batch script.

srun mixes the exit codes of the ranks, so the first rank that knows better leaves a line: ``CODE [NODE …]``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

VERDICT = "JOB_VERDICT"  # path of the verdict of this attempt
CRASHES = "JOB_CRASHES"  # path of the list of attempts that ended without a verdict; removed on progress
DEADLINE = "JOB_DEADLINE"  # end of the allocation, in seconds since 1970; absent when there is no limit
RESTART = (75, 76, 77)  # stopped cleanly, peer lost, bad node: the batch script asks for a requeue


def give(code: int, bad_nodes: Iterable[str] = (), environ: Mapping[str, str] | None = None) -> bool:
    """Leave the verdict of this attempt; False when another rank was first, or no batch script waits for one."""
    path = (os.environ if environ is None else environ).get(VERDICT)
    if not path:
        return False
    nodes = [node for node in bad_nodes if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", node)]
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return False
    try:
        os.write(handle, (" ".join([str(code), *nodes]) + "\n").encode())
        os.fsync(handle)
    finally:
        os.close(handle)
    return True


def made_progress(environ: Mapping[str, str] | None = None) -> None:
    """Forget earlier crashes: called when something new is safely stored."""
    path = (os.environ if environ is None else environ).get(CRASHES)
    if path:
        try:
            os.unlink(path)
        except FileNotFoundError:
            return


def deadline(environ: Mapping[str, str] | None = None) -> float | None:
    """When Slurm will end this job, in seconds since 1970; None without a limit."""
    text = (os.environ if environ is None else environ).get(DEADLINE, "")
    return float(text) if re.fullmatch(r"\d{1,12}", text, re.ASCII) else None
