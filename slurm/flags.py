"""Users' Slurm flags, under Slurm's own names and letters, and the only place that spells them for sbatch.

Where a value comes from: flag > SBATCH_* environment > profile > hint of the recipe. Source of the table: sbatch(1).
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from slurm.errors import FlagError
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


@dataclass(frozen=True)
class Option:
    """One sbatch option. ``argument``: "yes", "may" (only as ``--name=value``) or "no".

    ``whole_chain``: a bare flag means every job; otherwise the section that bare flags mean.
    """

    name: str
    letter: str = ""
    argument: str = "yes"
    whole_chain: bool = False
    env: str = ""


# One option: name, letter, argument (y yes, m may, n no; c: a bare flag concerns the whole chain), variable.
# The variable is "-" for none and left out for SBATCH_NAME.
_TABLE = """
account A yc|acctg-freq|batch|bb - y -|bbf - y -|begin b yc -|chdir D yc -|clusters M yc|cluster-constraint - y -
comment - yc -|constraint C|container|contiguous - n -|core-spec S|cores-per-socket - y -|cpu-freq - y -
cpus-per-gpu|cpus-per-task c y -|deadline - yc -|delay-boot|distribution m|exclude x y -|exclusive - m|export - yc
extra-node-info B y -|get-user-env - mc|gpu-bind|gpu-freq|gpus-per-node|gres|gres-flags|hint|hold H nc -
job-name J yc|kill-on-invalid-dep - yc -|licenses L y -|mail-type - yc -|mail-user - yc -|mcs-label - yc -
mem - y SBATCH_MEM_PER_NODE|mem-bind|mem-per-cpu|mem-per-gpu|mincpus - y -|network|nice - mc -|no-kill k m
nodefile F y -|nodelist w y -|nodes N y -|ntasks-per-core - y -|ntasks-per-node - y -|ntasks-per-socket - y -
overcommit O n|oversubscribe s n -|partition p|power|prefer - y -|priority - yc -|profile|propagate - mc -|qos q
reboot - n -|requeue - nc|reservation|signal|sockets-per-node - y -|spread-job - n|switches - y SBATCH_REQ_SWITCH
thread-spec|threads-per-core|time t y SBATCH_TIMELIMIT|time-min - y -|tmp - y -|use-min-nodes - n|wait-all-nodes
wckey - yc
"""
REFUSED = {
    "array": "a stage is one job, not an array",
    "dependency": "the chain sets the dependencies itself",
    "error": "logs go to the run folder",
    "gpus": "ask for GPUs per node, with --gpus-per-node",
    "gpus-per-socket": "ask for GPUs per node, with --gpus-per-node",
    "gpus-per-task": "GPUs bound to tasks hide each other from NCCL; use --gpus-per-node",
    "input": "jobs read no standard input",
    "ntasks": "a task count would freeze the number of nodes; use --nodes and --ntasks-per-node",
    "ntasks-per-gpu": "use --ntasks-per-node",
    "open-mode": "logs of a requeued job are always appended",
    "output": "logs go to the run folder",
    "parsable": "submit prints the job ids itself",
    "wait": "submit never waits; use the status command",
    "wrap": "the chain sets the commands itself",
}
REFUSED_LETTERS = dict(
    pair.split()
    for pair in ["a array", "d dependency", "e error", "G gpus", "i input", "n ntasks", "o output", "W wait"]
)
# options of which sbatch takes one: the one of the stronger source removes the others
ALTERNATIVES = ({"mem", "mem-per-cpu", "mem-per-gpu"}, {"exclusive", "oversubscribe"}, {"gres", "gpus-per-node"})


def _read_table() -> dict[str, Option]:
    options = {}
    for row in _TABLE.replace("\n", "|").split("|"):
        fields = row.split()
        if fields:
            name, letter, how, env = (fields + ["-", "y", ""][len(fields) - 1 :])[:4]
            env = {"": f"SBATCH_{name.upper().replace('-', '_')}", "-": ""}.get(env, env)
            argument = {"y": "yes", "m": "may", "n": "no"}[how[0]]
            options[name] = Option(name, letter.replace("-", ""), argument, "c" in how, env)
    return options


OPTIONS = _read_table()
LETTERS = {option.letter: option.name for option in OPTIONS.values() if option.letter}
REMOVED = "\0removed"  # never a user's value: control characters are refused


@dataclass(frozen=True)
class Flag:
    """A flag as given: canonical name, value ("" for none), section it was addressed to ("" for a bare flag)."""

    name: str
    value: str
    section: str = ""


@dataclass(frozen=True)
class Setting:
    """A resolved value ("" for an option without one) and where it came from, in words."""

    value: str
    source: str


@dataclass(frozen=True)
class CommandLine:
    """A command line taken apart: Slurm's flags, what follows ``--``, and the rest for argparse."""

    flags: tuple[Flag, ...]
    passthrough: tuple[str, ...]
    rest: tuple[str, ...]


