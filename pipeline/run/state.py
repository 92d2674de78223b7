"""The state of every stage of a run, by ONE rule, from its files and from what Slurm says of its jobs.

``RULE`` is the rule: what holds the stage now, and what its last attempt left, give its state. ``status``, the report
and ``submit`` say what it says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Required, TypedDict, cast

from pipeline.errors import RESTART_CODES
from pipeline.run.chain import Chain
from pipeline.run.files import now
from pipeline.run.joblog import ends, first_error
from pipeline.run.journal import Journal, SentJob, by_hand
from pipeline.run.rundir import Attempt, RunDir
from pipeline.words import in_short, is_number, visible
from slurm import queue
from slurm.errors import SlurmError
from slurm.states import in_words
from slurm.verdict import read_over

State = Literal["todo", "waiting", "running", "done", "failed", "cancelled", "unknown"]
Holder = Literal["nobody", "silent", "ended", "cancelled", "runner", "queued", "behind", "job"]
Left = Literal["nothing", "open", "stopped", "restart", "failed"]

LIMITS = {"time_limit": "out of time", "gpu_hours": "out of GPU-hours"}
TOLD = {"stopped": ("cancelled", "verdict"), "restart": ("failed", "verdict"), "failed": ("failed", "verdict")}
RULE: Mapping[Holder, Mapping[str, tuple[str, str]]] = {
    # what holds the stage: what its last attempt left → (state, what the reason is made of)
    "nobody": {**TOLD, "any": ("todo", "why")},
    "silent": {**TOLD, "open": ("unknown", "progress"), "any": ("unknown", "nothing")},  # Slurm does not answer
    # its job has ended, and the stage is not done; nobody has cancelled it
    "ended": {**TOLD, "stopped": ("failed", "job"), "any": ("failed", "job")},
    "cancelled": {**TOLD, "any": ("cancelled", "job")},
    # the local runner, which starts again what it has not given up
    "runner": {"open": ("running", "progress"), "failed": ("failed", "verdict"), "any": ("waiting", "needs")},
    # a job of Slurm: in the queue; at work on an earlier stage; at work on this one
    "queued": {"any": ("waiting", "queue")},
    "behind": {"any": ("waiting", "ahead")},
    "job": {"open": ("running", "progress"), "any": ("running", "start")},
}


class Row(TypedDict, total=False):
    """What is known of one stage. ``job``: the Slurm job of a stage that was sent and is not done."""

    name: Required[str]
    state: Required[State]
    attempts: Required[int]
    reason: str
    job: str
    duration_s: float
    step: int
    steps: int
    loss: float
    sequences_per_s: float
    tokens_per_s: float
    age_s: float  # of these figures
    eta_s: float  # the median step time times the steps left
    expected_start: float  # Unix time, by Slurm's estimate
    fails: bool  # failed, or needs a stage that has
    stuck: bool  # waits for what can no longer happen


@dataclass(frozen=True)
class Sent:
    """The run's last submission to Slurm and what Slurm says of its jobs; ``silent`` is why it says nothing.

    Jobs that squeue has forgotten are looked up in the accounting database, where there is one.
    """

    journal: Journal
    jobs: dict[str, queue.QueuedJob]
    silent: str = ""

    @classmethod
    def of(cls, run: RunDir) -> Sent | None:
        """None for a run that was never sent, and that no job sent by hand is at either."""
        journal, extra = Journal.read(run), by_hand(run)
        if journal is None and not extra:
            return None
        sent = journal or Journal(submission="by-hand", state="released", jobs=())
        ids = [job.id for job in sent.jobs if job.id]
        silent, known = "", {}
        try:
            known = queue.jobs([*ids, *extra])
            known = {**queue.accounted(one for one in ids if one not in known), **known}
            extra = {job: at for job, at in extra.items() if job in known and not known[job].ended}
        except SlurmError as error:
            silent = str(error)
        if journal is None and not extra:
            return None
        more = (SentJob(name=at, stages=(at,), needs=(), held_by_us=False, id=job) for job, at in extra.items())
        return cls(dataclasses.replace(sent, jobs=(*sent.jobs, *more)), known, silent)

    def job_of(self, stage: str) -> SentJob | None:
        """The job that was sent for a stage; None where Slurm never took one."""
        job = self.journal.job_of(stage, self.jobs)
        return job if job is not None and job.id else None


def events_of(run: RunDir) -> list[dict[str, Any]]:
    """The run's events; none where their file is damaged."""
    try:
        return [event for event in run.events if isinstance(event, dict)]
    except (OSError, ValueError):
        return []


def survey(run: RunDir, sent: Sent | None = None) -> list[Row]:
    """One row for each stage of the run as it is now."""
    return rows_of(Chain.of(run), run.is_held() and sent is None, sent)


