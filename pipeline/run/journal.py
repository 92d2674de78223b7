"""``RUN/jobs.json``: which Slurm jobs were sent for a run and how far the sending came; and which of them live."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.publish import publish_json
from pipeline.config import restore
from pipeline.errors import RESTART_CODES, InUseError
from pipeline.run.files import read_json
from pipeline.run.rundir import RunDir
from slurm import queue, states

if TYPE_CHECKING:
    from slurm.submission import JobPlan

OLD_NAMES = {"sending": "submission", "ours": "held_by_us"}  # in files of version 0.1


@dataclass(frozen=True, kw_only=True)
class SentJob:
    """One job of a chain; ``id`` is empty until Slurm has taken it. ``held_by_us``: to be released by us."""

    name: str
    stages: tuple[str, ...]
    needs: tuple[str, ...]
    held_by_us: bool
    id: str = ""


@dataclass(frozen=True, kw_only=True)
class Journal:
    """The last submission. ``state``: sending (held, incomplete), releasing (complete), released."""

    submission: str
    state: str
    jobs: tuple[SentJob, ...]

    @staticmethod
    def path(run: RunDir) -> Path:
        return run.path / "jobs.json"

    @classmethod
    def read(cls, run: RunDir) -> Journal | None:
        """The journal; None when nothing was ever sent."""
        values = read_json(cls.path(run))
        if values is None:
            return None
        for old, new in OLD_NAMES.items():
            jobs = values.get("jobs")
            for record in (values, *(jobs if isinstance(jobs, list) else ())):
                if isinstance(record, dict) and old in record:
                    record[new] = record.pop(old)
        return restore(cls, values, str(cls.path(run)))

    @classmethod
    def of(cls, jobs: Sequence[JobPlan], submission: str, ids: Mapping[str, str]) -> Journal:
        """The journal of a chain that is being sent; ``ids`` by name, as far as Slurm has given them."""
        sent = (
            SentJob(
                name=job.name,
                stages=job.stages,
                needs=tuple(need.job for need in job.needs),
                held_by_us=not job.needs and not job.held_by_user,
                id=ids.get(job.name, ""),
            )
            for job in jobs
        )
        return cls(submission=submission, state="sending", jobs=tuple(sent))

    def write(self, run: RunDir) -> None:
        publish_json(self.path(run), dataclasses.asdict(self))

    @property
    def names(self) -> dict[str, str]:
        """Job names by id, for messages."""
        return {job.id: job.name for job in self.jobs if job.id}

    def job_of(self, stage: str, known: Mapping[str, queue.QueuedJob] | None = None) -> SentJob | None:
        """The job that runs a stage: of a job and its spares the first that has not ended, as far as ``known``."""
        homes = [job for job in self.jobs if stage in job.stages]
        live = [job for job in homes if known and job.id in known and not known[job.id].ended]
        return next(iter([*live, *homes]), None)


def submission_of(job: queue.QueuedJob) -> str:
    """The submission that a job's comment names."""
    return job.comment.split(" ")[0].split("/")[1]


def name_of(job: queue.QueuedJob) -> str:
    """The chain's name of a job, from its comment."""
    return job.comment.split(" ")[0].split("/")[2]


def by_hand(run: RunDir) -> dict[str, str]:
    """Slurm jobs that no submission has sent, but ``stage.sbatch`` or an ``srun``: the stage that each is at by its id.

    They are known by the last attempts of stages, and may be started again.
    """
    sent, found = Journal.read(run), {}
    for path in sorted(run.path.glob("stages/*")):
        for attempt in run.stage(path.name).attempts[-1:]:
            job, code = str(attempt.owner.get("job_id", "")), (attempt.verdict or {}).get("code")
            if job.isdecimal() and code in (None, *RESTART_CODES) and not (sent and job in sent.names):
                found[job] = path.name
    return found


def live_jobs(run: RunDir) -> list[queue.QueuedJob]:
    """The run's jobs that wait or run, oldest first. Raises ControllerDown, SlurmError.

    Told by the journal's ids, then by their comments, which sites and users rewrite: a job of the journal is given
    back with the comment that it was sent with. One that was sent by hand has the submission ``by-hand``.
    """
    key, journal = run_key(run), Journal.read(run)
    tags = {number: f"{key}/by-hand/{stage}" for number, stage in by_hand(run).items()}
    tags |= {number: f"{key}/{journal.submission}/{name}" for number, name in journal.names.items()} if journal else {}
    jobs = (dataclasses.replace(job, comment=tags.get(job.id, job.comment)) for job in queue.jobs().values())
    ours = (job for job in jobs if job.comment.startswith(f"{key}/") and not job.ended)
    return sorted(ours, key=lambda job: int(job.id))


def refuse_running(run: RunDir, jobs: list[queue.QueuedJob], hint: str) -> None:
    """InUseError naming the run's jobs that run now; one that is ending does not count."""
    running = [job for job in jobs if not job.waiting and job.state != "COMPLETING"]
    if running:
        named = ", ".join(f"{name_of(job)} (job {job.id}, {states.in_words(job)})" for job in running)
        raise InUseError(f"{run.path}: {named} of this run is at work; {hint}")


def run_key(run: RunDir) -> str:
    """What every job of this run carries first in its comment: a digest of the run's place."""
    return hashlib.sha256(str(run.path.resolve()).encode()).hexdigest()[:10]
