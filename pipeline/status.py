"""``python -m pipeline.status RUN``: every stage's state, reason and progress, from the run's files and from squeue."""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, run_command
from pipeline.run import account
from pipeline.run.chain import Chain
from pipeline.run.family import runs_of
from pipeline.run.incidents import incidents
from pipeline.run.rundir import RunDir
from pipeline.run.state import Row, Sent, events_of, rows_of, survey
from pipeline.watch import follow_log, goes_on, print_log, short_line, watch
from pipeline.words import columns, in_short

MOST_INCIDENTS = 5  # shown below the table; the report has all


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.status", description=__doc__)
    parser.add_argument("run", type=Path, help="run directory, or the folder of runs of --seeds pretrain=")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="machine-readable")
    form.add_argument("--short", action="store_true", help="one line of at most 80 characters")
    form.add_argument("--log", metavar="STAGE", help="the log of the stage's newest attempt")
    form.add_argument("--du", action="store_true", help="what each part of the folder takes on disk")
    parser.add_argument("--watch", action="store_true", help="show it again every 2 s until nothing runs")
    parser.add_argument("-f", "--follow", action="store_true", help="with --log: go on until the stage has ended")
    arguments = parser.parse_args()
    if arguments.watch and (arguments.json or arguments.log or arguments.du):
        parser.error("--watch goes with the table or --short; a log is followed with --log STAGE -f")
    if arguments.follow and not arguments.log:
        parser.error("-f needs --log STAGE")
    gc.set_threshold(100_000)  # tens of thousands of lines are read, in which nothing refers to itself
    runs = runs_of(arguments.run)
    if len(runs) > 1:
        return show_family(runs, parser, arguments)
    run = runs[0]
    if arguments.du:
        print("\n".join(disk_use(run)))
    elif arguments.log:
        show_log(run, arguments.log, arguments.follow)
    elif arguments.watch:
        watch(lambda: look(run, arguments.short))
    elif arguments.json:
        sent = Sent.of(run)
        silent = sent.silent if sent else ""
        rows = survey(run, sent)
        events = events_of(run)
        times = account_of(Chain.of(run), events, rows)
        answer = {"stages": rows, "account": times.to_dict() if times else None, "incidents": incidents(events)}
        print(json.dumps({**answer, **({"slurm": silent} if silent else {})}))
    else:
        print("\n".join(look(run, arguments.short)[0]))
    return 0


def show_family(runs: Sequence[RunDir], parser: argparse.ArgumentParser, given: argparse.Namespace) -> int:
    if given.json or given.log or given.du:
        parser.error(f"--json, --log and --du look at one run, such as {runs[-1].path}")

    def lines() -> tuple[list[str], bool]:
        looks = [look(run, short=True) for run in runs]
        return [line for own, _ in looks for line in own], any(more for _, more in looks)

    if given.watch:
        watch(lines)
    else:
        print("\n".join(lines()[0]))
    return 0


def look(run: RunDir, short: bool) -> tuple[list[str], bool]:
    """The run's state now as lines for people, and whether anything goes on."""
    sent = Sent.of(run)
    chain, events = Chain.of(run), events_of(run)
    rows, silent = rows_of(chain, run.is_held() and sent is None, sent), sent.silent if sent else ""
    more = any(goes_on(row) for row in rows)
    if short:
        return [short_line(run.path.resolve().name, rows, silent)], more
    times = [f"{row['duration_s']:.1f} s" if "duration_s" in row else "" for row in rows]
    cells = [
        (row["name"], row["state"], row.get("job", ""), took, row.get("reason", ""))
        for row, took in zip(rows, times, strict=True)
    ]
    lines = columns([cell if sent else (*cell[:2], *cell[3:]) for cell in cells], right=(2, 3) if sent else (2,))
    lines += [f"! {line}" for line in incidents(events)[-MOST_INCIDENTS:]]
    if spent := account_of(chain, events, rows):
        lines.append(time_line(spent, trained=any(chain.stages[name].has_steps for name in spent.stages)))
    ended = {row["state"] for row in rows} & {"failed", "cancelled"}
    if ended and not more:
        lines.append(f"{'mend what failed, then ' if 'failed' in ended else ''}go on:  {again(run)}")
    if silent:
        lines.append(f"Slurm does not answer, states are from the run's own files: {silent}")
    return lines, more


def again(run: RunDir) -> str:
    """The command that goes on with a run."""
    command = "guard" if "command" in run.settings["recipe"] else "submit"
    return f"python -m pipeline.{command} --run {run.word}"


def disk_use(run: RunDir) -> list[str]:
    """What each stage and each other part of the folder takes on disk, the largest first, and the whole."""
    parts = [*run.path.glob("stages/*"), *(path for path in run.path.glob("*") if path.name != "stages")]
    below = {path: [] if path.is_symlink() else path.rglob("*") for path in parts}
    sizes = {str(path.relative_to(run.path)): sum(map(_on_disk, [path, *below[path]])) for path in parts}
    rows = sorted(((size, name) for name, size in sizes.items()), reverse=True)
    return columns(
        [(f"{size / 1e6:,.1f} MB", name) for size, name in [*rows, (sum(sizes.values()), "all")]], right=(0,)
    )


def _on_disk(path: Path) -> int:
    """Bytes that a file itself takes, a link's not its target's; 0 when it is gone meanwhile."""
    try:
        return path.lstat().st_blocks * 512
    except FileNotFoundError:
        return 0


def account_of(chain: Chain, events: list[dict[str, Any]], rows: list[Row]) -> account.RunAccount | None:
    """Where the run's time went so far."""
    live = [row["name"] for row in rows if row["state"] == "running"]
    return account.read(chain.run, chain.stages, events, live, time.time())


def time_line(times: account.RunAccount, *, trained: bool) -> str:
    """The chain's time in a line: the whole, goodput, and every part above one per cent, the largest first.

    Before anything was ``trained`` there is no goodput to tell: it is the share of steps that count.
    """
    chain, whole = times.chain, times.chain.wall_s or 1.0
    shares = sorted(((seconds / whole, part) for part, seconds in chain.parts.items()), reverse=True)
    parts = [f"{account.PARTS[part]} {100 * share:.0f} %" for share, part in shares if share >= 0.01]
    goodput = f", goodput {100 * chain.goodput:.0f} %" if trained and chain.goodput is not None else ""
    return f"{in_short(chain.wall_s)}{goodput}: {', '.join(parts) or 'nothing has run yet'}"


def show_log(run: RunDir, name: str, follow: bool) -> None:
    """Print a stage's newest log; ConfigError for a stage that there is not, or that has no log to show."""
    stages = Chain.of(run).stages
    if name not in stages:
        raise ConfigError(f"--log: no stage {name!r}; the stages are {', '.join(stages)}")
    folder = run.stage(name)

    def more() -> bool:
        return any(goes_on(row) for row in survey(run, Sent.of(run)) if row["name"] == name)

    if not folder.attempts and not (follow and more()):
        raise ConfigError(f"{run.path}: {name} was not started yet, so it has no log")
    if follow:
        follow_log(folder, more)
    else:
        print_log(folder.attempts[-1])


if __name__ == "__main__":
    run_command(main)
