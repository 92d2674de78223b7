"""Rows of the fault table: what was injected how often, what went wrong, and how many steps were lost at most.

A module of faults has ``INJECTIONS = {name: function(folder, scale) -> rows}``: ``folder`` is empty and its own,
``scale`` 1.0 asks for the full counts. ``python tests/faults`` runs all of them; the tests run a tenth.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
SCALE = 1.0 if os.environ.get("CHAOS") == "1" else 0.1  # of the tests


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    fault: str
    trials: int
    failures: int
    lost_steps: int | None = None  # the most of any trial; None where no steps are at stake
    note: str = ""
    failed: tuple[str, ...] = ()  # the first words of each failure


Injection = Callable[[Path, float], list[Row]]


def tried(fault: str, trials: Iterable[Callable[[], int | None]], note: str = "") -> Row:
    """Run the trials of one fault. A trial returns the steps that it lost, or None; AssertionError is a failure."""
    count, lost, failed = 0, [], []
    for trial in trials:
        count += 1
        try:
            lost.append(trial())
        except AssertionError as error:
            failed.append(f"trial {count}: {error}"[:500])
    steps = [number for number in lost if number is not None]
    return Row(fault, count, len(failed), max(steps, default=None), note, tuple(failed))


def share(count: int, scale: float) -> int:
    """``count`` trials at ``scale``, at least one."""
    return max(1, round(count * scale))


def spread(points: Sequence[T], scale: float) -> list[T]:
    """The share of ``points``, taken evenly over all of them."""
    wanted = share(len(points), scale) if points else 0
    return [points[index * len(points) // wanted] for index in range(wanted)]


def scratch() -> AbstractContextManager[str]:
    """A folder for one injection, in memory where that is possible: thousands of trials wait for no disk."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(prefix="faults-", dir=memory if os.access(memory, os.W_OK) else None)


def passes(rows: Sequence[Row]) -> None:
    """For the tests: AssertionError names the faults that were not survived; no row at all is one."""
    assert rows
    for row in rows:
        assert row.trials > 0, f"{row.fault}: nothing was tried"
        assert row.failures == 0, f"{row.fault}: {row.failures} of {row.trials}: {'; '.join(row.failed[:3])}"
