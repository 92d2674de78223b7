"""Runs that share their data: FAMILY/data makes the data, and the others read them through links."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.run.rundir import RunDir

DATA = "data"


def runs_of(path: Path) -> list[RunDir]:
    """A family's runs, the one with the data first and then by name and number; of any other folder the run it is."""
    if (path / "run.json").exists() or not (path / DATA / "run.json").is_file():
        return [RunDir(path)]
    members = [file.parent for file in path.glob("*/run.json") if file.parent.name != DATA and file.is_file()]
    return [RunDir(path / DATA), *map(RunDir, sorted(members, key=_by_number))]


def _by_number(path: Path) -> tuple[str, int]:
    stem, _, number = path.name.rpartition("-")
    return (stem, int(number)) if number.isdecimal() else (path.name, 0)


def link(run: RunDir, stages: Iterable[str]) -> None:
    """Let a run find the family's data. ConfigError where it has data of its own."""
    (run.path / "stages").mkdir(parents=True, exist_ok=True)
    for name in stages:
        path, target = run.stage(name).path, f"../../{DATA}/stages/{name}"
        if not path.is_symlink():
            if path.exists():
                raise ConfigError(f"{path}: this run made its own; name a --run that is new, or move it out of the way")
            path.symlink_to(target)
        elif os.readlink(path) != target:
            raise ConfigError(f"{path}: a link to {os.readlink(path)}, not to {target}; take it away")
