"""Run one command by argv list, with a time limit, and give back what it said. No shell is ever involved."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from slurm.errors import SlurmError

SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a command left: exit code and text; ``timed_out`` when it was killed by our limit."""

    argv: tuple[str, ...]
    code: int
    out: str
    err: str
    timed_out: bool = False

    @property
    def ok(self) -> bool:
        return self.code == 0

    @property
    def said(self) -> str:
        """The last line it said (stderr first), for a one-line error."""
        for text in (self.err, self.out):
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            if lines:
                return lines[-1]
        return f"exit code {self.code} without a word"


def which(program: str, env: Mapping[str, str] | None = None) -> str | None:
    """Path of a program on PATH, or in the sbin folders that an ordinary user's PATH leaves out."""
    path = (os.environ if env is None else env).get("PATH", os.defpath)
    return shutil.which(program, path=os.pathsep.join((path, *SBIN)))


def run(
    argv: Sequence[str],
    *,
    timeout_s: float = 30.0,
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
    cwd: str | os.PathLike[str] | None = None,
) -> Answer:
    """Run ``argv``; never raises for a failing command, only (SlurmError) for a program that is not there."""
    program = which(argv[0], env)
    if program is None:
        raise SlurmError(f"{argv[0]}: not found on PATH; is Slurm installed on this machine?")
    environment = dict(os.environ if env is None else env)
    environment["LC_ALL"] = "C.UTF-8"
    try:
        done = subprocess.run(
            [program, *argv[1:]],
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env=environment,
            cwd=cwd,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        out = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        err = f"{argv[0]}: no answer within {timeout_s:g} s"
        return Answer(argv=tuple(argv), code=124, out=out, err=err, timed_out=True)
    except (OSError, ValueError) as error:
        raise SlurmError(f"{argv[0]}: cannot be run: {error}") from None
    return Answer(argv=tuple(argv), code=done.returncode, out=done.stdout, err=done.stderr)