def rows_of(chain: Chain, held: bool, sent: Sent | None = None) -> list[Row]:
    """One row for each stage; ``held``: a local runner is at work on the run."""
    todo, gave_up = chain.todo(), {}
    for event in events_of(chain.run):
        if "stage" in event:
            gave_up[str(event["stage"])] = event  # the newest; that it failed is what the local runner says last
    rows: dict[str, Row] = {}
    for name in chain.stages:
        row = rows[name] = Look(chain, name, todo, held, sent, gave_up.get(name, {}), rows).row()
        row.update({"fails": True} if row["state"] == "failed" else {})
    return [*rows.values()]


@dataclass(frozen=True)
class Look:
    """A look at one stage. ``event`` is the newest event that names it, or empty."""

    chain: Chain
    name: str
    todo: Mapping[str, str]
    held: bool
    sent: Sent | None
    event: Mapping[str, Any]
    before: Mapping[str, Row]  # of the stages before it

    def row(self) -> Row:
        """The stage's row, by the rule."""
        folder = self.chain.run.stage(self.name)
        attempts = folder.attempts
        row: dict[str, Any] = {"name": self.name, "state": "done", "attempts": len(attempts)}
        sent = self.sent.job_of(self.name) if self.sent else None
        if self.name not in self.todo or self.told(sent, attempts):
            return cast(Row, {**row, "duration_s": (folder.done or {}).get("duration_s", 0.0)})
        if not self.chain.is_current(self.name):
            attempts = []
        job = self.sent.jobs.get(sent.id) if self.sent and sent else None
        holder = self.holder(sent, job)
        verdict = self.verdict(attempts)
        rules = RULE[holder]
        row["state"], reason = rules.get(self.left(holder, job, attempts, verdict), rules["any"])
        row |= {"reason": "", **({"job": sent.id} if sent else {})}
        blocked = [need for need in self.chain.stages[self.name].needs if self.before[need].get("fails")]
        always = self.chain.stages[self.name].always
        if holder in ("ended", "cancelled") and not attempts and blocked and not always:
            reason = f"not begun: it needs {', '.join(blocked)}"
            return cast(Row, {**row, "state": "todo", "reason": reason, "fails": True})
        if reason == "why":
            row["reason"] = self.todo[self.name]
        elif reason == "verdict":
            line = str(verdict.get("line"))
            row["reason"] = line if row["state"] == "cancelled" else f"exit {verdict.get('code')}: {line}"
        elif reason == "needs":
            pending = [need for need in self.chain.stages[self.name].needs if need in self.todo]
            row["reason"] = f"waits for {', '.join(pending)}" if pending else "starts next"
        elif reason == "progress":
            row |= progress(self.chain, self.name, attempts)
        elif sent and reason == "ahead":
            row["reason"] = f"waits for {self.at_work(sent)} in the same job"
        elif sent and reason == "job":
            row["reason"] = over(self.chain.run, sent.id) or (in_words(job) if job else "")
            if attempts and attempts[-1].lost_script:
                row["reason"] += ": its batch script was killed"
            elif verdict:
                row["reason"] += f": {verdict.get('line')}"
            elif not self.began(sent):
                row["reason"] += first_error(self.chain.run.path, sent.id)
        elif job and reason == "start":
            again = f"{history(attempts, job.id)}; " if attempts else ""
            row["reason"] = again + ("starts" if job.state == "RUNNING" else in_words(job))
        elif job and self.sent and reason == "queue":
            row |= queued(job, attempts, self.sent.journal.names)
        return cast(Row, row)

    def told(self, sent: SentJob | None, attempts: Sequence[Attempt]) -> bool:
        """Whether this is a report that the newest chain has made, though not of all that was to be done."""
        if sent is None or not attempts or not self.chain.stages[self.name].always:
            return False
        done = self.chain.run.stage(self.name).done or {}
        return attempts[-1].job_id == sent.id and done.get("attempt") == attempts[-1].number

    def holder(self, sent: SentJob | None, job: queue.QueuedJob | None) -> Holder:
        """What holds the stage."""
        if self.sent is None or sent is None:
            return "runner" if self.held else "nobody"
        if self.sent.silent:
            return "silent"
        gone = over(self.chain.run, sent.id)
        if job is None or job.ended or (gone and not self.chain.stages[self.name].always):
            state = job.state if job else "COMPLETED"  # Slurm forgets a job some minutes after its end
            failed = state != "COMPLETED" or gone
            return "cancelled" if state == "CANCELLED" else "ended" if failed else "nobody"
        if job.waiting:
            return "queued"
        return "job" if self.at_work(sent) == self.name else "behind"

    def at_work(self, sent: SentJob) -> str:
        """The stage that a job works on: the first that is not done; when the job is over, what comes all the same."""
        gone = over(self.chain.run, sent.id)
        left = (stage for stage in sent.stages if stage in self.todo)
        return next(stage for stage in left if not gone or self.chain.stages[stage].always)

    def began(self, sent: SentJob) -> bool:
        """Whether a job has come to an attempt of any of its stages."""
        folders = (self.chain.run.stage(stage) for stage in sent.stages)
        return any(attempt.job_id == sent.id for folder in folders for attempt in folder.attempts)

    def verdict(self, attempts: Sequence[Attempt]) -> Mapping[str, Any]:
        """Of the last attempt: its own, else (it was killed) that of the runner which gave it up; empty without one."""
        own = attempts[-1].verdict if attempts else None
        return own or (self.event if self.event.get("event") == "failed" else {})

    def left(
        self, holder: Holder, job: queue.QueuedJob | None, attempts: Sequence[Attempt], verdict: Mapping[str, Any]
    ) -> Left:
        """What the last attempt left behind, for whoever holds the stage now."""
        if not verdict:
            if not attempts or (self.chain.stages[self.name].always and self.chain.is_done(self.name)):
                return "nothing"
            others = job is not None and (job.state != "RUNNING" or attempts[-1].job_id != job.id)
            return "nothing" if others else "open"
        if holder == "runner" and verdict.get("time", 0.0) <= self.chain.run.held_since:
            return "nothing"  # before this runner began
        if self.event.get("event") == "failed":
            return "failed"
        if holder == "ended" and attempts and attempts[-1].lost_script:
            return "open"  # its ranks were asked to stop, but nobody asked for that
        if verdict.get("code") in (75, 130):
            return "stopped"
        return "restart" if verdict.get("code") in RESTART_CODES else "failed"


