"""What is not taken from a run.json that others may have written: whatever this user's processes would run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pipeline.config import load_profile
from pipeline.errors import ConfigError
from pipeline.run.files import read_json_of
from pipeline.run.rundir import RunDir
from slurm.profile import PROFILES, Profile


def read(run: RunDir) -> tuple[Mapping[str, Any], bool, str]:
    """run.json, empty where there is none, whether it is this user's own, and its place. ConfigError: damaged."""
    path = run.path / "run.json"
    stored, own = read_json_of(path)
    return run.checked(stored, whole=True) if stored else {}, own, str(path)


def refuse(origin: str, own: bool, takes_profile: bool, profile: Profile, takes_command: bool) -> None:
    """ConfigError where a call would take what its processes are to run from a file that is not its user's own."""
    what = ""
    if own:
        return
    if takes_command:
        what = "its command: name it again, python -m pipeline.guard ... -- COMMAND"
    elif takes_profile and not is_shipped(profile):
        what = f"the profile {profile.name!r}, which says what jobs run: name it again by --cluster"
    if what:
        raise ConfigError(f"{origin}: is another user's, or others may write it, so it is not asked for {what}")


def is_shipped(profile: Profile) -> bool:
    """Whether a profile is one that comes with the pipeline, or this machine's, which names no code to run."""
    if profile.runner == "local":
        return True
    known = profile.name in {path.stem for path in PROFILES.glob("*.toml")}
    return known and dataclasses.replace(load_profile(profile.name), processes=profile.processes) == profile
