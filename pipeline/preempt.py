"""Being asked to stop: handlers only set a flag, the stage looks at it where stopping is safe."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from types import FrameType

from pipeline.errors import StoppedCleanly

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


@dataclass
class StopRequest:
    """Set by a signal; read at step boundaries."""

    reason: str | None = None

    def listen(self) -> None:
        """Note the first stop signal and go on working."""

        def note(number: int, frame: FrameType | None) -> None:
            self.reason = self.reason or signal.Signals(number).name

        for number in STOP_SIGNALS:
            signal.signal(number, note)


def stop_at_once() -> None:
    """For stages that may stop anywhere because every file they write is published whole."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise StoppedCleanly(f"stopped by {signal.Signals(number).name}; what is finished is kept")

    for number in STOP_SIGNALS:
        signal.signal(number, leave)
