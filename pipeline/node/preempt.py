"""Being asked to stop: handlers only set a flag, the stage looks at it where stopping is safe."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from types import FrameType
from typing import Literal

from pipeline.errors import Cause, StoppedCleanly

RESERVE_S = 30.0  # before the deadline: leaving, and what cannot be measured
EARLY_S = 60.0  # Slurm's warning signals may come so much too early (sbatch(1), --signal)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


@dataclass
class StopRequest:
    """Set by a signal, or by a time limit that comes near; read at step boundaries."""

    reason: str | None = None
    cause: Cause | None = None
    deadline: float | None = None  # when Slurm ends this job, in seconds since 1970
    limit: Literal["time_limit", "gpu_hours"] = "time_limit"  # what ends it then
    warning_s: float = 0.0  # Slurm sends a signal so long before
    looks: bool = True  # one rank looks at the deadline for all: clocks differ
    longest_step_s: float = 0.0

    def asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self.reason is not None

    def listen(self) -> None:
        """Note the first stop signal and go on working."""

        def note(number: int, frame: FrameType | None) -> None:
            if not self.asked():
                self.reason, self.cause = self.meaning(number)

        for number in STOP_SIGNALS:
            signal.signal(number, note)

    def meaning(self, number: int) -> tuple[str, Cause]:
        """What a signal says that comes now: that the deadline is near, or that somebody asks."""
        name = signal.Signals(number).name
        warned = self.deadline is not None and time.time() > self.deadline - self.warning_s - EARLY_S
        return (f"{name}, {self._left()}", self.limit) if warned else (name, "signal")

    def after_step(self, step_s: float, save_s: float) -> None:
        """Ask for a stop when one more step and a save (given as last measured) may not fit before the deadline."""
        self.longest_step_s = max(self.longest_step_s, step_s)
        needed_s = 2 * save_s + self.longest_step_s + RESERVE_S
        near = self.looks and self.deadline is not None and time.time() > self.deadline - needed_s
        if not self.asked() and near:
            self.reason, self.cause = self._left(), self.limit

    def _left(self) -> str:
        left_s = max(0.0, (self.deadline or 0.0) - time.time())
        return f"{left_s:.0f} s before its time or GPU-hours are used up"


def stop_at_once(stop: StopRequest) -> None:
    """For stages that may stop anywhere because every file they write is published whole."""

    def leave(number: int, frame: FrameType | None) -> None:
        reason, cause = stop.meaning(number)
        raise StoppedCleanly(f"stopped by {reason}; what is finished is kept", cause)

    for number in STOP_SIGNALS:
        signal.signal(number, leave)
