"""How a chain of jobs is submitted: which job waits for which, sbatch's words, and a ``submit.sh`` that does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from slurm.flags import Setting, check_text
from slurm.header import spell
from slurm.resources import Resources
from slurm.script import quote


@dataclass(frozen=True, kw_only=True)
class Need:
    """A job starts when job ``job`` has ended: well (afterok), anyhow (afterany), badly (afternotok)."""

    job: str
    kind: str = "afterok"


@dataclass(frozen=True, kw_only=True)
class JobPlan:
    """One job of a chain, one call of sbatch: its stages in order, its request, and where each setting came from.

    ``any_need``: one of the needs is enough, else all of them. ``stands_in_for`` names the job that this spare one
    goes on for, whose id its script is told. ``parts`` are jobs that this one is in place of, one after another.
    """

    name: str
    section: str
    stages: tuple[str, ...]
    needs: tuple[Need, ...] = ()
    any_need: bool = False
    stands_in_for: str = ""
    resources: Resources = field(default_factory=Resources)
    left: Mapping[str, Setting] = field(default_factory=dict)  # settings that are no numbers
    settings: Mapping[str, Setting] = field(default_factory=dict)  # all of them, to be shown
    parts: tuple[JobPlan, ...] = ()

    @property
    def file(self) -> str:
        """The name of its batch file, which a spare job shares with the job in whose place it runs."""
        return f"{self.stands_in_for or self.name}.sbatch"

    @property
    def held_by_user(self) -> bool:
        """Whether it stays held when the chain is released."""
        return "hold" in self.settings


def sbatch_args(job: JobPlan, ids: Mapping[str, str], extra: Sequence[str] = ()) -> list[str]:
    """sbatch's words for one job, but for the file: held when it needs no other job; ``extra`` goes in untouched.

    ``ids`` maps job names to job ids, or to shell words that stand for them.
    """
    words = ["--parsable", *extra]
    if not job.needs:
        return [*words, "--hold"]
    dependency = ("?" if job.any_need else ",").join(f"{need.kind}:{ids[need.job]}" for need in job.needs)
    return [*words, spell("dependency", dependency)]


def submit_sh(jobs: Sequence[JobPlan], extra: Mapping[str, Sequence[str]], journal: str = "", note: str = "") -> str:
    """A script that sends a chain: all jobs held or waiting until the last one is accepted, none left on failure.

    ``extra`` are words for sbatch by name of the job. ``note`` goes into the file ``journal`` around the release, so
    that the chain can be found; in it ``$job1`` is the first job's id and ``$1`` is releasing, then released.
    """
    lines = [
        "#!/bin/bash",
        "# Sends the chain. No job can start before all of them are accepted.",
        "set -euo pipefail",
        'cd "$(dirname "$0")"',
        "# their values are already in the scripts",
        'for name in "${!SBATCH_@}" "${!SQUEUE_@}" SLURM_CLUSTERS; do unset "$name"; done',
        "# the id in what a site's sbatch prints: its only line that is one, else the newest job's with the comment",
        "send() {",
        "  local said id word code=0",
        '  said=$(sbatch "$@") || code=$?',
        "  id=$(sed -nE 's/^ *([0-9]+)(;.*)?$/\\1/p' <<<\"$said\")",
        "  if [[ ! $id =~ ^[0-9]+$ ]]; then id=; fi",
        '  if [ -z "$id" ] || [ "$code" != 0 ]; then',
        '    for word; do case $word in --comment=*) id=$(tagged "${word#*=}") ;; esac; done',
        "  fi",
        '  if [ "$code" = 0 ] && [ -n "$id" ]; then echo "$id" && return; fi',
        "  # a wrapper that failed after Slurm had taken the job",
        '  if [ -n "$id" ] && grep -qw "$id" <<<"$said"; then scancel "$id"; fi',
        '  echo "sbatch gave no job id: $said" >&2',
        "  return 1",
        "}",
        "tagged() {",
        """  squeue --noheader --states=all --user="$(id -u)" --format='%i %k' | while read -r id comment; do""",
        '    if [ "$comment" = "$1" ]; then echo "$id"; fi',
        "  done | sort -n | tail -n 1",
        "}",
        "sent=()",
        'trap \'code=$?; if [ "$code" -ne 0 ] && [ "${#sent[@]}" -gt 0 ]; then scancel "${sent[@]}"; fi\' EXIT',
        "",
    ]
    ids: dict[str, str] = {}
    for number, job in enumerate(jobs, start=1):
        words = [
            f'"{word}"' if word.startswith("--dependency=") else quote("sbatch argument", word)
            for word in [*sbatch_args(job, ids, extra[job.name]), job.file]
        ]
        if job.stands_in_for:
            words.append(f'"{ids[job.stands_in_for]}"')
        lines.append(f"# {check_text('job name', job.name)}")
        lines.append(f"job{number}=$(send {' '.join(words)})")
        lines.append(f'sent+=("$job{number}"); echo "$job{number}"')
        ids[job.name] = f"$job{number}"
    free = [f'"{ids[job.name]}"' for job in jobs if not job.needs and not job.held_by_user]
    release = [f"scontrol release {word}" for word in free]
    if journal:
        new, file = quote("journal", f"{journal}.new"), quote("journal", journal)
        lines += ["", "note() {", f"  cat >{new} <<END", note, "END", f"  mv {new} {file}", "}"]
        release = ["note releasing", *release, "note released"]
    lines += ["", *release, ""]
    return "\n".join(lines)