def over(run: RunDir, job: str) -> str:
    """Why the batch script of a job ended it for good; empty where it did not say."""
    words = read_over(run.path / "jobs" / f"{job}.over")
    return visible(f"exit {words[0]}: {words[1]}") if words else ""


def queued(job: queue.QueuedJob, attempts: Sequence[Attempt], names: Mapping[str, str]) -> dict[str, Any]:
    """Of a job in the queue: how its attempts ended, what it waits for, and when Slurm means to start it."""
    again = f"{history(attempts, job.id)}; " if attempts else ""
    start = {} if job.start is None else {"expected_start": job.start}
    return {"reason": again + in_words(job, names), **start, **({"stuck": True} if job.stuck else {})}


def progress(chain: Chain, name: str, attempts: Sequence[Attempt]) -> dict[str, Any]:
    """Figures and reason of a stage that works now, in the last of ``attempts``."""
    row: dict[str, Any] = {}
    attempt, before = attempts[-1], attempts[:-1]
    own = [line for line in attempt.lines if "loss" in line]
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
            row["eta_s"] = sorted(times)[len(times) // 2] * (phase.steps - row["step"])
            words.append(f"ETA {in_short(row['eta_s'])}")
    if own and is_number(own[-1].get("time")):
        row["age_s"] = max(0.0, now() - own[-1]["time"])
        words.append(f"{in_short(row['age_s'])} ago")
    if before:
        words.append(history(before, attempt.job_id))
        words.append(f"resumed at step {attempt.resumed_from}" if attempt.resumed_from else f"attempt {attempt.number}")
    return {**row, "reason": ", ".join(words)}


def history(attempts: Sequence[Attempt], job: str) -> str:
    """How the attempts of a stage ended, in the order of first mention: "preempted twice, lost a rank".

    A job that was cancelled never comes back: what was stopped and is ``job`` again, and nothing else is known of it,
    was preempted.
    """
    counts: dict[str, int] = {}
    told = {each: ends(attempts[0].path.parents[3], each) for each in {one.job_id for one in attempts}}
    for attempt in attempts:
        ended = attempt.verdict or {}
        code, cause = ended.get("code"), ended.get("cause")
        asked = "preempted" if attempt.job_id == job else "stopped"
        lost = "ran out of memory" if cause == "memory" else "lost a rank"
        words = {75: asked, 76: lost, 77: "met a bad node", 130: "interrupted", None: "killed"}
        word = words.get(code, f"failed with code {code}")
        end = told[attempt.job_id].get(str(attempt.owner.get("restart", 0)))
        if end and (end.node or (end.words and code in (75, 76, None))):
            word = end.words
        if cause in LIMITS:
            word = LIMITS[cause]
        word = "lost its batch script" if attempt.lost_script else word
        counts[word] = counts.get(word, 0) + 1
    often = {1: "", 2: " twice"}
    return ", ".join(f"{word}{often.get(count, f' {count} times')}" for word, count in counts.items())
