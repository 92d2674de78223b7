"""Slurm's states and reasons in words that need no manual."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime

from slurm.queue import Job

STATES = {
    "BOOT_FAIL": "its nodes did not boot",
    "CANCELLED": "cancelled",
    "COMPLETED": "done",
    "COMPLETING": "ending",
    "CONFIGURING": "its nodes are getting ready",
    "DEADLINE": "could not end before its deadline",
    "FAILED": "failed",
    "NODE_FAIL": "lost a node",
    "OUT_OF_MEMORY": "ran out of memory",
    "PREEMPTED": "preempted",
    "REQUEUED": "starts again",
    "REQUEUE_HOLD": "to start again, but held",
    "RUNNING": "running",
    "STAGE_OUT": "copying its files out",
    "STOPPED": "stopped",
    "SUSPENDED": "suspended",
    "TIMEOUT": "reached its time limit",
}
REASONS = {
    "BeginTime": "waits until it may begin",
    "Cleaning": "its last attempt is still being cleaned up",
    "Dependency": "waits for another job",
    "DependencyNeverSatisfied": "can never start: a job that it waits for has failed",
    "InvalidAccount": "the account is not valid",
    "InvalidQOS": "the QOS is not valid",
    "JobHeldAdmin": "held by an administrator",
    "JobHeldUser": "held by you",
    "job_requeued_in_held_state": "held by Slurm after a requeue",
    "launch_failed_requeued_held": "held by Slurm after a failed launch",
    "Licenses": "waits for licenses",
    "MaxRequeueExceeded": "requeued too often for this site",
    "NodeDown": "a node that it needs is down",
    "PartitionDown": "its partition is down",
    "PartitionInactive": "its partition is inactive",
    "PartitionNodeLimit": "asks for more nodes than its partition gives",
    "PartitionTimeLimit": "asks for more time than its partition gives",
    "Prolog": "its nodes are getting ready",
    "Priority": "waits behind jobs of higher priority",
    "ReqNodeNotAvail": "a node that it needs is not available",
    "Reservation": "waits for its reservation",
    "Resources": "next in line, waits for free nodes",
    "BadConstraints": "no node fits its request",
}
LIMIT = re.compile(r"(?P<whose>QOS|Assoc)(?P<scope>Grp|Max)(?P<what>\w+?)(?P<per>Per\w+|Limit)?$")


def in_words(job: Job, names: Mapping[str, str] | None = None) -> str:
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


def _needs(job: Job, names: Mapping[str, str]) -> str:
    ids = re.findall(r"(?<=:)(\d+)", job.dependency)
    return " and ".join(dict.fromkeys(names.get(job_id, f"job {job_id}") for job_id in ids))
