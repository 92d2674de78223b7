"""Where the time of a run went, by stage and for the chain; every second of a stage's wall time is in one part.

A stage's wall time begins when its last need ended (a first stage's: with the run's first submission) and ends with
its last sign of life. Stages that run side by side each have their own account. The chain's is the sum over its
critical path: the stage that ended last, before it the one that had ended last when it started, be it a need or one
that held the machine, and so on; what ran beside these cost no time. It is time, not node-hours. Processes that Slurm
starts are seen once they are at work: the start of a job's script and interpreter counts as waiting.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.run.files import read_json
from pipeline.run.rundir import RunDir, StageDir
from pipeline.stage import Stage
from pipeline.words import is_number

PARTS = {
    "compute": "computing",
    "communication": "communication",
    "data": "waiting for data",
    "evaluation": "evaluation",
    "checkpoint": "saving checkpoints",
    "start_up": "start-up",
    "rework": "steps done again",
    "other": "other",
    "queue": "waiting to start",
    "stopped": "stopped, not submitted",
}
"""The parts in words. ``compute`` is also the work of a stage that has no steps; ``rework`` what a later attempt, or
the same after going back, did again; ``stopped`` the time up to the submission that brought a stage back."""

NOT_ALLOCATED = ("queue", "stopped")
USEFUL = ("compute", "communication")
COMPUTING, OTHER = {"compute": 1.0}, {"other": 1.0}
TRAINING = (*USEFUL, "data")  # of steps that count: what the field calls the time to train


@dataclass(frozen=True)
class Account:
    """Seconds by part, of Unix time ``began`` to ``ended``."""

    began: float
    ended: float
    parts: Mapping[str, float]

    @property
    def wall_s(self) -> float:
        return sum(self.parts.values())

    @property
    def allocated_s(self) -> float:
        """Time in which processes of the stage ran."""
        return self.wall_s - sum(self.parts[part] for part in NOT_ALLOCATED)

    @property
    def goodput(self) -> float | None:
        """Useful step time ÷ allocated time, 0 to 1; None before anything ran."""
        useful = sum(self.parts[part] for part in USEFUL)
        return useful / self.allocated_s if self.allocated_s > 0 else None

    def to_dict(self) -> dict[str, Any]:
        seconds = {part: round(value, 3) for part, value in self.parts.items()}
        goodput = None if self.goodput is None else round(self.goodput, 4)
        return {"wall_s": round(self.wall_s, 3), "allocated_s": round(self.allocated_s, 3), "goodput": goodput,
                "parts_s": seconds}  # fmt: skip


@dataclass(frozen=True)
class RunAccount:
    """The accounts of all stages that began, and of the chain over the stages of its critical ``path``."""

    chain: Account
    path: Sequence[str]
    stages: Mapping[str, Account]

    def to_dict(self) -> dict[str, Any]:
        stages = {name: account.to_dict() for name, account in self.stages.items()}
        return {**self.chain.to_dict(), "critical_path": list(self.path), "stages": stages}


class Piece(NamedTuple):
    """What one metric line says of the time before it: Unix times, and how it divides among the parts (above 0).

    ``measured``: the line says so itself; older ones do not, and count as computing. A tuple, since a run has tens of
    thousands of them.
    """

    since: float
    until: float
    spent: Mapping[str, float]
    step: float | None
    seed: str
    measured: bool


@dataclass(frozen=True)
class Times:
    """One attempt: Unix times, its pieces, the step it continued from (None where no steps are resumed).

    ``worked_from`` is when its stage's function began, where known; with ``has_steps`` when a first step that is still
    in work did, and other work that logged nothing was start-up. ``rollbacks``: (time, step gone back to).
    """

    began: float
    ended: float
    pieces: Sequence[Piece] = ()
    from_step: int | None = None
    worked_from: float | None = None
    rollbacks: Sequence[tuple[float, int]] = ()
    has_steps: bool = False
    finished: bool = False


def pieces_of(lines: Iterable[Mapping[str, Any]]) -> list[Piece]:
    """A metrics file's lines, whatever they hold, as pieces; of those without a time nothing is known.

    Where no line says how its time was spent, the time between two of them was computing, and that before the first
    one, but for its own step, start-up.
    """
    known = [line for line in lines if is_number(line.get("time"))]
    measured = [line for line in known if is_number(line.get("since")) and isinstance(line.get("spent_s"), Mapping)]
    pieces: list[Piece] = []
    for line in measured or known:
        until, step, spent = line["time"], line.get("step"), COMPUTING
        if measured:
            since = line["since"]
            spent = {part: s for part, s in line["spent_s"].items() if is_number(s) and s > 0} or OTHER
        elif pieces:
            since = pieces[-1].until
        else:
            since = until - (line["step_s"] if is_number(line.get("step_s")) else 0.0)
        seed = str(line.get("seed"))
        pieces.append(Piece(since, until, spent, step if is_number(step) else None, seed, bool(measured)))
    return pieces


# -------------------------------------------------------------------- arithmetic


def stage_account(attempts: Sequence[Times], ready: float, submissions: Sequence[float]) -> Account:
    """The account of a stage that could have started at ``ready``; ``attempts`` in order, at least one.

    Before each attempt: ``stopped`` up to the last submission in between, if there was one, then ``queue``. Attempts
    that overlap by the clocks of two machines are cut, so no second counts twice.
    """
    cursor = ready = min(ready, attempts[0].began)
    parts = dict.fromkeys(PARTS, 0.0)
    for index, attempt in enumerate(attempts):
        began = max(cursor, attempt.began)
        asked = max((time for time in submissions if cursor < time < began), default=cursor)
        parts["stopped"] += asked - cursor
        parts["queue"] += began - asked
        cursor = max(began, attempt.ended)
        for part, seconds in attempt_parts(attempt, attempts[index + 1 :], began, cursor).items():
            parts[part] += seconds
    return Account(ready, cursor, parts)


def attempt_parts(attempt: Times, later: Sequence[Times], began: float, ended: float) -> dict[str, float]:
    """Seconds of ``began`` to ``ended`` by part; ``later`` are the attempts that came after."""
    parts = dict.fromkeys(PARTS, 0.0)
    if not attempt.pieces:
        unknown = ended if attempt.has_steps else began
        worked_from = min(max(attempt.worked_from or unknown, began), ended)
        return {**parts, "start_up": worked_from - began, "compute": ended - worked_from}
    cursor, before = began, "start_up"
    for piece, again in zip(attempt.pieces, _redone(attempt, later), strict=True):
        since = min(max(piece.since, cursor), ended)
        until = min(max(piece.until, since), ended)
        parts[before] += since - cursor
        new, total = (until - since) * (1 - again), sum(piece.spent.values())
        for part, seconds in piece.spent.items():
            parts[part if part in parts else "other"] += new * (seconds / total)
        parts["rework"] += (until - since) * again
        cursor, before = until, "other"
    parts["evaluation" if attempt.finished and not attempt.pieces[0].measured else "other"] += ended - cursor
    return parts


def _redone(attempt: Times, later: Sequence[Times]) -> list[float]:
    """The share of each piece's steps that were done again: those after the step that somebody went back to."""
    if attempt.from_step is None:
        seen_later = {(piece.seed, piece.step) for other in later for piece in other.pieces}
        return [float((piece.seed, piece.step) in seen_later) for piece in attempt.pieces]
    resumed = min((other.from_step for other in later if other.from_step is not None), default=math.inf)
    shares: list[float] = []
    before: float = attempt.from_step
    for piece in attempt.pieces:
        step = before if piece.step is None else piece.step
        kept = min([resumed, *(to for time, to in attempt.rollbacks if time >= piece.until)])
        if step <= kept:
            shares.append(0.0)
        else:
            shares.append((step - max(before, kept)) / (step - before) if step > before else 1.0)
        before = step
    return shares