def split(argv: Sequence[str], *, sections: Collection[str] = (), own: Collection[str] = ()) -> CommandLine:
    """Take Slurm's flags out of a command line; options in ``own`` (``--run``, ``-v``) stay in the rest.

    Raises FlagError for a refused flag, a missing or surplus value, a control character.
    """
    flags: list[Flag] = []
    rest: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "--":
            return CommandLine(tuple(flags), tuple(words), tuple(rest))
        name = word.partition("=")[0]
        if not word.startswith("-") or word == "-" or name in own or (word[1] != "-" and word[:2] in own):
            rest.append(word)
        elif word.startswith("--"):
            if not (flag := _long(word, words, sections)):
                rest.append(word)
            else:
                flags.append(flag)
        elif word[1] in LETTERS or word[1] in REFUSED_LETTERS:
            flags += _short(word[1:], words, sections)
        else:
            rest.append(word)
    return CommandLine(tuple(flags), (), tuple(rest))


def _long(word: str, words: list[str], sections: Collection[str]) -> Flag | None:
    name, equals, value = word[2:].partition("=")
    if name in REFUSED:
        raise FlagError(f"--{name}: {REFUSED[name]}")
    if name == "no-requeue":
        return Flag("requeue", "no")
    option = OPTIONS.get(name)
    if option is None:
        removed = OPTIONS.get(name.removeprefix("no-"))
        if removed is None or not name.startswith("no-"):
            return None
        if equals and value not in sections:
            raise FlagError(f"--{name}={value}: takes no value but a section ({', '.join(sections) or 'none here'})")
        return Flag(removed.name, REMOVED, value)
    if option.argument == "no" and equals:
        raise FlagError(f"--{name}={value}: sbatch takes no value here")
    if option.argument == "yes" and not equals:
        value = _next(f"--{name}", words)
    return _flag(option, value, sections)


def _short(letters: str, words: list[str], sections: Collection[str]) -> list[Flag]:
    """One word of letters: ``-p gpu``, ``-pgpu``, ``-HO``; letters whose value is optional take none, as in getopt."""
    flags: list[Flag] = []
    while letters:
        letter, letters = letters[0], letters[1:]
        if letter in REFUSED_LETTERS:
            name = REFUSED_LETTERS[letter]
            raise FlagError(f"-{letter} (--{name}): {REFUSED[name]}")
        if letter not in LETTERS:
            raise FlagError(f"-{letter}: sbatch has no such letter")
        option = OPTIONS[LETTERS[letter]]
        value = ""
        if option.argument == "yes":
            value, letters = letters or _next(f"-{letter}", words), ""
        elif option.argument == "may":
            value, letters = letters, ""
        flags.append(_flag(option, value, sections))
    return flags


def _next(flag: str, words: list[str]) -> str:
    if not words:
        raise FlagError(f"{flag}: a value is missing")
    return words.pop(0)


def _flag(option: Option, value: str, sections: Collection[str]) -> Flag:
    head, equals, tail = value.partition("=")
    section = head if head in sections and (equals or option.argument == "may") else ""
    value = tail if section else value
    if option.argument == "yes" and not value:
        raise FlagError(f"--{option.name}: a value is missing")
    return Flag(option.name, check_text(f"--{option.name}", value), section)


def check_text(what: str, text: str) -> str:
    """The text when it fits on one line of a script and into UTF-8; FlagError otherwise."""
    for character in text:
        if not character.isprintable() and character != " ":
            raise FlagError(f"{what}: {text!r} holds a control or unprintable character ({character!r}); take it out")
    return text


