"""How far a stage is, on standard output: on a terminal one line that is drawn again, elsewhere a line now and then."""

from __future__ import annotations

import math
import shutil
import sys
import time
from dataclasses import dataclass

from pipeline.words import in_short

INTERVAL_S = 10.0  # between lines on how far a stage is, where they are kept
BAR = 20  # characters


@dataclass
class Screen:
    """Where one process shows its lines; ``first``: time and share at the first look, for the time that is left."""

    first: tuple[float, float] | None = None
    shown: float = -math.inf

    def show(self, line: str, share: float | None = None) -> None:
        """Print ``line``; with the ``share`` of the work that is done, 0 to 1, as a bar. Raises OSError."""
        terminal, now = sys.stdout.isatty(), time.monotonic()
        clear = "\r\x1b[K" if terminal else ""
        if share is None:
            print(f"{clear}{line}", flush=True)
        elif terminal:
            print(clear + self.bar(line, share, now), end="\n" if share >= 1 else "", flush=True)
        elif share >= 1 or now - self.shown >= INTERVAL_S:
            self.shown = now
            print(line, flush=True)

    def bar(self, line: str, share: float, now: float) -> str:
        """``████░░░░  40 %  ETA 3 min  line``, cut at the terminal's width."""
        self.first = self.first or (now, share)
        began, at = self.first
        left = f"  ETA {in_short((now - began) / (share - at) * (1 - share))}" if at < share < 1 else ""
        full = round(BAR * share)
        drawn = f"  {'█' * full}{'░' * (BAR - full)} {share:4.0%}{left}  {line.strip()}"
        return drawn[: shutil.get_terminal_size().columns - 1]
