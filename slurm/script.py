"""The text of an sbatch file (pure; needs no Slurm).

What a user typed reaches the text only quoted: as the value of an ``#SBATCH`` line or as a shell-quoted word. The one
exception is ``setup``, shell lines that the site's profile asks for.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from slurm.errors import FlagError
from slurm.flags import Setting, check_text, header, header_line, path_pattern
from slurm.resources import Resources
from slurm.shell import AFTER, BEFORE


@dataclass(frozen=True, kw_only=True)
class Script:
    """One job's batch file. ``command`` is what every rank runs; ``state_dir`` keeps the verdicts of the attempts.

    ``setup`` are shell lines of the site's profile; ``wrapper`` comes before the command (a container's ``exec``).
    ``max_gpu_s`` limits the GPU-seconds of all attempts of all jobs that share ``state_dir``; 0 is no limit. The
    file may be sent again for a spare job, with the id of the job in whose place that one runs as its argument.
    """

    resources: Resources
    settings: Mapping[str, Setting]
    command: Sequence[str]
    log_dir: str
    state_dir: str
    log_name: str = "%j.out"
    modules: Sequence[str] = ()
    setup: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    srun_args: Sequence[str] = ()
    wrapper: Sequence[str] = ()
    max_gpu_s: int = 0

    @property
    def requeues(self) -> bool:
        return "requeue" in self.settings and self.settings["requeue"].value != "no"


def render(script: Script) -> str:
    """The whole sbatch file. FlagError for a value that cannot be written on one line."""
    pairs = [
        *header(script.resources, script.settings),
        ("open-mode", "append"),
        ("output", path_pattern(script.log_dir, script.log_name)),
    ]
    lines = ["#!/bin/bash", *(header_line(name, value) for name, value in sorted(pairs)), ""]
    lines += [f"state={quote('state folder', script.state_dir)}"]
    lines += [f"requeue={'yes' if script.requeues else 'no'}", f"gpus_per_node={script.resources.gpus_per_node}"]
    lines += [f"max_gpu_s={script.max_gpu_s}", "stands_in_for=${1-}", "", BEFORE]
    lines += _environment(script)
    lines += [starts_line(script), srun_line(script), AFTER]
    return "\n".join(lines)


def _environment(script: Script) -> list[str]:
    lines = []
    if script.modules:
        lines.append('type module >/dev/null 2>&1 || fail "this site has no module command" 7')
        lines.append("module purge")
        for name in script.modules:
            word = quote("module", name)
            lines.append(f"module load {word} || fail {quote('module', f'module load {name}: failed')} 7")
    lines += [check_text("setup line of the profile", line) for line in script.setup]
    lines += [f"export {check_variable(name)}={quote(name, value)}" for name, value in script.env.items()]
    return [*lines, ""] if lines else []


def srun_line(script: Script) -> str:
    """The srun command of a job: the tasks per node are said here, never in the header."""
    tasks, cpus = script.resources.tasks_per_node, script.resources.cpus_per_task
    share = str(cpus)
    if cpus is None:  # what the job got, shared out
        share = "$SLURM_CPUS_ON_NODE" if tasks == 1 else f"$((SLURM_CPUS_ON_NODE / {tasks}))"
    words = ["srun", f"--ntasks-per-node={tasks}", f"--cpus-per-task={share}"]
    words += ["--export=ALL", "--kill-on-bad-exit=1", "--unbuffered"]
    if ":" in (*script.srun_args, *script.wrapper, *script.command):
        raise FlagError("command: srun takes a word that is just ':' for the start of another command; change it")
    before = " ".join([*words, *(quote("srun argument", word) for word in script.srun_args)])
    after = " ".join(quote("command", word) for word in [*script.wrapper, *script.command])
    return f'{before} "${{part[@]}}" {after}'


def starts_line(script: Script) -> str:
    """A shell function: whether the job's program starts at all on one of its nodes."""
    words = ["timeout 60 srun", "--nodes=1", "--ntasks=1", '--nodelist="$1"', "--export=ALL"]
    words += [quote("srun argument", word) for word in script.srun_args]
    words += [quote("command", word) for word in [*script.wrapper, script.command[0], "--version"]]
    return f"starts() {{\n  {' '.join(words)}\n}} >/dev/null 2>&1 </dev/null"


def quote(what: str, text: str) -> str:
    """The text as one word of a shell script; FlagError when it cannot stand on one line."""
    return shlex.quote(check_text(what, text))


def check_variable(name: str) -> str:
    """The name when it can name an environment variable; FlagError otherwise."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name, re.ASCII):
        raise FlagError(f"[env] {name!r}: a variable's name has letters, digits and _ only")
    return name
