"""Send a chain to Slurm through submitit: all jobs held until the last one is accepted and journalled, or none left.

Killed at any point, the next submit completes or removes what was begun: ``RUN/jobs.json`` says how far this came,
and every job carries ``run/sending/job`` in its comment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import submitit

from data_prep.publish import publish_text
from pipeline.errors import SlurmFault
from pipeline.launch.jobs import JobPlan
from pipeline.launch.scripts import comment, script_text, sendings, with_files
from pipeline.run.journal import Journal, SentJob, live_jobs, name_of, refuse_running, sending_of
from pipeline.run.rundir import RunDir
from slurm import queue
from slurm.errors import Refused, SlurmError
from slurm.profile import Profile
from slurm.refusal import blame
from slurm.sending import Sending, sbatch_args

Say = Callable[[str], None]


class Executor(submitit.SlurmExecutor):
    """submitit's executor with our own batch files in place of its text, its pickles and its requeue in a handler."""

    def __init__(self, folder: Path) -> None:
        try:
            super().__init__(folder)
        except RuntimeError:
            raise SlurmFault(
                "no srun on PATH: this machine has no Slurm; --write-scripts DIR writes what would be sent"
            ) from None

    def send(self, job: JobPlan, call: Sending, ids: Mapping[str, str], tag: str, say: Say) -> submitit.SlurmJob[None]:
        """One job, exactly once whatever the controller does; SlurmError in Slurm's words when it is refused."""
        words = sbatch_args(call, ids)
        if not job.needs and "--hold" not in words:
            words.append("--hold")
        arguments = [ids[job.stands_in_for]] if job.stands_in_for else []
        try:
            job_id = queue.submit(Path(call.file), words, arguments, tag=tag, say=say)
        except Refused as refused:
            raise Refused(f"{refused}{blame(str(refused), job.settings, call.extra)}") from None
        return self.job_class(folder=self.folder, job_id=job_id, tasks=list(range(job.resources.most_tasks)))


def settle(run: RunDir, *, replace: bool, say: Say) -> list[queue.Job]:
    """Finish or remove what an interrupted sending left; returns the run's live jobs of an earlier sending.

    Raises InUseError when one of them is at work and ``replace`` is not set.
    """
    found, journal = queue.patiently(lambda: live_jobs(run), say=say), Journal.read(run)
    if journal is not None and journal.state == "sending":
        leftover = [job for job in found if sending_of(job) == journal.sending]
        if leftover:
            say(f"an earlier submit was interrupted: {' '.join(queue.cancel(job.id for job in leftover))}")
        found = [job for job in found if job not in leftover]
    elif journal is not None and journal.state == "releasing":
        release(run, journal, {job.id for job in found})
    if not replace:
        refuse_running(
            run,
            found,
            f"wait for it, stop it with python -m pipeline.cancel {run.path}, or submit with --replace",
        )
    return found


def send(
    run: RunDir,
    profile: Profile,
    jobs: Sequence[JobPlan],
    old: Sequence[queue.Job],
    extra: Sequence[str],
    say: Say,
    max_gpu_hours: float = 0.0,
) -> list[submitit.SlurmJob[None]]:
    """Send ``jobs`` in place of ``old`` and return them as submitit's jobs; the run must be held.

    The new chain waits for the end of the old jobs, which are cancelled only when all of it is accepted. On any
    error nothing of the new chain is left, and the old one stays as it was.
    """
    before, sending = Journal.read(run), secrets.token_hex(4)
    for name in ("jobs", "logs"):
        (run.path / name).mkdir(exist_ok=True)
    executor = Executor(run.path / "jobs")
    sent: dict[str, submitit.SlurmJob[None]] = {}
    _journal(run, jobs, sending, {}).write(run)
    try:
        calls = with_files(run.path / "jobs", sendings(run, jobs, sending, extra, [job.id for job in old]))
        ids = {job.id: job.id for job in old}
        for job, call in zip(jobs, calls, strict=True):
            if not job.stands_in_for:
                publish_text(Path(call.file), script_text(run, profile, job, max_gpu_hours))
            sent[job.name] = executor.send(job, call, ids, comment(run, job, sending), say)
            ids[job.name] = sent[job.name].job_id
    except BaseException:
        # without an answer the jobs stay held, and the journal tells the next submit to take them away
        with contextlib.suppress(SlurmError):
            queue.cancel((job.job_id for job in sent.values()), patience_s=0)
            if before is None:
                Journal.path(run).unlink()
            else:
                before.write(run)
        raise
    journal = _journal(run, jobs, sending, {name: job.job_id for name, job in sent.items()})
    journal.write(run)
    replaced = [job for job in live_jobs(run) if sending_of(job) != sending]
    if replaced:
        names = ", ".join(f"{name_of(job)} (job {job.id})" for job in replaced)
        say(f"takes the place of {names}: {' '.join(queue.cancel(job.id for job in replaced))}")
    journal = dataclasses.replace(journal, state="releasing")
    journal.write(run)
    release(run, journal, {job.id for job in journal.jobs})
    run.event("sent", sending=sending, jobs={name: job.job_id for name, job in sent.items()})
    return list(sent.values())


def _journal(run: RunDir, jobs: Sequence[JobPlan], sending: str, ids: dict[str, str]) -> Journal:
    return Journal(
        sending=sending,
        state="sending",
        jobs=tuple(
            SentJob(
                name=job.name,
                stages=job.stages,
                needs=tuple(need.job for need in job.needs),
                ours=not job.needs and not job.held_by_user,
                id=ids.get(job.name, ""),
            )
            for job in jobs
        ),
    )


def release(run: RunDir, journal: Journal, live: Collection[str]) -> None:
    """Let the first jobs of a complete chain go, those of them that still live."""
    queue.release(job.id for job in journal.jobs if job.ours and job.id in live)
    dataclasses.replace(journal, state="released").write(run)
