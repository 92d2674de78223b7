"""Slurm's states and reasons in words that need no manual."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime

from slurm import rows_of
from slurm.queue import QueuedJob

ROWS = rows_of("states.csv")
STATES, REASONS = ({row["name"]: row["words"] for row in ROWS if row["kind"] == kind} for kind in ("state", "reason"))
LIMIT = re.compile(r"(?P<whose>QOS|Assoc)(?P<scope>Grp|Max)(?P<what>\w+?)(?P<per>Per\w+|Limit)?$")


def in_words(job: QueuedJob, names: Mapping[str, str] | None = None) -> str:
    """One short phrase for what a job does or waits for; ``names`` maps job ids to the names people know."""
    state = job.state.split("+")[0]
    if state != "PENDING":
        return STATES.get(state, state.lower().replace("_", " "))
    reason = job.reason.split(",")[0].strip()
    if reason in ("Resources", "Priority") and job.start is not None:
        return f"{REASONS[reason]}, expected to start {_clock(job.start)}"
    if reason == "Dependency" and (waits := _needs(job, names or {})):
        return f"waits for {waits}"
    if reason == "BeginTime" and job.start is not None:
        return f"may begin {_clock(job.start)}"
    if limit := LIMIT.match(reason):
        whose = "QOS" if limit["whose"] == "QOS" else "account"
        return f"waits: the {whose}'s limit is reached ({reason})"
    if not reason:
        return "queued; the scheduler has not looked at it yet"
    return REASONS.get(reason.replace(" ", "_"), REASONS.get(reason, f"waits ({reason})"))


def _clock(time_s: float) -> str:
    when, now = datetime.fromtimestamp(time_s), datetime.now()
    return f"at {when:%H:%M:%S}" if when.date() == now.date() else f"on {when:%d %b at %H:%M}"


def _needs(job: QueuedJob, names: Mapping[str, str]) -> str:
    ids = re.findall(r"(?<=:)(\d+)", job.dependency)
    return " and ".join(dict.fromkeys(names.get(job_id, f"job {job_id}") for job_id in ids))
