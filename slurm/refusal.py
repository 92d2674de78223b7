"""Which option a refusal of sbatch is about. Slurm names the option only when its own client can tell."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from slurm.flags import Setting
from slurm.header import spell

# Slurm's words (slurm_errno.c, and the client's "Invalid --NAME specification") and the options they may be about
ABOUT = (
    (r"--(?P<name>[a-z-]+)", ()),
    ("account|association", ("account",)),  # "account/partition combination"
    ("partition", ("partition",)),
    (r"\bqos\b", ("qos",)),
    ("feature", ("constraint", "prefer")),
    ("node name", ("nodelist", "exclude")),
    ("reservation", ("reservation",)),
    ("license", ("licenses",)),
    (r"generic resource|\bgres\b", ("gres", "gpus-per-node")),
    ("time limit", ("time", "deadline", "time-min")),
    ("node count|more nodes", ("nodes",)),
    ("more processors|cpu count", ("cpus-per-task", "ntasks-per-node", "nodes")),
    ("memory", ("mem", "mem-per-cpu", "mem-per-gpu")),
    ("node configuration", ("nodes", "gpus-per-node", "gres", "cpus-per-task", "mem", "constraint", "tmp")),
)


def blame(words: str, settings: Mapping[str, Setting], extra: Sequence[str] = ()) -> str:
    """`` (--partition=gpu from SBATCH_PARTITION)`` for the options in play that the words may mean; "" without one."""
    names: list[str] = []
    for pattern, about in ABOUT:
        if match := re.search(pattern, words, re.IGNORECASE):
            names += about or [match["name"]]
            break
    known = [f"{spell(name, settings[name].value)} from {settings[name].source}" for name in names if name in settings]
    known += [f"{word} after --" for word in extra if word.removeprefix("--").partition("=")[0] in names]
    return f" ({'; '.join(known)})" if known else ""