def run_account(
    histories: Mapping[str, Sequence[Times]], needs: Mapping[str, Sequence[str]], submissions: Sequence[float]
) -> RunAccount | None:
    """The accounts of stages by their attempts (at least one each, needs first); None when no stage has begun."""
    if not histories:
        return None
    stages: dict[str, Account] = {}
    for name, attempts in histories.items():
        first = min([time for time in submissions if time <= attempts[0].began], default=attempts[0].began)
        ready = max([stages[need].ended for need in needs[name] if need in stages], default=first)
        stages[name] = stage_account(attempts, ready, submissions)
    path = [max(stages, key=lambda name: stages[name].ended)]
    while before := [
        name
        for name, account in stages.items()
        if name not in path and (account.ended <= histories[path[0]][0].began or name in needs[path[0]])
    ]:
        path.insert(0, max(before, key=lambda name: stages[name].ended))
    began = ended = stages[path[0]].began
    parts = dict.fromkeys(PARTS, 0.0)
    for name in path:  # each from where the one before it ended: until then, that one was at work
        account = stages[name]
        if min(ended, histories[name][0].began) != account.began:
            account = stage_account(histories[name], ended, submissions)
        parts = {part: parts[part] + account.parts[part] for part in PARTS}
        ended = account.ended
    return RunAccount(Account(began, ended, parts), path, stages)


# -------------------------------------------------------------------- from a run's files


def read(
    run: RunDir, stages: Mapping[str, Stage], events: Sequence[Mapping[str, Any]], live: Collection[str], now: float
) -> RunAccount | None:
    """The account of a run in whatever state; ``live`` are the stages at work. Damaged files cost their own figures."""
    submissions = [e["time"] for e in events if e.get("event") == "submitted" and is_number(e.get("time"))]
    rollbacks = [e for e in events if e.get("event") == "rolled_back" and is_number(e.get("time"))]
    rollbacks = [e for e in rollbacks if is_number(e.get("to_step"))]
    histories: dict[str, list[Times]] = {}
    for name, stage in stages.items():
        own = [e for e in rollbacks if e.get("stage") == name]
        attempts = [] if stage.always else _attempts(run.stage(name), stage, own, now if name in live else None)
        if attempts:
            histories[name] = attempts
    return run_account(histories, {name: stages[name].needs for name in histories}, submissions)


def _attempts(folder: StageDir, stage: Stage, rollbacks: Sequence[Mapping[str, Any]], now: float | None) -> list[Times]:
    """The attempts whose beginning is on record; ``now`` for a stage at work."""
    history, done, attempts = [], folder.done or {}, folder.attempts
    for attempt in attempts:
        if (span := attempt.span) is None:
            continue
        began, ended = span
        started, finished = (done.get(key) if done.get("attempt") == attempt.number else None
                             for key in ("started", "finished"))  # fmt: skip
        if is_number(finished):
            ended = max(ended, finished)
        live = now is not None and attempt is attempts[-1]
        if live and now is not None and ended == began:
            ended = max(began, now)
        if stage.has_steps:
            started = (read_json(attempt.path / "attempt.json") or {}).get("time") if live else None
        times = Times(
            began=began,
            ended=ended,
            pieces=pieces_of(attempt.lines),
            from_step=attempt.resumed_from,
            worked_from=started if is_number(started) else None,
            rollbacks=[(e["time"], e["to_step"]) for e in rollbacks if e.get("attempt") == attempt.number],
            has_steps=stage.has_steps,
            finished=done.get("attempt") == attempt.number,
        )
        history.append(times)
    return history
