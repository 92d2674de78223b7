"""How a chain of batch files is sent: which job waits for which, sbatch's words, and a ``submit.sh`` that does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from slurm.flags import check_text, spell
from slurm.script import quote


@dataclass(frozen=True, kw_only=True)
class Need:
    """A job starts when job ``job`` has ended: well (afterok), anyhow (afterany), badly (afternotok)."""

    job: str
    kind: str = "afterok"


@dataclass(frozen=True, kw_only=True)
class Sending:
    """One sbatch call of a chain. ``any_need``: one of the needs is enough, else all of them.

    ``held_by_user`` keeps the job held when the chain is released; ``stands_in_for`` names the job that a spare job
    goes on for, whose id its script is told; ``extra`` goes to sbatch untouched.
    """

    name: str
    file: str
    needs: Sequence[Need] = ()
    any_need: bool = False
    held_by_user: bool = False
    stands_in_for: str = ""
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
        if sending.stands_in_for:
            words.append(f'"{ids[sending.stands_in_for]}"')
        lines.append(f"# {check_text('job name', sending.name)}")
        lines.append(f"job{number}=$(sbatch {' '.join(words)})")
        lines.append(f'job{number}=${{job{number}%%;*}}; sent+=("$job{number}"); echo "$job{number}"')
        ids[sending.name] = f"$job{number}"
        if not sending.needs and not sending.held_by_user:
            free.append(f'"$job{number}"')
    lines += ["", *(f"scontrol release {word}" for word in free), ""]
    return "\n".join(lines)
