"""The record of a training: where rank 0's time went, and one line per logged step in ``metrics.jsonl``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, Literal, get_args

from pipeline.node.job import Job
from pipeline.run.files import append_jsonl, now

Part = Literal["data", "compute", "communication", "checkpoint", "evaluation"]
PARTS: tuple[Part, ...] = get_args(Part)
MOST_SHARES = 4096  # micro-batches of a step whose shares of the losses are put on record


def rounded(share: float) -> float:
    """A number with the digits that single precision has."""
    return float(f"{share:.9g}")


class Clock:
    """Seconds of one process by part; what no part claims is ``other``. Parts do not nest.

    On a GPU, time counts where the host waits for it.
    """

    def __init__(self) -> None:
        self.since = now()
        self._spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self.unwritten: list[dict[str, Any]] = []  # lines that a full disk did not take yet

    @contextlib.contextmanager
    def spent(self, part: Part) -> Iterator[None]:
        """Account the time inside to ``part``."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._spent[part] += time.perf_counter() - began

    def so_far(self, part: Part) -> float:
        """Seconds of ``part`` since the last ``take``."""
        return self._spent[part]

    def take(self) -> dict[str, Any]:
        """``since``, ``time`` (Unix seconds) and ``spent_s``, whose values sum to their difference; starts anew."""
        until = now()
        spent = {**self._spent, "other": until - self.since - sum(self._spent.values())}
        shares = {part: round(seconds, 6) for part, seconds in spent.items()}
        window = {"since": self.since, "time": until, "spent_s": shares}
        self.since, self._spent = until, dict.fromkeys(PARTS, 0.0)
        return window


def write_line(job: Job, clock: Clock, step: int, **figures: Any) -> dict[str, Any]:
    """Append one line to the attempt's metrics.jsonl, rank 0 only; returns it.

    Training does not end because a disk is full: lines wait until it takes them.
    """
    line = {"stage": job.stage, "attempt": job.attempt.number, "step": step, **clock.take(), **figures}
    if job.rank == 0:
        clock.unwritten.append(line)
        with contextlib.suppress(OSError):
            while clock.unwritten:
                append_jsonl(job.attempt.metrics, clock.unwritten[0])
                del clock.unwritten[0]
    return line
