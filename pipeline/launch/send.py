"""Send a chain to Slurm through submitit: all jobs held until the last one is accepted and journalled, or none left.

Killed at any point, the next submit completes or removes what was begun: ``RUN/jobs.json`` says how far this came,
and every job carries ``run/submission/job`` in its comment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import submitit

from data_prep.publish import publish_text
from pipeline.errors import ConfigError, SlurmFault
from pipeline.launch.request import Request
from pipeline.launch.scripts import script_text, tag_of
from pipeline.run.journal import Journal, live_jobs, name_of, refuse_running, submission_of
from pipeline.run.rundir import RunDir
from slurm import queue
from slurm.errors import Refused, SlurmError
from slurm.refusal import blame
from slurm.submission import JobPlan, Need, sbatch_args

Say = Callable[[str], None]


class SlurmJob(submitit.SlurmJob[None]):
    """A job of a chain as submitit's: its state is what squeue says now, its output the log in the run folder.

    There is nothing to unpickle, and what looks like it is not ours: ``result``, ``exception`` and ``submission`` raise
    ConfigError. What a stage made lies in RUN/stages.
    """

    @property
    def state(self) -> str:
        """In Slurm's words; COMPLETED for a job that it has forgotten. Raises ControllerDown, SlurmError."""
        known = queue.patiently(lambda: queue.jobs([self.job_id])) or queue.accounted([self.job_id])
        return known[self.job_id].state if known else "COMPLETED"

    def done(self, force_check: bool = False) -> bool:
        return self.state in queue.ENDED

    def wait(self) -> None:
        """Return when the job has ended, also when it was requeued meanwhile; looks every 15 s at last."""
        pause_s = 1.0
        while not self.done():
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 15.0)

    def cancel(self, check: bool = True) -> None:
        queue.cancel([self.job_id])

    def stdout(self) -> str | None:
        """All that its attempts said, on stderr as well; None before the first has begun."""
        logs = [path for path in self.paths.folder.parent.glob(f"logs/*-{self.job_id}.out") if path.is_file()]
        return logs[0].read_text(encoding="utf-8", errors="replace") if logs else None

    def submission(self) -> NoReturn:
        raise ConfigError(f"job {self.job_id} has no pickles; what its stages made lies in the run's folder stages/")

    def results(self) -> NoReturn:
        self.submission()

    def exception(self) -> NoReturn:
        self.submission()


class Executor(submitit.SlurmExecutor):
    """submitit's executor with our own batch files in place of its text, its pickles and its requeue in a handler."""

    job_class = SlurmJob

    def __init__(self, folder: Path) -> None:
        try:
            super().__init__(folder)
        except RuntimeError:
            raise SlurmFault(
                "no srun on PATH: this machine has no Slurm; --write-scripts DIR writes what would be sent"
            ) from None

    def send(
        self, job: JobPlan, file: Path, ids: Mapping[str, str], tag: str, extra: Sequence[str], say: Say
    ) -> SlurmJob:
        """One job, exactly once whatever the controller does; SlurmError in Slurm's words when it is refused."""
        words = sbatch_args(job, ids, [f"--comment={tag}", *extra])
        arguments = [ids[job.stands_in_for]] if job.stands_in_for else []
        try:
            job_id = queue.submit(file, words, arguments, tag=tag, say=say)
        except Refused as refused:
            few = "MaxSubmitJob" in str(refused) and not job.parts
            hint = "; --one-job sends the chain as one job" if few else ""
            raise Refused(f"{refused}{blame(str(refused), job.settings, extra)}{hint}") from None
        return SlurmJob(folder=self.folder, job_id=job_id)


