"""Users' Slurm flags, under Slurm's own names and letters. ``slurm.header`` spells them for sbatch.

Where a value comes from: flag > SBATCH_* environment > profile. ``flags.csv`` is from sbatch(1).
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from slurm import rows_of
from slurm.errors import FlagError


@dataclass(frozen=True)
class Option:
    """One sbatch option, a row of ``flags.csv``.

    ``argument``: yes, may (only as ``--name=value``) or no. ``scope``: a bare flag means every job of the chain, or
    those of one section. ``variable``: the SBATCH_* variable that is read for it, empty for none.
    """

    name: str
    letter: str
    argument: str
    scope: str
    variable: str


# options of which sbatch takes one: the one of the stronger source removes the others
ALTERNATIVES = ({"mem", "mem-per-cpu", "mem-per-gpu"}, {"exclusive", "oversubscribe"}, {"gres", "gpus-per-node"})


OPTIONS = {row["name"]: Option(**row) for row in rows_of("flags.csv")}
REFUSED = {row["name"]: row["why"] for row in rows_of("flags_refused.csv")}  # those that a chain sets itself
REFUSED_LETTERS = {row["letter"]: row["name"] for row in rows_of("flags_refused.csv") if row["letter"]}
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
            if elsewhere := [word for word in words if word.startswith(("-M", "--clusters"))]:
                raise FlagError(f"{elsewhere[0]}: {REFUSED['clusters']}")
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
) -> dict[str, Setting]:
    """All settings of one section, each with its source, as flag > SBATCH_* > profile.

    ``profile`` maps option names to values; a bare flag means ``default_section``, or every section when
    the option concerns the whole chain (account, mail, …). Raises FlagError for a name that sbatch does not have.
    """
    settings: dict[str, Setting] = {}
    for name, value in (profile or {}).items():
        flag = Flag(known(name, profile_name), check_text(f"{profile_name}: {name}", value))
        _put(settings, flag, profile_name)
    for name, (variable, value) in variables(os.environ if environ is None else environ).items():
        _put(settings, Flag(name, check_text(variable, value)), variable)
    ordered = sorted(flags, key=lambda flag: flag.section != "")  # stable: an addressed flag beats a bare one
    for flag in ordered:
        bare = not flag.section and (section == default_section or OPTIONS[flag.name].scope == "chain")
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
    """Option name → (variable, value) of the SBATCH_* variables that a chain respects; FlagError for a cluster."""
    for name in ("SBATCH_CLUSTERS", "SLURM_CLUSTERS"):
        if name in environ:
            raise FlagError(f"{name}={environ[name]}: {REFUSED['clusters']}, or unset it")
    values = {}
    for option in OPTIONS.values():
        value = environ.get(option.variable) if option.variable else None
        if value is not None and (value or option.argument != "yes"):
            values[option.name] = (option.variable, value if option.argument != "no" else "")
    if "SBATCH_NO_REQUEUE" in environ:
        values["requeue"] = ("SBATCH_NO_REQUEUE", "no")
    return values


def ignored(environ: Mapping[str, str]) -> list[str]:
    """SBATCH_* variables that are set but have no effect on a chain; to be named, not silently dropped."""
    used = {option.variable for option in OPTIONS.values()} | {"SBATCH_NO_REQUEUE"}
    return sorted(name for name in environ if name.startswith("SBATCH_") and name not in used)
