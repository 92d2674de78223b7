"""The text of an sbatch file and of the ``submit.sh`` that sends a chain of them (pure; needs no Slurm).

What a user typed reaches the text only quoted: as the value of an ``#SBATCH`` line or as a shell-quoted word. The one
exception is ``setup``, shell lines that the site's profile asks for.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from slurm import verdict
from slurm.errors import FlagError
from slurm.flags import Setting, check_text, header, header_line, path_pattern, spell
from slurm.resources import Resources

BEFORE = f"""\
# may be unset when the job was sent with --export=NONE
export PATH="${{PATH:-/usr/local/bin:/usr/bin:/bin}}"

# signals are for the ranks; this shell lives on to decide what happens next
ended=no
trap 'ended=yes' TERM
trap : USR1 USR2

fail() {{
  echo "$1" >&2
  exit "$2"
}}

attempt=${{SLURM_RESTART_COUNT:-0}}
mkdir -p "$state" || fail "$state: cannot be made" 6
export {verdict.VERDICT}="$state/$SLURM_JOB_ID.$attempt.verdict"
export {verdict.CRASHES}="$state/$SLURM_JOB_ID.crashes"
bad_nodes="$state/$SLURM_JOB_ID.bad_nodes"

# end of the allocation, read once: D-HH:MM:SS, MM:SS, or a word when there is no limit
left=$(timeout 60 squeue -h -j "$SLURM_JOB_ID" -o %L 2>/dev/null)
if [[ $left =~ ^([0-9]+-)?[0-9]+(:[0-9]+){{1,2}}$ ]]; then
  days=0
  if [[ $left == *-* ]]; then days=${{left%%-*}}; fi
  seconds=0
  IFS=: read -r -a parts <<<"${{left#*-}}"
  for part in "${{parts[@]}}"; do seconds=$((seconds * 60 + 10#$part)); done
  export {verdict.DEADLINE}=$(($(date +%s) + 10#$days * 86400 + seconds))
fi

# nodes that an earlier attempt of this job found to be bad do not take part
spared=()
if [ -s "$bad_nodes" ]; then
  mapfile -t spared < <(scontrol show hostnames "$SLURM_JOB_NODELIST" | grep -Fxf "$bad_nodes")
  if [ "${{#spared[@]}}" -ge "$SLURM_JOB_NUM_NODES" ]; then spared=(); fi
fi
part=()
if [ "${{#spared[@]}}" -gt 0 ]; then
  printf -v list '%s,' "${{spared[@]}}"
  part=(--exclude="${{list%,}}" --nodes=$((SLURM_JOB_NUM_NODES - ${{#spared[@]}})))
  echo "attempt $attempt: without ${{spared[*]}}, found bad before"
fi
"""

AFTER = f"""\
code=$?
nodes=

# the first rank that failed knows best; srun's own code mixes those of all ranks
if [ -s "${verdict.VERDICT}" ]; then
  read -r code nodes <"${verdict.VERDICT}"
elif [ "$code" -ge 128 ]; then
  echo "$attempt $code" >>"${verdict.CRASHES}"
  if [ "$(wc -l <"${verdict.CRASHES}")" -lt "$crash_limit" ]; then
    echo "attempt $attempt: killed (code $code)"
    code=76
  else
    echo "attempt $attempt: killed (code $code), $crash_limit times without progress; not started again" >&2
  fi
fi
for node in $nodes; do echo "$node" >>"$bad_nodes"; done

case $code in
75 | 76 | 77) ;;
*) exit "$code" ;;
esac
if [ "$requeue" != yes ]; then exit "$code"; fi
# a job that Slurm is ending: a cancelled one must not come back, a preempted one comes back by itself unless its
# script ends first, so wait to be killed; only after the time limit is it ours to ask
wait_if_ended() {{
  if [ "$ended" = yes ] && [ "$(date +%s)" -lt "${{{verdict.DEADLINE}:-9999999999}}" ]; then
    echo "attempt $attempt: code $code; Slurm is ending this job"
    trap - TERM
    sleep 3600
    exit "$code"
  fi
}}
ask() {{
  answer=$(timeout 60 squeue -h -j "$SLURM_JOB_ID" -o %T 2>&1) || return
  if [ "$answer" = COMPLETING ]; then ended=yes; fi # TERM may reach this shell late, or never
  wait_if_ended
  answer=$(timeout 60 scontrol requeue "$SLURM_JOB_ID" 2>&1)
}}
command -v scontrol >/dev/null || fail "attempt $attempt: code $code, but no scontrol here" "$code"
pause=1
sleep 2 # ranks hear of a cancel before others do
until ask; do
  case $answer in
  *disabled* | *enied* | *"nvalid job id"* | *"not permitted"*)
    fail "attempt $attempt: requeue refused: $answer" "$code"
    ;;
  esac
  echo "attempt $attempt: requeue not confirmed ($answer); again in $pause s"
  sleep "$pause"
  pause=$((pause < 16 ? pause * 2 : 30))
done
echo "attempt $attempt: code $code, requeued"
trap - TERM
sleep 120 # Slurm ends this shell
exit "$code"
"""


@dataclass(frozen=True, kw_only=True)
class Script:
    """One job's batch file. ``command`` is what every rank runs; ``state_dir`` keeps the verdicts of the attempts.

    ``setup`` are shell lines of the site's profile; ``wrapper`` comes before the command (a container's ``exec``).
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
    crash_limit: int = 3

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
    lines += [f"requeue={'yes' if script.requeues else 'no'}", f"crash_limit={script.crash_limit}", "", BEFORE]
    lines += _environment(script)
    lines += [srun_line(script), AFTER]
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


def quote(what: str, text: str) -> str:
    """The text as one word of a shell script; FlagError when it cannot stand on one line."""
    return shlex.quote(check_text(what, text))


def check_variable(name: str) -> str:
    """The name when it can name an environment variable; FlagError otherwise."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name, re.ASCII):
        raise FlagError(f"[env] {name!r}: a variable's name has letters, digits and _ only")
    return name


@dataclass(frozen=True, kw_only=True)
class Need:
    """A job starts when job ``job`` has ended: well (afterok), anyhow (afterany), badly (afternotok)."""

    job: str
    kind: str = "afterok"


@dataclass(frozen=True, kw_only=True)
class Sending:
    """One sbatch call of a chain. ``any_need``: one of the needs is enough (spare jobs), else all of them.

    ``held_by_user`` keeps the job held when the chain is released; ``extra`` goes to sbatch untouched.
    """

    name: str
    file: str
    needs: Sequence[Need] = ()
    any_need: bool = False
    held_by_user: bool = False
    extra: Sequence[str] = ()


def dependency(needs: Sequence[Need], ids: Mapping[str, str], any_need: bool = False) -> str:
    """Value of ``--dependency``; ``ids`` maps job names to job ids (or to shell words that stand for them)."""
    return ("?" if any_need else ",").join(f"{need.kind}:{ids[need.job]}" for need in needs)


def sbatch_args(sending: Sending, ids: Mapping[str, str]) -> list[str]:
    """sbatch's words for one job of a chain, but for the file: held when it needs no other job."""
    words = ["--parsable", *sending.extra]
    if sending.needs:
        words.append(spell("dependency", dependency(sending.needs, ids, sending.any_need)))
    return words if sending.needs else [*words, "--hold"]


def submit_sh(sendings: Sequence[Sending]) -> str:
    """A script that sends a chain: all jobs held or waiting until the last one is accepted, none left on failure."""
    lines = [
        "#!/bin/bash",
        "# Sends the chain. No job can start before all of them are accepted.",
        "set -euo pipefail",
        'cd "$(dirname "$0")"',
        "# their values are already in the scripts",
        'for name in "${!SBATCH_@}"; do unset "$name"; done',
        "sent=()",
        'trap \'code=$?; if [ "$code" -ne 0 ] && [ "${#sent[@]}" -gt 0 ]; then scancel "${sent[@]}"; fi\' EXIT',
        "",
    ]
    ids: dict[str, str] = {}
    free = []
    for number, sending in enumerate(sendings, start=1):
        words = []
        for word in [*sbatch_args(sending, ids), sending.file]:
            shell = quote("sbatch argument", word)
            words.append(f'"{word}"' if word.startswith("--dependency=") else shell)
        lines.append(f"# {check_text('job name', sending.name)}")
        lines.append(f"job{number}=$(sbatch {' '.join(words)})")
        lines.append(f'job{number}=${{job{number}%%;*}}; sent+=("$job{number}"); echo "$job{number}"')
        ids[sending.name] = f"$job{number}"
        if not sending.needs and not sending.held_by_user:
            free.append(f'"$job{number}"')
    lines += ["", *(f"scontrol release {word}" for word in free), ""]
    return "\n".join(lines)
