"""Where one training process is, in memory that it shares with the process that watches it."""

from __future__ import annotations

import mmap
import struct
import threading
import time
from typing import Literal, NamedTuple, get_args

Where = Literal["starting", "working", "waiting"]
PLACES: tuple[Where, ...] = get_args(Where)
FIELDS = struct.Struct("<dqqd")
LIVENESS = struct.Struct("<d")  # behind the fields: another thread writes it
LIVENESS_S = 1.0


class Beat(NamedTuple):
    """The last sign of life: ``time_s`` is monotonic, ``longest_s`` the longest time between two beats of work,
    ``alive_s`` when a thread of the process could last run at all."""

    time_s: float
    where: Where
    step: int
    longest_s: float
    alive_s: float


class Heartbeat:
    """Beaten once per micro-batch and around every wait for other ranks; made before the process forks.

    A rank that waits is not the one that hangs, as long as its liveness shows: it says so, and the watcher looks for
    another. That ends when the process is stopped or a thread keeps the interpreter's lock.

    Work counts as starting until the step is done that was last said to be starting, for nobody knows how long it may
    take: a GPU's program is compiled, a slow machine is slow. The time after the first beat of work counts for
    ``longest_s`` only as long as there is no other.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, FIELDS.size + LIVENESS.size)
        self._last = Beat(time.monotonic(), "starting", 0, 0.0, 0.0)
        self._started_at = 0  # the step that the first step begins with
        self._first_s = self._longest_s = 0.0
        self._working = False
        self._write()

    def beat(self, where: Where, step: int) -> None:
        """Say that this process is alive, and what it is about to do."""
        now = time.monotonic()
        if self._working:
            took = now - self._last.time_s
            if self._first_s:
                self._longest_s = max(self._longest_s, took)
            else:
                self._first_s = took
        self._working = where == "working"
        if where == "starting":
            self._started_at, self._first_s, self._longest_s = step, 0.0, 0.0
        elif self._working and step <= self._started_at:
            where = "starting"
        self._last = Beat(now, where, step, self._longest_s or self._first_s, 0.0)
        self._write()

    def show_liveness(self) -> None:
        """From now on show every second, from a thread, that threads of this process can run."""

        def show() -> None:
            while True:
                LIVENESS.pack_into(self._memory, FIELDS.size, time.monotonic())
                time.sleep(LIVENESS_S)

        threading.Thread(target=show, name="liveness", daemon=True).start()

    def read(self) -> Beat:
        """What the other process said last."""
        time_s, place, step, longest_s = FIELDS.unpack_from(self._memory)
        return Beat(time_s, PLACES[place], step, longest_s, *LIVENESS.unpack_from(self._memory, FIELDS.size))

    def _write(self) -> None:
        time_s, where, step, longest_s, _ = self._last
        FIELDS.pack_into(self._memory, 0, time_s, PLACES.index(where), step, longest_s)
