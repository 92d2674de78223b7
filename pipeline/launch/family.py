"""Runs that share their data, begun by one call: FAMILY/data makes the data, the others read them through links.

On Slurm all is sent in one call: the others wait for the jobs that make the data, and nothing starts before the last
job of the last run is accepted; of a call that is refused nothing is left in the queue.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.launch import request
from pipeline.launch.request import Request
from pipeline.launch.start import sending, start
from pipeline.run.family import DATA, link
from pipeline.run.journal import Journal, live_jobs
from pipeline.run.rundir import RunDir
from pipeline.stages import Command, table
from pipeline.strict_toml import raise_all
from slurm import queue
from slurm.submission import Need


def start_family(path: Path | None, members: Mapping[str, Sequence[str]], words: Sequence[str]) -> int:
    """Start a family; the first exit code that is not 0."""
    return start_all(*requests(path, members, words))


def requests(
    path: Path | None, members: Mapping[str, Sequence[str]], words: Sequence[str]
) -> tuple[Request, list[Request]]:
    """What the run of the data and each other run are asked for. ConfigError with all that is wrong in any.

    ``members``: words of its own by the name of its folder, also for the run of the data if it has any.
    """
    if path is None or (path / "run.json").exists():
        raise ConfigError(f"--run {path}: name a folder for several runs that is no run, new or of such a family")
    data = request.of(["--run", str(path / DATA), *words, *members.get(DATA, ())])
    if data.write_scripts or data.own or isinstance(data.recipe, Command):
        raise ConfigError("several runs on the same data take a --recipe, and neither --text nor --write-scripts")
    if data.profile.spares and data.split:  # Slurm takes "all of" or "one of" several jobs, not a mixture
        raise ConfigError("--split: jobs that wait for several jobs can have no spares; leave it out")
    stages = tuple(name for name, stage in table(data.recipe).items() if stage.job == "data")
    others, faults = [], []
    for name, own in members.items():
        if name != DATA:
            try:
                asked = request.of(["--run", str(path / name), *words, *own])
            except ConfigError as error:
                faults.append(str(error))
                continue
            remake = tuple(stage for stage in asked.remake if stage not in stages)
            others.append(dataclasses.replace(asked, elsewhere=stages, remake=remake))
    raise_all(dict.fromkeys(faults))
    return dataclasses.replace(data, stages=stages), others


def start_all(data: Request, others: Sequence[Request]) -> int:
    """The run of the data and then the others; the first exit code that is not 0."""
    if not (data.local or data.dry_run or data.test_only):
        send_family(data, others)
        return 0
    for asked in (data, *others):
        print(f"{asked.run.path}:", flush=True)
        if asked.elsewhere and not (asked.dry_run or asked.test_only):
            link(asked.run, asked.elsewhere)
        if code := start(asked):
            return code
    return 0


def send_family(data: Request, others: Sequence[Request]) -> None:
    """Send what no job that lives is there for. With --replace, or where the data are made anew, all is sent anew."""
    spares = data.profile.spares > 0
    with contextlib.ExitStack() as held:
        print(f"{data.run.path}:")
        making = [] if data.replace else at_work(data.run)
        anew = data.replace
        if not making:
            sent = held.enter_context(sending(data))
            making, anew = [job.job_id for job in sent], anew or bool(sent)
        after = [Need(job=number) for number in making]
        for asked in others:
            print(f"{asked.run.path}:", flush=True)
            if not anew and (jobs := at_work(asked.run)):
                print(f"  its jobs are in the queue ({', '.join(jobs)}); --replace sends them anew")
                continue
            link(asked.run, asked.elsewhere)
            held.enter_context(sending(asked, after, any_need=bool(after) and spares))


def at_work(run: RunDir) -> list[str]:
    """The jobs of a run that live, where they are a whole chain that can go on; else none."""
    journal = Journal.read(run)
    if journal is None or journal.state != "released":
        return []
    jobs = queue.patiently(lambda: live_jobs(run), say=print)
    return [] if any(job.stuck for job in jobs) else [job.id for job in jobs]
