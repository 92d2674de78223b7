"""Watching a run: its table redrawn, its state in one line for a phone, and a stage's log as it grows.

Knows nothing of how states are found: ``pipeline.status`` passes functions that ask anew.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Sequence

from data_prep.publish import open_plain
from pipeline.run.rundir import Attempt, StageDir
from pipeline.run.state import Row
from pipeline.words import in_short, visible

INTERVAL_S = 2.0  # between two questions to squeue
LOG_INTERVAL_S = 0.25
PHONE = 80  # characters
CHUNK = 1 << 20


def goes_on(row: Row) -> bool:
    """Whether a stage runs or can still start without anybody's help."""
    return row["state"] in ("running", "waiting", "unknown") and not row.get("stuck")


def short_line(name: str, rows: Sequence[Row], silent: str = "") -> str:
    """The run in at most 80 characters: what runs or is wrong or waits, and how many stages are done."""
    done = f"{sum(row['state'] == 'done' for row in rows)}/{len(rows)} done"
    of = {state: [row for row in rows if row["state"] == state] for state in ("running", "failed", "cancelled")}
    parts = [f"{row['state']} {row['name']}: {row.get('reason', '')}" for row in of["failed"] + of["cancelled"]]
    if of["running"]:
        parts[:0] = _figures(of["running"][0])
        more = len(of["running"]) - 1
        parts += [f"and {more} more"] if more else []
    elif silent:
        parts.append("Slurm does not answer")
    elif not parts:
        parts += [f"{row['name']} {row.get('reason', '')}" for row in rows if row["state"] == "waiting"][:1]
    middle = "".join(f"  {part}" for part in parts)
    name = _cut(name, max(12, PHONE - len(middle) - 2 - len(done)))  # a long name gives way to figures
    return f"{name}{_cut(middle, PHONE - len(name) - 2 - len(done))}  {done}"


def _figures(row: Row) -> list[str]:
    step = f" {row['step']}" if "step" in row else ""
    parts = [f"{row['name']}{step}{'/' + str(row['steps']) if step and 'steps' in row else ''}"]
    parts += [f"loss {row['loss']:.3g}"] if "loss" in row else []
    parts += [f"{row['sequences_per_s']:.3g} seq/s"] if "sequences_per_s" in row else []
    return parts + ([f"ETA {in_short(row['eta_s'])}"] if "eta_s" in row else [])


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def watch(look: Callable[[], tuple[list[str], bool]]) -> None:
    """Show the lines that ``look`` gives until it says that nothing goes on.

    A terminal is redrawn; anything else gets the lines that changed since they were last shown.
    """
    before: list[str] = []
    while True:
        lines, more = look()
        if sys.stdout.isatty():
            width = shutil.get_terminal_size().columns
            sys.stdout.write("\x1b[H" + "".join(f"{_cut(line, width)}\x1b[K\n" for line in lines) + "\x1b[J")
        else:
            sys.stdout.writelines(f"{line}\n" for line in lines if line not in before)
        sys.stdout.flush()
        if not more:
            return
        before = lines
        time.sleep(INTERVAL_S)


def print_log(attempt: Attempt, offset: int = 0) -> int:
    """Print an attempt's log from ``offset`` bytes on, control characters shown; the offset of its end."""
    with contextlib.suppress(FileNotFoundError), open_plain(attempt.log, 1 << 40) as file:
        file.seek(offset)
        while chunk := file.readline(CHUNK):
            line = chunk.decode(errors="backslashreplace").removesuffix("\n")
            sys.stdout.write(visible(line) + "\n" * chunk.endswith(b"\n"))
            offset += len(chunk)
    sys.stdout.flush()
    return offset


def follow_log(folder: StageDir, more: Callable[[], bool]) -> None:
    """Print the newest attempt's log as it grows, then the next attempt's, until ``more`` says that it ended."""
    number = 0  # of the attempt that is shown
    offset, asked, lasts = 0, -INTERVAL_S, True
    while lasts:
        if time.monotonic() - asked >= INTERVAL_S:
            lasts, asked = more(), time.monotonic()  # before the log is read: what was written until then is shown
        attempts = folder.attempts
        for attempt in [one for one in attempts if one.number >= number] if number else attempts[-1:]:
            if number and attempt.number > number:
                print(f"==> attempt {attempt.number} <==", flush=True)
                offset = 0
            number, offset = attempt.number, print_log(attempt, offset)
        if lasts:
            time.sleep(LOG_INTERVAL_S)