def resolve(
    section: str,
    flags: Iterable[Flag] = (),
    *,
    default_section: str,
    environ: Mapping[str, str] | None = None,
    profile: Mapping[str, str] | None = None,
    profile_name: str = "profile",
    hints: Mapping[str, str] | None = None,
) -> dict[str, Setting]:
    """All settings of one section, each with its source, as flag > SBATCH_* > profile > recipe hint.

    ``profile`` and ``hints`` map option names to values; a bare flag means ``default_section``, or every section when
    the option concerns the whole chain (account, mail, …). Raises FlagError for a name that sbatch does not have.
    """
    settings: dict[str, Setting] = {}
    for source, given in (("recipe", hints or {}), (profile_name, profile or {})):
        for name, value in given.items():
            _put(settings, Flag(known(name, source), check_text(f"{source}: {name}", value)), source)
    for name, (variable, value) in variables(os.environ if environ is None else environ).items():
        _put(settings, Flag(name, check_text(variable, value)), variable)
    ordered = sorted(flags, key=lambda flag: flag.section != "")  # stable: an addressed flag beats a bare one
    for flag in ordered:
        bare = not flag.section and (section == default_section or OPTIONS[flag.name].whole_chain)
        if bare or flag.section == section:
            _put(settings, flag, "flag")
    return settings


def _put(settings: dict[str, Setting], flag: Flag, source: str) -> None:
    for group in ALTERNATIVES:
        for other in group - {flag.name} if flag.name in group and flag.value != REMOVED else ():
            if other in settings and settings[other].source != source and not _gres_beside(flag, settings, other):
                del settings[other]
    if flag.value == REMOVED:
        settings.pop(flag.name, None)
    else:
        settings[flag.name] = Setting(flag.value, source)


def _gres_beside(flag: Flag, settings: Mapping[str, Setting], other: str) -> bool:
    """Whether a ``--gres`` asks for something else than GPUs, and so goes together with ``--gpus-per-node``."""
    gres = flag.value if flag.name == "gres" else settings[other].value if other == "gres" else "gpu"
    return not any(part == "gpu" or part.startswith("gpu:") for part in gres.split(","))


def known(name: str, source: str) -> str:
    """The option's name when sbatch has it and a chain may use it; FlagError with the nearest name otherwise."""
    if name in OPTIONS:
        return name
    if name in REFUSED:
        raise FlagError(f"{source}: {name}: {REFUSED[name]}")
    near = difflib.get_close_matches(name, OPTIONS, n=1)
    raise FlagError(f"{source}: sbatch has no option {name!r}" + (f"; did you mean {near[0]}?" if near else ""))


def variables(environ: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Option name → (variable, value) of the SBATCH_* variables that a chain respects."""
    found = {}
    for option in OPTIONS.values():
        value = environ.get(option.env) if option.env else None
        if value is not None and (value or option.argument != "yes"):
            found[option.name] = (option.env, value if option.argument != "no" else "")
    if "SBATCH_NO_REQUEUE" in environ:
        found["requeue"] = ("SBATCH_NO_REQUEUE", "no")
    return found


def ignored(environ: Mapping[str, str]) -> list[str]:
    """SBATCH_* variables that are set but have no effect on a chain; to be named, not silently dropped."""
    used = {option.env for option in OPTIONS.values()} | {"SBATCH_NO_REQUEUE"}
    return sorted(name for name in environ if name.startswith("SBATCH_") and name not in used)


def apply(resources: Resources, settings: Mapping[str, Setting]) -> tuple[Resources, dict[str, Setting]]:
    """Move the settings that are numbers into the resources; returns those and the settings left for the header."""
    left = dict(settings)
    changes: dict[str, object] = {}

    def taken(name: str) -> str | None:
        return left.pop(name).value if name in left else None

    if (text := taken("nodes")) is not None:
        changes["nodes"] = parse_nodes(text)
    if (text := taken("time")) is not None:
        changes["time_min"] = parse_time(text)
    if (text := taken("mem")) is not None:
        changes["mem_gb"] = parse_memory_gb(text)
    if (text := taken("exclusive")) is not None:
        changes["exclusive"] = text
    for name, field in (("cpus-per-task", "cpus_per_task"), ("ntasks-per-node", "tasks_per_node")):
        if (text := taken(name)) is not None:
            changes[field] = parse_count(name, text)
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
