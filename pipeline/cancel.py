"""``python -m pipeline.cancel RUN [STAGE]``: stop a run's chain, or a stage and what waits for it."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_prep.publish import publish_text
from pipeline.errors import ConfigError, run_command
from pipeline.run.family import runs_of
from pipeline.run.files import as_shared
from pipeline.run.journal import Journal, by_hand, live_jobs, name_of
from pipeline.run.rundir import RunDir
from slurm import queue


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.cancel", description=__doc__)
    parser.add_argument("run", type=Path, help="run directory, or the folder of runs of --seeds pretrain=")
    parser.add_argument("stage", nargs="?", help="only the job of this stage and the jobs that wait for it (Slurm)")
    arguments = parser.parse_args()
    as_shared(arguments.run)
    for run in runs_of(arguments.run):
        cancel(run, arguments.stage)
    return 0


def cancel(run: RunDir, stage: str | None) -> None:
    """Stop the run, or on Slurm a stage of it, and say so."""
    runner, sent = run.whole_settings["profile"].get("runner"), Journal.path(run).exists() or by_hand(run)
    if runner == "local" and stage is not None and not sent:
        raise ConfigError(f"{run.path} runs on this machine as a whole: leave {stage!r} out to stop it")
    if runner == "local" and run.is_held():
        publish_text(run.cancel_request, "")
        print(f"{run.path}: asked to stop; it saves first, then ends")
    elif sent or runner == "slurm":
        with run.held():  # not while a submit is sending
            cancel_jobs(run, stage)
    else:
        print(f"{run.path}: nothing is running")


def cancel_jobs(run: RunDir, stage: str | None) -> None:
    """Cancel the run's jobs in Slurm; a running one saves first."""
    jobs = queue.patiently(lambda: live_jobs(run), say=print)
    journal = Journal.read(run)
    if stage is not None and journal is not None:
        wanted = and_dependents(journal, stage)
        jobs = [job for job in jobs if name_of(job) in wanted]
    if not jobs:
        print(f"{run.path}: nothing {f'of {stage} ' if stage else ''}is queued or running")
        return
    print(" ".join(queue.cancel(job.id for job in jobs)))
    for job in jobs:
        print(f"cancelled {name_of(job)} (job {job.id})" + ("" if job.waiting else "; it saves first"))
    run.event("cancelled", jobs=[job.id for job in jobs], stage=stage)


def and_dependents(journal: Journal, stage: str) -> set[str]:
    """Names of the job that runs ``stage`` and of all jobs that wait for it."""
    home = journal.job_of(stage)
    if home is None:
        known = [name for job in journal.jobs for name in job.stages]
        raise ConfigError(f"no job of this run has a stage {stage!r}; they have {', '.join(known)}")
    names = {home.name}
    for job in journal.jobs:  # needs come first
        if names.intersection(job.needs):
            names.add(job.name)
    return names


if __name__ == "__main__":
    run_command(main)
