"""Which variables of the shell around reach what we start; the one list of them is ``foreign`` in ``job.sh``."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

KEPT = ("SLURM_CONF", "SLURM_JWT", "SLURM_SACK_SOCKET")
JOB_SH = Path(__file__).with_name("job.sh").read_text(encoding="utf-8")
FOREIGN = re.search(r"^foreign='(.*?)'$", JOB_SH, re.DOTALL | re.MULTILINE)[1].split()  # type: ignore[index]
OF_SLURM = ("SLURM*", "SBATCH_*")


def this_node() -> str:
    """This node by the name that Slurm knows; a host's own may have a domain behind it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def clean(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for Slurm's commands and for processes of this machine's own.

    Without habits of the user's squeue, and without traces of a job or an mpiexec that we run in. SBATCH_* goes as
    well: its values were resolved into the script (see ``slurm.flags``).
    """
    source = os.environ if environ is None else environ
    patterns = (*OF_SLURM, *FOREIGN)
    return {
        name: value
        for name, value in source.items()
        if name in KEPT or not any(fnmatchcase(name, pattern) for pattern in patterns)
    }
