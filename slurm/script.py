"""The text of an sbatch file (pure; needs no Slurm): a header, variables, and ``job.sh`` as it is.

What a user typed reaches the text only quoted: as the value of an ``#SBATCH`` line or as a shell-quoted word. The one
exception is ``setup``, shell lines that the site's profile asks for.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from slurm.environment import JOB_SH
from slurm.errors import FlagError
from slurm.flags import Setting, check_text
from slurm.header import header, header_line, path_pattern
from slurm.resources import Resources


@dataclass(frozen=True, kw_only=True)
class Part:
    """One srun line of a job that has several, as ``Script`` and ``Resources`` say of one.

    ``width`` is the most nodes for it, 0 all; ``always`` the last one, which comes also when the job ends for good.
    """

    name: str
    arguments: Sequence[str]
    tasks_per_node: int
    cpus_per_task: int | None
    width: int = 0
    srun_args: Sequence[str] = ()
    always: bool = False


@dataclass(frozen=True, kw_only=True)
class Script:
    """One job's batch file. ``program`` and its ``arguments`` are what every rank runs.

    ``state_dir`` keeps the verdicts of the attempts. ``code`` is a copy of the code whose name is its SHA-256 (see
    ``pipeline.launch.code``). ``setup`` are shell lines of the site's profile, run in a function.
    ``max_gpu_s`` limits the GPU-seconds of all attempts of all jobs that share ``state_dir``; 0 is no limit. The
    file may be sent again for a spare job, with the id of the job in whose place that one runs as its argument.
    ``parts``, one after another, stand in place of ``arguments``, ``srun_args`` and the job's tasks and cores.
    """

    resources: Resources
    settings: Mapping[str, Setting]
    program: Sequence[str]
    arguments: Sequence[str] = ()
    log_dir: str
    state_dir: str
    code: str = ""
    log_name: str = "%j.out"
    modules: Sequence[str] = ()
    setup: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    srun_args: Sequence[str] = ()
    max_gpu_s: int = 0
    parts: Sequence[Part] = ()

    @property
    def requeues(self) -> bool:
        return "requeue" in self.settings and self.settings["requeue"].value != "no"


def render(script: Script) -> str:
    """The whole sbatch file. FlagError for a value that cannot be written on one line."""
    asked = script.resources
    only = Part(
        name="",
        arguments=script.arguments,
        tasks_per_node=asked.tasks_per_node,
        cpus_per_task=asked.cpus_per_task,
        srun_args=script.srun_args,
    )
    words = [word for part in (only, *script.parts) for word in (*part.srun_args, *part.arguments)]
    if ":" in (*script.program, *words):
        raise FlagError("command: srun takes a word that is just ':' for the start of another command; change it")
    pairs = [
        *header(script.resources, script.settings),
        ("open-mode", "append"),
        ("output", path_pattern(script.log_dir, script.log_name)),
    ]
    lines = [
        "#!/bin/bash",
        *(header_line(name, value) for name, value in sorted(pairs)),
        "",
        f"state={quote('state folder', script.state_dir)}",
        f"requeue={'yes' if script.requeues else 'no'}",
        f"gpus_per_node={script.resources.gpus_per_node}",
        f"max_gpu_s={script.max_gpu_s}",
        "stands_in_for=${1-}",
        f"code={quote('code folder', script.code) if script.code else ''}",
        array("program", script.program),
        *([] if script.parts else _settings(only)),
        *(f"{_function(part)}() {{ {'; '.join(_settings(part))}; }}" for part in script.parts),
        f"sruns=({' '.join(_function(part) for part in script.parts if not part.always) or ':'})",
        f"always={''.join(_function(part) for part in script.parts if part.always)}",
        "site() {",
        *(f"  {line}" for line in _environment(script)),
        "}",
        "",
    ]
    return "\n".join([*lines, JOB_SH])


def _settings(part: Part) -> list[str]:
    return [
        f"width={part.width or ''}",
        f"tasks={part.tasks_per_node}",
        f"cpus={part.cpus_per_task or ''}",
        array("srun_args", part.srun_args),
        array("arguments", part.arguments),
    ]


def _function(part: Part) -> str:
    return "part_" + re.sub(r"\W", "_", part.name, flags=re.ASCII)


def _environment(script: Script) -> list[str]:
    lines = [":"]  # an empty function is a syntax error
    if script.modules:
        lines.append('type module >/dev/null 2>&1 || fail "this site has no module command" 7')
        lines.append("module purge")
        for name in script.modules:
            word = quote("module", name)
            lines.append(f"module load {word} || fail {quote('module', f'module load {name}: failed')} 7")
    lines += [check_text("setup line of the profile", line) for line in script.setup]
    lines += [f"export {check_variable(name)}={quote(name, value)}" for name, value in script.env.items()]
    return lines[1:] or lines


def array(name: str, words: Sequence[str]) -> str:
    """A bash array on one line."""
    return f"{name}=({' '.join(quote(name, word) for word in words)})"


def quote(what: str, text: str) -> str:
    """The text as one word of a shell script; FlagError when it cannot stand on one line."""
    return shlex.quote(check_text(what, text))


def check_variable(name: str) -> str:
    """The name when it can name an environment variable; FlagError otherwise."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name, re.ASCII):
        raise FlagError(f"[env] {name!r}: a variable's name has letters, digits and _ only")
    return name
