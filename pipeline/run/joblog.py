"""What the log of a Slurm job tells: how its attempts ended, and what a job said that came to none."""

from __future__ import annotations

import contextlib
import itertools
import re
from pathlib import Path
from typing import NamedTuple

from data_prep.publish import open_plain
from pipeline.run.files import MOST_LINES_BYTES
from pipeline.words import visible

BEGINS = re.compile(r"^attempt (\d{1,6}): on \S+, this script on ([\w.-]+)$", re.MULTILINE)
ASKED = re.compile(r"^attempt \d+: code (\d+)(, preempted)?, requeued$", re.MULTILINE)
BY_SLURM = re.compile(r"\*\*\* (?:JOB|STEP) .* DUE TO ([A-Z ]+) \*\*\*")
SIGNS = re.compile(r"^attempt \d+: code |\*\*\* (?:JOB|STEP) ", re.MULTILINE)
WORDS = {"PREEMPTION": "preempted", "TIME LIMIT": "out of time", "JOB REQUEUE": "requeued by hand"}


class End(NamedTuple):
    """How an attempt ended: in words, and the node that was lost under it."""

    words: str
    node: str = ""


def ends(run: Path, job: str) -> dict[str, End]:
    """How attempts of a Slurm job were ended by others than the program itself, by their number, as far as it is known.

    The node of the batch script, lost with it, is known when the next attempt begins. Slurm says why it ends a job;
    where the script saw the ranks save and asked for the requeue itself, it says whether Slurm was preempting the job:
    with time to spare only the ranks get the signal, as from somebody's scancel.
    """
    text = ""
    for path in (run / "logs").glob(f"*-{job}.out") if re.fullmatch("[0-9]+", job) else ():
        with contextlib.suppress(OSError), open_plain(path, MOST_LINES_BYTES) as file:
            text = file.read().decode(errors="replace")
    found, begins = {}, [*BEGINS.finditer(text)]
    for begin, after in itertools.zip_longest(begins, begins[1:]):
        part = text[begin.end() : after.start() if after else len(text)]
        lost = re.findall(r"Node failure on ([\w.-]+)", part)
        asked, by_slurm = ASKED.search(part), BY_SLURM.search(part)
        if after and not lost and not SIGNS.search(part):
            lost = [begin[2]]
        if lost:
            found[begin[1]] = End(f"lost node {lost[-1]}", lost[-1])
        elif asked:
            words = "preempted" if asked[2] else "stopped by a signal" if asked[1] == "75" else ""
            found[begin[1]] = End(words)
        elif by_slurm:
            found[begin[1]] = End(WORDS.get(by_slurm[1], ""))
    return found


def first_error(run: Path, job: str) -> str:
    """What the log of a job that came to no attempt says first of an error, and where that log is; else empty."""
    for path in (run / "logs").glob(f"*-{job}.out"):
        with contextlib.suppress(OSError), open_plain(path) as file:
            lines = [line.strip() for line in file.read(1 << 16).decode(errors="replace").splitlines() if line.strip()]
            wrong = [line for line in lines if re.search("error|no such file|not found|denied", line, re.IGNORECASE)]
            wrong = [line for line in wrong if "Exited with exit code" not in line] or wrong  # srun's echo of a rank
            return visible(f": {(wrong or lines)[0][:200]} ({path})") if lines else ""
    return ""