def finish_interrupted(run: RunDir, *, replace: bool, say: Say) -> list[queue.QueuedJob]:
    """Finish or remove what an interrupted submission left; returns the run's live jobs of an earlier one.

    Raises InUseError when one of them is at work and ``replace`` is not set.
    """
    live, journal = queue.patiently(lambda: live_jobs(run), say=say), Journal.read(run)
    if journal is not None and journal.state == "sending":
        leftover = [job for job in live if submission_of(job) == journal.submission]
        if leftover:
            say(f"an earlier submit was interrupted: {' '.join(queue.cancel(job.id for job in leftover))}")
        live = [job for job in live if job not in leftover]
    elif journal is not None and journal.state == "releasing":
        release(run, journal, {job.id for job in live})
    if not replace:
        stop = f"stop it with python -m pipeline.cancel {run.word}"
        refuse_running(run, live, f"wait for it, {stop}, or submit with --replace")
    return live


@contextlib.contextmanager
def send(
    request: Request,
    jobs: Sequence[JobPlan],
    old: Sequence[queue.QueuedJob],
    say: Say,
    after: Sequence[Need] = (),
    any_need: bool = False,
) -> Iterator[list[SlurmJob]]:
    """Send ``jobs`` in place of ``old``, held, and give them as submitit's; the run must be held.

    The jobs are let go when the block ends well. The new chain waits for the end of the old jobs, which are cancelled
    only when all of it is accepted, or for jobs of other runs: ``after``, one of which is enough by ``any_need``. On
    any error, also one in the block, nothing of the new chain is left, and the old one stays as it was.
    """
    run, before, submission = request.run, Journal.read(request.run), secrets.token_hex(4)
    for name in ("jobs", "logs"):
        (run.path / name).mkdir(exist_ok=True)
    executor = Executor(run.path / "jobs")
    sent: dict[str, SlurmJob] = {}
    Journal.of(jobs, submission, {}).write(run)
    # What others make first takes longer than old jobs take to save, and both kinds of needs cannot be mixed.
    first = tuple(after) or tuple(Need(job=job.id, kind="afterany") for job in old)
    ids = {need.job: need.job for need in first}
    try:
        with tempfile.TemporaryDirectory() as own:  # in the run's folder others might change what sbatch is to read
            for job in jobs:
                file = Path(own) / job.file
                if not job.stands_in_for:
                    file.write_text(script_text(request, job), encoding="utf-8")
                    publish_text(run.path / "jobs" / job.file, file.read_text(encoding="utf-8"))  # to be looked at
                hold = ["--hold"] if first and not job.needs else []  # besides waiting for those jobs
                waits = job if job.needs else dataclasses.replace(job, needs=first, any_need=any_need)
                tag = tag_of(run, job, submission)
                sent[job.name] = executor.send(waits, file, ids, tag, [*hold, *request.extra], say)
                ids[job.name] = sent[job.name].job_id
        journal = Journal.of(jobs, submission, {name: job.job_id for name, job in sent.items()})
        journal.write(run)
        yield list(sent.values())
    except BaseException:
        # without an answer the jobs stay held, and the journal tells the next submit to take them away
        with contextlib.suppress(SlurmError):
            queue.cancel((job.job_id for job in sent.values()), patience_s=0)
            if before is None:
                Journal.path(run).unlink()
            else:
                before.write(run)
        raise
    replaced = [job for job in live_jobs(run) if submission_of(job) != submission]
    if replaced:
        names = ", ".join(f"{name_of(job)} (job {job.id})" for job in replaced)
        say(f"takes the place of {names}: {' '.join(queue.cancel(job.id for job in replaced))}")
    journal = dataclasses.replace(journal, state="releasing")
    journal.write(run)
    release(run, journal, {job.id for job in journal.jobs})
    run.event("sent", sending=submission, jobs={name: job.job_id for name, job in sent.items()})


def release(run: RunDir, journal: Journal, live: Collection[str]) -> None:
    """Let the first jobs of a complete chain go, those of them that still live."""
    queue.release(job.id for job in journal.jobs if job.held_by_us and job.id in live)
    dataclasses.replace(journal, state="released").write(run)
