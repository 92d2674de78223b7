"""Runs that differ by their seed only: FAMILY/data makes the data, and the others read it through links."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.run.rundir import RunDir


def runs_of(path: Path) -> list[RunDir]:
    """A family's runs, the one with the data first and then by seed; of any other folder the run that it is."""
    seeds = [run for run in path.glob("seed-*") if (run / "run.json").is_file() and run.name[5:].isdecimal()]
    if (path / "run.json").exists() or not (path / "data" / "run.json").is_file():
        return [RunDir(path)]
    return [RunDir(run) for run in (path / "data", *sorted(seeds, key=lambda run: int(run.name[5:])))]


def link(run: RunDir, stages: Iterable[str]) -> None:
    """Let a seed's run find the family's data. ConfigError where it has data of its own."""
    (run.path / "stages").mkdir(parents=True, exist_ok=True)
    for name in stages:
        path, target = run.stage(name).path, f"../../data/stages/{name}"
        if not path.is_symlink():
            if path.exists():
                raise ConfigError(f"{path}: this run made its own; name a --run that is new, or move it out of the way")
            path.symlink_to(target)
        elif os.readlink(path) != target:
            raise ConfigError(f"{path}: a link to {os.readlink(path)}, not to {target}; take it away")
