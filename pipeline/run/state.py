"""The state of every stage of a run, by ONE rule, from its files and from what Slurm says of its jobs."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from pipeline.errors import RESTART_CODES
from pipeline.run.chain import Chain
from pipeline.run.journal import Journal
from pipeline.run.rundir import Attempt, RunDir, read_json, read_jsonl
from pipeline.words import in_short
from slurm import queue
from slurm.errors import SlurmError
from slurm.states import in_words


@dataclass(frozen=True)
class Sent:
    """The run's last sending to Slurm and what Slurm says of its jobs; ``silent`` is why it says nothing.

    Jobs that squeue has forgotten are looked up in the accounting database, where there is one.
    """

    journal: Journal
    jobs: dict[str, queue.Job]
    silent: str = ""

    @classmethod
    def of(cls, run: RunDir) -> Sent | None:
        """None for a run that was never sent."""
        journal = Journal.read(run)
        if journal is None:
            return None
        ids = [job.id for job in journal.jobs if job.id]
        try:
            known = queue.jobs(ids)
            return cls(journal, {**queue.accounted(one for one in ids if one not in known), **known})
        except SlurmError as error:
            return cls(journal, {}, str(error))


def events_of(run: RunDir) -> list[dict[str, Any]]:
    """The run's events; none where their file is damaged."""
    try:
        return [event for event in run.events if isinstance(event, dict)]
    except (OSError, ValueError):
        return []


def survey(run: RunDir, sent: Sent | None = None) -> list[dict[str, Any]]:
    """One row for each stage: name, state (todo, waiting, running, done, failed, cancelled, unknown), reason, progress.

    ``job`` is the Slurm job id of a stage that was sent and is not done.
    """
    chain = Chain.of(run)
    todo, held = chain.todo(), run.is_held()
    rows = []
    for name in chain.stages:
        job = sent.journal.job_of(name, sent.jobs) if sent and name in todo else None
        if sent and job is not None and job.id:
            rows.append({**sent_state(chain, name, todo, sent), "job": job.id})
        else:
            rows.append(state_of(chain, name, todo, held and sent is None))
    return rows


def sent_state(chain: Chain, name: str, todo: dict[str, str], sent: Sent) -> dict[str, Any]:
    """State of a stage that was sent and is not done."""
    job = sent.journal.job_of(name, sent.jobs)
    assert job is not None
    found = sent.jobs.get(job.id)
    row = state_of(chain, name, todo, held=False)
    if sent.silent:
        return row if row["state"] in ("failed", "cancelled") else {**row, "state": "unknown", "reason": ""}
    if found is None or found.ended:
        if found is not None and row["state"] == "todo":
            row.update(state="cancelled" if found.state == "CANCELLED" else "failed", reason=in_words(found))
        return row
    if found.waiting:
        stopped = chain.run.stage(name).attempts and chain.is_current(name)
        again = f"{history(chain.run.stage(name).attempts, job.id)}; " if stopped else ""
        row.update(state="waiting", reason=again + in_words(found, sent.journal.names))
        if found.start is not None:
            row["expected_start"] = found.start
        return {**row, "stuck": True} if found.stuck else row
    current = next(stage for stage in job.stages if stage in todo)
    if name != current:
        return {**row, "state": "waiting", "reason": f"waits for {current} in the same job"}
    last = chain.run.stage(name).attempts[-1:] if chain.is_current(name) else []
    mine = [one for one in last if one.verdict is None and one.job_id == job.id]
    if not mine or found.state != "RUNNING":
        starting = "starts" if found.state == "RUNNING" else in_words(found)
        return {**row, "state": "running", "reason": starting}
    return {**row, **progress(chain, name, mine[0])}


def progress(chain: Chain, name: str, attempt: Attempt) -> dict[str, Any]:
    """State, figures and reason of a stage that works now; ``eta_s`` is the median step time times the steps left."""
    row: dict[str, Any] = {"state": "running"}
    own = [line for line in read_jsonl(attempt.metrics) if "loss" in line]
    # an attempt that was killed may have come further than its last checkpoint, where this one began
    metrics = own or [line for line in chain.run.stage(name).metrics() if "loss" in line]
    for key in ("step", "loss", "sequences_per_s", "tokens_per_s"):
        if metrics and key in metrics[-1]:
            row[key] = metrics[-1][key]
    words = [f"{key} {row[key]:.4g}" for key in ("step", "loss", "sequences_per_s") if key in row]
    phase = chain.stages[name].config.get("phase")
    if phase is not None:
        row["steps"] = phase.steps
        if times := [line["step_s"] for line in own if "step_s" in line]:
            row["eta_s"] = statistics.median(times) * (phase.steps - row["step"])
            words.append(f"ETA {in_short(row['eta_s'])}")
    if attempt.number > 1:
        origin = (read_json(attempt.path / "attempt.json") or {}).get("resumed_from")
        words.append(history(chain.run.stage(name).attempts[: attempt.number - 1], attempt.job_id))
        words.append(f"resumed at step {origin['step']}" if origin else f"attempt {attempt.number}")
    return {**row, "reason": ", ".join(words)}


def history(attempts: list[Attempt], job: str) -> str:
    """How the attempts of a stage ended, in the order of first mention: "preempted twice, lost a rank".

    A job that was cancelled never comes back: what was stopped and is ``job`` again was preempted.
    """
    counts: dict[str, int] = {}
    for attempt in attempts:
        verdict = attempt.verdict or {"code": None, "cause": None}
        out_of = {"time_limit": "out of time", "gpu_hours": "out of GPU-hours"}
        asked = out_of.get(verdict["cause"], "preempted" if attempt.job_id == job else "stopped")
        ended = {75: asked, 76: "lost a rank", 77: "met a bad node", 130: "interrupted", None: "killed"}
        word = ended.get(verdict["code"], f"failed with code {verdict['code']}")
        counts[word] = counts.get(word, 0) + 1
    often = {1: "", 2: " twice"}
    return ", ".join(f"{word}{often.get(count, f' {count} times')}" for word, count in counts.items())


def ended_for_good(chain: Chain, verdict: dict[str, Any]) -> bool:
    """Whether an attempt failed under the runner that holds the run now, and is not started again by it."""
    return verdict["code"] not in RESTART_CODES and verdict["time"] > chain.run.held_since


def state_of(chain: Chain, name: str, todo: dict[str, str], held: bool) -> dict[str, Any]:
    folder, stage = chain.run.stage(name), chain.stages[name]
    row: dict[str, Any] = {"name": name, "state": "todo", "attempts": len(folder.attempts)}
    if name not in todo:
        return {**row, "state": "done", "duration_s": (folder.done or {}).get("duration_s", 0.0)}
    last = folder.attempts[-1] if folder.attempts and chain.is_current(name) else None
    verdict = last.verdict if last else None
    if verdict is None and last is not None and held and not (stage.always and chain.is_done(name)):
        row.update(progress(chain, name, last))
    elif held and not (verdict is not None and ended_for_good(chain, verdict)):
        pending = [need for need in stage.needs if need in todo]
        row.update(state="waiting", reason=f"waits for {', '.join(pending)}" if pending else "starts next")
    elif verdict is not None and verdict["code"] in (75, 130):
        row.update(state="cancelled", reason=verdict["line"])
    elif verdict is not None:
        row.update(state="failed", reason=f"exit {verdict['code']}: {verdict['line']}")
    else:
        row["reason"] = todo[name]
    return row
