"""Whether there is room for a training's checkpoints, asked before it begins: free space, and the user's quota."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import StorageError

QUESTIONS = (  # both answer on one line: file system, KiB used, soft limit, hard limit, …
    ("lfs", "quota", "-q", "-u", "{user}", "{mount}"),
    ("quota", "-v", "-w", "-p", "-f", "{mount}"),
)
PATIENCE_S = 10.0  # an NFS server that does not answer must not keep a training from beginning


def preflight(stage_dir: Path, checkpoint_bytes: int, keep: int) -> str:
    """One line about the room for ``keep`` checkpoints and the one being written; says what cannot be known.

    What the stage's older checkpoints occupy counts as room. Raises StorageError where it is sure not to suffice.
    """
    old = sum(path.stat().st_size for path in stage_dir.glob("attempts/*/step-*/*.safetensors"))
    needed = (keep + 1) * checkpoint_bytes - min(old, keep * checkpoint_bytes)
    free, left = shutil.disk_usage(stage_dir).free, quota_left(stage_dir)
    quota = {None: "not known", math.inf: "none"}.get(left) or f"{size(left or 0)} left"
    facts = f"{keep + 1} checkpoints of {size(checkpoint_bytes)} need {size(needed)} more, {size(free)} are free"
    if needed > min(free, math.inf if left is None else left):
        raise StorageError(
            f"{stage_dir}: {facts}, quota {quota}; free some space, or move the run to another file system"
        )
    return f"{facts}, quota {quota}"


def quota_left(folder: Path) -> float | None:
    """Bytes that the user may still write on the file system of ``folder``: inf without a quota, None if unknown."""
    mount = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.is_mount())
    for question in QUESTIONS:
        command = [word.format(user=os.getuid(), mount=mount) for word in question]
        if shutil.which(command[0]) is None:
            continue
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if (left := limit_less_use(done.stdout.split("\n"))) is not None:
            return left
    return None


def limit_less_use(lines: Sequence[str]) -> float | None:
    """Bytes from the last line that has a use and limits in KiB; None where there is none."""
    for words in (line.replace("*", "").split() for line in reversed(lines)):
        if len(words) >= 4 and words[1].isdecimal() and words[3].isdecimal():
            used, limit = int(words[1]), int(words[3])
            return max(0, limit - used) * 1024 if limit else math.inf
    return None


def size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
