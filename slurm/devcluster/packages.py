"""Whether Slurm is on this machine, and bringing it there with apt-get when that is allowed."""

from __future__ import annotations

import os

from slurm.command import run, which
from slurm.errors import SlurmError

SLURM = ("slurm-wlm", "slurm-client", "slurmd", "slurmctld", "munge", "iproute2", "util-linux")
DATABASE = ("slurmdbd", "mariadb-server", "slurm-wlm-mysql-plugin")
SLURM_PROGRAMS = ("munged", "slurmctld", "slurmd", "sinfo", "srun", "sbatch")
DATABASE_PROGRAMS = ("slurmdbd", "mariadbd", "mariadb-install-db", "mariadb")


def ensure(accounting: bool, install: bool) -> str:
    """Install what is missing; returns a line saying what was done, or "". SlurmError says why not."""
    wanted = [*SLURM_PROGRAMS, *(DATABASE_PROGRAMS if accounting else ())]
    missing = [program for program in wanted if which(program) is None]
    if not missing:
        return ""
    packages = [*(SLURM if set(missing) & set(SLURM_PROGRAMS) else ()), *(DATABASE if accounting else ())]
    by_hand = f"apt-get install --no-install-recommends {' '.join(packages)}"
    absent = f"{', '.join(missing)}: not installed"
    if not install:
        raise SlurmError(f"{absent}, and --no-install was given; run: {by_hand}")
    if os.geteuid() != 0:
        raise SlurmError(f"{absent}, and only root may install packages; ask root to run: {by_hand}")
    if which("apt-get") is None:
        raise SlurmError(f"{absent}, and there is no apt-get here; install Slurm and munge with this system's tool")
    _apt_get(packages)
    still = [program for program in wanted if which(program) is None]
    if still:
        raise SlurmError(f"{', '.join(still)}: still missing after {by_hand}")
    return f"installed {', '.join(packages)}"


def _apt_get(packages: list[str]) -> None:
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}  # RUNLEVEL=1: start no service
    command = [
        "apt-get",
        "-o",
        "DPkg::Lock::Timeout=120",
        "install",
        "-y",
        "-qq",
        "--no-install-recommends",
        *packages,
    ]
    answer = run(command, timeout_s=300, env=env)
    if not answer.ok:  # the usual cause is a package list that was never fetched, or is stale
        run(["apt-get", "update", "-qq"], timeout_s=120, env=env)
        answer = run(command, timeout_s=300, env=env)
    if not answer.ok:
        raise SlurmError(f"apt-get install {' '.join(packages)}: {answer.said}")
