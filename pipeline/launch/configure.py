"""What a run is made of: recipe, profile and folder of the corpora, from the command line or from the run itself."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

from pipeline import batch
from pipeline.config import Recipe, load_profile, load_recipe, restore
from pipeline.errors import ConfigError
from pipeline.launch import jobs as groups
from pipeline.run.rundir import RunDir, read_json
from slurm.profile import Profile
from slurm.resources import parse_nodes

SLURM_ONLY = ("test-only", "write-scripts", "max-gpu-hours", "allow-mixed")


def configure(run: RunDir, arguments: argparse.Namespace) -> tuple[Recipe, Profile]:
    """Recipe and profile from the command line, else from the run."""
    stored = read_json(run.path / "run.json")
    if stored is None and (arguments.recipe is None or arguments.cluster is None):
        raise ConfigError(f"{run.path} is not a run yet: name a --recipe and a --cluster")
    origin = str(run.path / "run.json")
    if arguments.recipe is not None:
        recipe = load_recipe(arguments.recipe, arguments.settings)
    else:
        recipe = restore(Recipe, (stored or {})["recipe"], origin, arguments.settings)
    if arguments.cluster is not None:
        profile = load_profile(arguments.cluster)
    else:
        profile = restore(Profile, (stored or {})["profile"], origin)
    if arguments.processes is not None:
        if arguments.processes < 1:
            raise ConfigError(f"--processes {arguments.processes}: must be at least 1")
        profile = dataclasses.replace(profile, processes=arguments.processes)
    arguments.nodes = arguments.nodes or str((stored or {}).get("node_range", "1"))
    for name, otherwise in (("max_gpu_hours", 0.0), ("allow_mixed", False)):
        if getattr(arguments, name) is None:
            setattr(arguments, name, (stored or {}).get(name, otherwise))
    ranks, arguments.most_nodes = world_of(profile, arguments)
    return choose_micro_batches(recipe, profile, ranks, stored, arguments.settings), profile


def world_of(profile: Profile, arguments: argparse.Namespace) -> tuple[int, int]:
    """Ranks and nodes of pretraining, at most; ConfigError for Slurm's options where there is no Slurm."""
    if profile.runner == "local":
        given = [flag.name for flag in arguments.flags if flag.name != "nodes"]
        given += [name for name in SLURM_ONLY if getattr(arguments, name.replace("-", "_"))]
        if given or arguments.extra:
            named = ", ".join(f"--{name}" for name in given) or " ".join(arguments.extra)
            raise ConfigError(f"{named}: means nothing to cluster profile {profile.name!r}, which has no Slurm")
        return profile.ranks(1), parse_nodes(arguments.nodes)[1]
    _, resources, _ = groups.request(profile, "pretrain", arguments.nodes, arguments.flags, os.environ)
    return resources.most_tasks, resources.nodes[1]


def choose_micro_batches(
    recipe: Recipe, profile: Profile, ranks: int, stored: dict[str, Any] | None, settings: list[str]
) -> Recipe:
    """The recipe with each phase's micro_batch fixed: chosen when the run is created, kept afterwards."""
    phases = {}
    for name, phase in recipe.phases.items():
        kept = ((stored or {}).get("recipe", {}).get(name) or {}).get("micro_batch")
        if kept and not any(s.startswith(f"{name}.micro_batch=") for s in settings):
            chosen = min(kept, phase.global_batch)
        else:
            limit = micro_batch_limit(recipe, profile, name)
            chosen = batch.plan(phase.global_batch, limit, ranks).micro_batch
        phases[name] = dataclasses.replace(phase, micro_batch=chosen)
    return dataclasses.replace(recipe, phases=phases)


def micro_batch_limit(recipe: Recipe, profile: Profile, phase_name: str) -> int:
    """The recipe's micro_batch limited by the profile's; ConfigError when neither names one."""
    key = f"{recipe.name}.{phase_name}.{recipe.train.precision}"
    given = [value for value in (recipe.phases[phase_name].micro_batch, profile.micro_batch.get(key)) if value]
    if not given:
        raise ConfigError(
            f"no micro_batch for {key}: cluster profile {profile.name!r} has no such key in "
            f"[micro_batch]; add it, or give --set {phase_name}.micro_batch=N"
        )
    return min(given)


def find_data_dir(run: RunDir, profile: Profile, arguments: argparse.Namespace) -> Path:
    """--data, else where the run found its corpora, else (a copy from another site) the folder of the profile."""
    if arguments.data is not None:
        return Path(arguments.data)
    known = run.exists and (arguments.cluster is None or run.data_dir.is_dir())
    return run.data_dir if known else Path(profile.data_dir)
