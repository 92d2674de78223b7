"""The code of a run: a copy of the packages in ``RUN/code``, in a folder that is named by the SHA-256 of its content.

The jobs of a chain run the copy, whatever becomes of the checkout meanwhile. The batch script computes the same
digest before it starts anything (``slurm/job.sh``): of the lines ``SHA-256  ./path``, sorted by path.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import stat
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pipeline
from pipeline.errors import EnvironmentFault
from pipeline.run.files import OF_OTHERS
from pipeline.run.rundir import RunDir

ROOT = Path(pipeline.__file__).parents[1]  # the checkout
PACKAGES = ("pipeline", "data_prep", "slurm")


def shipped(root: Path = ROOT) -> list[str]:
    """The packages' files, as ``pipeline/words.py``: no byte code, no hidden files."""
    paths = (path for package in PACKAGES for path in (root / package).rglob("*") if path.is_file())
    names = (path.relative_to(root).parts for path in paths)
    return ["/".join(parts) for parts in names if not any(part.startswith((".", "__pycache__")) for part in parts)]


def digest(root: Path = ROOT, names: list[str] | None = None) -> str:
    """The SHA-256 that stands for the content of these files under ``root``; by default of the packages."""
    lines = hashlib.sha256()
    for name in sorted(shipped(root) if names is None else names):
        lines.update(f"{hashlib.sha256((root / name).read_bytes()).hexdigest()}  ./{name}\n".encode())
    return lines.hexdigest()


def folder(run: RunDir, digest: str) -> Path:
    return run.path / "code" / digest


def of_run(stored: Mapping[str, Any]) -> str:
    """The digest of the code with which a run began, by its run.json; this checkout's where none stands there."""
    noted = str(stored.get("code"))
    return noted if re.fullmatch(r"[0-9a-f]{64}", noted) else digest()


def is_intact(copy: Path) -> bool:
    """Whether a copy still is what its name says, with nothing added, and ours.

    Who else may write into the run folder could leave a copy of other code there, with its right name; of files of
    ours, too, that he may write.
    """
    every = [copy, *copy.rglob("*")] if os.path.lexists(copy) else []
    kinds = (stat.S_IFREG, stat.S_IFDIR)
    for status in map(os.lstat, every):
        if status.st_uid != os.geteuid() or status.st_mode & OF_OTHERS or stat.S_IFMT(status.st_mode) not in kinds:
            return False
    paths = [path for path in every if not path.is_dir()]
    return digest(copy, [str(path.relative_to(copy)) for path in paths]) == copy.name


def version() -> tuple[str, str]:
    """Commit of this checkout and the packages' diff against it; empty strings outside a checkout."""

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, timeout=20, check=False)
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.decode(errors="replace") if done.returncode == 0 else ""

    return git("rev-parse", "HEAD").strip(), git("diff", "HEAD", "--", *PACKAGES)


def keep(run: RunDir, wanted: str) -> None:
    """See to it that the run has a copy of the code with this digest, readable and never writable by others.

    EnvironmentFault (7) where it is missing, changed or somebody else's and this checkout is no longer the same.
    """
    copy = folder(run, wanted)
    if is_intact(copy):
        return
    if digest() != wanted:
        raise EnvironmentFault(
            f"{copy}: the code of this run is missing, changed or somebody else's, and this checkout differs from "
            f"it; --upgrade goes on with this checkout's"
        )
    temporary, aside = (copy.with_name(f".{kind}-{secrets.token_hex(4)}") for kind in ("new", "old"))
    for name in shipped():
        target = temporary / name
        for missing in [path for path in reversed(target.parents) if not path.exists()]:
            missing.mkdir(mode=0o755)
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)
        with open(descriptor, "wb") as file:
            file.write((ROOT / name).read_bytes())
    if copy.exists():
        os.rename(copy, aside)
    os.rename(temporary, copy)
    shutil.rmtree(aside, ignore_errors=True)
