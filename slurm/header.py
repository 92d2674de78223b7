"""sbatch's header: settings as numbers (``Resources``) and words, and the ``#SBATCH`` lines that they become."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

from slurm.errors import FlagError
from slurm.flags import Setting, check_text
from slurm.resources import (
    Resources,
    format_memory,
    format_time,
    parse_count,
    parse_gpus,
    parse_memory_gb,
    parse_nodes,
    parse_time,
)

# settings that are numbers of Resources: the field, and how sbatch reads them
NUMBERS: Mapping[str, tuple[str, Callable[[str], object]]] = {
    "nodes": ("nodes", parse_nodes),
    "time": ("time_min", parse_time),
    "mem": ("mem_gb", parse_memory_gb),
    "exclusive": ("exclusive", str),
    "cpus-per-task": ("cpus_per_task", partial(parse_count, "cpus-per-task")),
    "ntasks-per-node": ("tasks_per_node", partial(parse_count, "ntasks-per-node")),
}


def apply(resources: Resources, settings: Mapping[str, Setting]) -> tuple[Resources, dict[str, Setting]]:
    """Move the settings that are numbers into the resources; returns those and the settings left for the header."""
    left = dict(settings)
    changes = {field: parse(left.pop(name).value) for name, (field, parse) in NUMBERS.items() if name in left}
    if {"mem-per-cpu", "mem-per-gpu"} & left.keys():
        changes["mem_gb"] = None
    changes |= _gpus(left)
    if "gpus_per_node" in changes and "tasks_per_node" not in changes and resources.gpus_per_node:
        changes["tasks_per_node"] = changes["gpus_per_node"]  # one task per GPU stays one task per GPU
    return dataclasses.replace(resources, **changes), left  # type: ignore[arg-type]


def _gpus(left: dict[str, Setting]) -> dict[str, object]:
    """GPUs asked as ``--gpus-per-node`` or as part of ``--gres``; other generic resources stay in ``left``."""
    if "gpus-per-node" in left:
        gpu_type, count = parse_gpus(left.pop("gpus-per-node").value)
        return {"gpu_type": gpu_type, "gpus_per_node": count, "gpu_request": "gpus-per-node"}
    if "gres" not in left:
        return {}
    setting = left.pop("gres")
    parts = [part for part in setting.value.split(",") if part]
    gpus = [part for part in parts if part == "gpu" or part.startswith("gpu:")]
    if others := [part for part in parts if part not in gpus]:
        left["gres"] = Setting(",".join(others), setting.source)
    if not gpus:
        return {}
    gpu_type, count = parse_gpus(gpus[0].partition(":")[2] or "1", "--gres=gpu")
    return {"gpu_type": gpu_type, "gpus_per_node": count, "gpu_request": "gres"}


def header(resources: Resources, settings: Mapping[str, Setting]) -> list[tuple[str, str]]:
    """(option, value) pairs of an sbatch header, sorted; never a task count.

    Without a task count sbatch counts one task per node, so ``--cpus-per-task`` here is the whole node's share; the
    srun line divides it again.
    """
    least, most = resources.nodes
    asked = {"nodes": str(least) if least == most else f"{least}-{most}"}
    if resources.cpus_per_task is not None or (resources.tasks_per_node > 1 and resources.exclusive is None):
        asked["cpus-per-task"] = str((resources.cpus_per_task or 1) * resources.tasks_per_node)
    if resources.mem_gb is not None:
        asked["mem"] = format_memory(resources.mem_gb)
    if resources.time_min is not None:
        asked["time"] = format_time(resources.time_min)
    if resources.exclusive is not None:
        asked["exclusive"] = resources.exclusive
    other = {name: setting.value for name, setting in settings.items()}
    if resources.gpus_per_node:
        gpus = ":".join(part for part in (resources.gpu_type, str(resources.gpus_per_node)) if part)
        if resources.gpu_request == "gres":
            other["gres"] = ",".join([f"gpu:{gpus}", *([other["gres"]] if "gres" in other else [])])
        else:
            asked["gpus-per-node"] = gpus
    if other.get("requeue") == "no":
        del other["requeue"]
        other["no-requeue"] = ""
    for name, value in other.items():
        check_text(f"--{name}", value)
    return sorted((other | asked).items())


def spell(name: str, value: str) -> str:
    """One word for an argv list: ``--name=value``, ``--name`` without a value."""
    return f"--{name}={value}" if value else f"--{name}"


def header_line(name: str, value: str) -> str:
    """One ``#SBATCH`` line, quoted as sbatch reads it: a backslash escapes inside double quotes, ``#`` would end it."""
    if not value:
        return f"#SBATCH --{name}"
    plain = all(character.isalnum() or character in "._-/=:,@%+[]" for character in value)
    quoted = value if plain else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"#SBATCH --{name}={quoted}"


def path_pattern(folder: str, ending: str) -> str:
    """A log file name for sbatch: ``%`` of the folder escaped, ``ending`` may hold sbatch's own ``%j``.

    FlagError for a backslash, which makes sbatch take the whole pattern literally.
    """
    check_text("log folder", folder)
    if "\\" in folder:
        raise FlagError(f"{folder}: a backslash in a path makes sbatch ignore %j in log names; use another folder")
    return folder.replace("%", "%%") + "/" + ending
