"""Errors with exit codes, and the one place where an exception becomes a line and a code.

Any exception with an ``exit_code`` attribute (also those of data_prep and slurm) is a refusal: one line on
stderr, no traceback unless ``--debug`` (or ``PIPELINE_DEBUG=1``) asks for it.
"""

from __future__ import annotations

import errno
import io
import os
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Literal

from data_prep.errors import escaped

Cause = Literal[
    "signal", "time_limit", "gpu_hours", "peer", "hang", "node", "gpu", "memory", "disk", "numerical", "configuration",
    "data", "checkpoint", "environment", "in_use", "slurm", "defect",
]  # fmt: skip


class PipelineError(Exception):
    """A refusal or a stop: one line saying what, where, the numbers and what to do."""

    exit_code = 1
    cause: Cause | None = None  # where it is more exact than CAUSES[exit_code]


class ConfigError(PipelineError):
    """Recipe, profile or command line is wrong; may hold several lines, one for each error."""

    exit_code = 2


class CheckpointError(PipelineError):
    """A checkpoint or weights file is missing, corrupt or belongs to another model."""

    exit_code = 4


class NumericalError(PipelineError):
    """A loss, gradient or parameter is not finite."""

    exit_code = 5


class StorageError(PipelineError):
    """The file system refused: full, over quota, read-only or failing."""

    exit_code = 6


class EnvironmentFault(PipelineError):
    """A package, library or setting of this machine does not fit."""

    exit_code = 7


class InUseError(PipelineError):
    """Another process or a newer attempt holds the run."""

    exit_code = 8


class SlurmFault(PipelineError):
    """Slurm refused or did not answer."""

    exit_code = 9


class StoppedCleanly(PipelineError):
    """Asked to stop; everything is saved; start me again."""

    exit_code = 75

    def __init__(self, line: str, cause: Cause | None = None) -> None:
        super().__init__(line)
        self.cause = cause


class PeerLost(PipelineError):
    """Another rank died or hung; start me again."""

    exit_code = 76


class DeviceFault(PipelineError):
    """A GPU's program failed in a way that may not come again; start me again."""

    exit_code = 76


class NodeFault(PipelineError):
    """A node computes wrong results or has an unfit GPU; start me again without ``nodes``."""

    exit_code = 77

    def __init__(self, line: str, nodes: tuple[str, ...]) -> None:
        super().__init__(line)
        self.nodes = nodes


RESTART_CODES = (75, 76, 77)
CAUSES: Mapping[int, Cause] = {
    1: "defect", 2: "configuration", 3: "data", 4: "checkpoint", 5: "numerical", 6: "disk", 7: "environment",
    8: "in_use", 9: "slurm", 75: "signal", 76: "peer", 77: "node", 130: "signal",
}  # fmt: skip
"""The cause that an exit code stands for where nobody says a more exact one."""
STORAGE_ERRNOS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO),
    *(errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
)
SERVER_ERRNOS = (  # a file server that went away, and comes back
    *(errno.ESHUTDOWN, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ESTALE),
    *(errno.ECONNRESET, errno.ECONNABORTED, errno.EREMOTEIO),
)


def of_server(error: BaseException | None) -> bool:
    """Whether a file server that went away is the reason of an OSError, or of what is said of a file because of one."""
    if isinstance(error, OSError):
        return error.errno in SERVER_ERRNOS
    of_ours = getattr(error, "exit_code", None) in (3, CheckpointError.exit_code, StorageError.exit_code)
    return error is not None and of_ours and of_server(error.__cause__ or error.__context__)


LIMITS = {errno.EMFILE: "ulimit -n", errno.ENFILE: "sysctl fs.file-max", errno.EAGAIN: "ulimit -u"}


def lacks_memory(error: BaseException) -> bool:
    """Whether this process did not get the memory that it asked for, be it to load a library."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (isinstance(error, ImportError) and "failed to map segment" in str(error))


NO_TF32 = "precision = tf32 needs a CUDA device; use fp32 or bf16 on a CPU"  # when asked, and where it would run
OURS = ("pipeline", "data_prep", "slurm")


def no_package(names: str) -> str:
    """What to say where an interpreter lacks packages."""
    return (
        f"{socket.gethostname()}: {sys.executable} has no package {names}; install it there, or name the interpreter "
        "that has it with python in the cluster profile"
    )


def describe(error: BaseException) -> tuple[str, int]:
    """``(line, exit code)`` of an exception; code 1 marks a defect of ours rather than bad input."""
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        lines = "\n".join(map(escaped, str(error).split("\n")))
        return (f"{lines}; start me again when the server is back", 76) if of_server(error) else (lines, code)
    if isinstance(error, OSError) and error.errno in STORAGE_ERRNOS:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "; make room and start again, what is finished is kept" if full else ""
        where = error.filename or "a file that was being written"
        return escaped(f"storage: {error.strerror}: {where}{advice}"), StorageError.exit_code
    if isinstance(error, OSError) and of_server(error):
        where = error.filename or "a file that was in use"
        return escaped(f"storage: {error.strerror}: {where}; start me again when the server is back"), 76
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] not in OURS:
        return no_package(str(error.name)), EnvironmentFault.exit_code
    if lacks_memory(error):
        return f"out of memory on {socket.gethostname()}; ask for more, or work with fewer processes", 2
    if isinstance(error, OSError) and error.errno in LIMITS:
        limit = LIMITS[error.errno]
        return f"{socket.gethostname()}: {error.strerror}; raise the limit, see {limit}", EnvironmentFault.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    return f"{type(error).__name__}: {error}", 1


def cause_of(error: BaseException) -> Cause:
    """Why an attempt ended, as a word that programs read."""
    if of_server(error):
        return "disk"
    if lacks_memory(error):
        return "memory"
    return getattr(error, "cause", None) or CAUSES.get(describe(error)[1], "defect")


def exit_code_of(work: Callable[[], int | None]) -> int:
    """Do ``work`` and return the documented exit code; what stopped it is printed in one line."""
    try:
        return work() or 0
    except BrokenPipeError as error:
        if error.errno != errno.EPIPE:  # ESHUTDOWN: of a file server
            return _told(error)
        unheard()  # the reader of our output went away (`| head`)
        return 0
    except SystemExit as error:  # by argparse, or said already
        return error.code if isinstance(error.code, int) else 0
    except (Exception, KeyboardInterrupt) as error:
        return _told(error)


def unheard() -> None:
    """What is printed from now on, and what could not be, goes nowhere: nobody reads it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _told(error: BaseException) -> int:
    line, code = describe(error)
    if code == 1 or os.environ.get("PIPELINE_DEBUG"):
        sys.__excepthook__(type(error), error, error.__traceback__)
    print(line, file=sys.stderr)
    return code


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's ``main`` and leave the process with the documented exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold what the terminal's encoding lacks
    sys.exit(exit_code_of(main))
