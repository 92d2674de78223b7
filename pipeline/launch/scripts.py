"""The batch files of a chain and what to tell sbatch about them: text only, needs no Slurm."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pipeline
from data_prep.publish import publish_text
from pipeline.launch.jobs import JobPlan
from pipeline.run.journal import run_key
from pipeline.run.rundir import RunDir
from slurm.flags import Setting
from slurm.profile import Profile
from slurm.resources import format_time
from slurm.script import Script, render
from slurm.sending import Need, Sending, submit_sh

ROOT = Path(pipeline.__file__).parents[1]  # where `python -m pipeline.worker` finds the package
UNSET = "unset RANK WORLD_SIZE LOCAL_RANK PIPELINE_LAUNCH PIPELINE_PARENT"  # of a launcher that submitted us


def script_text(run: RunDir, profile: Profile, job: JobPlan, max_gpu_hours: float = 0.0) -> str:
    """The batch file of one job, and of its spares; ``max_gpu_hours`` is for all jobs of the run, 0 is no limit."""
    place = run.path.resolve()
    left = dict(job.left)
    left.pop("comment", None)  # goes to sbatch behind our tag
    left.setdefault("job-name", Setting(f"{place.name}/{job.name}", "submit"))
    left.setdefault("chdir", Setting(str(ROOT), "submit"))
    return render(
        Script(
            resources=job.resources,
            settings=left,
            command=[profile.python or sys.executable, "-m", "pipeline.worker", str(place), *job.stages],
            log_dir=str(place / "logs"),
            log_name=f"{job.name}-%j.out",
            state_dir=str(place / "jobs"),
            modules=profile.modules,
            setup=[UNSET, *profile.setup],
            env={"OMP_NUM_THREADS": str(profile.threads), **profile.env},
            srun_args=[*profile.srun_args, *profile.section(job.section).srun_args],
            wrapper=profile.container,
            max_gpu_s=round(max_gpu_hours * 3600),
        )
    )


def sendings(
    run: RunDir, jobs: Sequence[JobPlan], sending: str, extra: Sequence[str] = (), after: Sequence[str] = ()
) -> list[Sending]:
    """One sbatch call for each job; the first jobs wait for the job ids ``after``, whatever becomes of those."""
    return [
        Sending(
            name=job.name,
            file=f"{job.stands_in_for or job.name}.sbatch",
            needs=job.needs or [Need(job=job_id, kind="afterany") for job_id in after],
            any_need=job.any_need,
            held_by_user=job.held_by_user,
            stands_in_for=job.stands_in_for,
            extra=[f"--comment={comment(run, job, sending)}", *extra],
        )
        for job in jobs
    ]


def comment(run: RunDir, job: JobPlan, sending: str) -> str:
    """``run/sending/job``, by which squeue tells which jobs are ours; then the user's own words."""
    own = job.settings.get("comment")
    return f"{run_key(run)}/{sending}/{job.name}" + (f" {own.value}" if own and own.value else "")


def write_scripts(
    folder: Path,
    run: RunDir,
    profile: Profile,
    jobs: Sequence[JobPlan],
    extra: Sequence[str] = (),
    max_gpu_hours: float = 0.0,
) -> list[Path]:
    """Write the batch files and a ``submit.sh`` that sends them; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    own = [job for job in jobs if not job.stands_in_for]
    texts = {f"{job.name}.sbatch": script_text(run, profile, job, max_gpu_hours) for job in own}
    texts["submit.sh"] = submit_sh(sendings(run, jobs, "by-hand", extra))
    for name, text in texts.items():
        publish_text(folder / name, text)
    (folder / "submit.sh").chmod(0o755)
    return [folder / name for name in texts]


def describe(job: JobPlan, job_id: str = "") -> str:
    """One line for people: what the job runs, on what, for how long at most, after which jobs."""
    asked = job.resources
    least, most = asked.nodes
    nodes = f"{most} node{'s' if most > 1 else ''}" if least == most else f"{least}-{most} nodes"
    tasks = f"{asked.most_tasks} task{'s' if asked.most_tasks > 1 else ''}"
    limit = "no time limit asked" if asked.time_min is None else f"time {format_time(asked.time_min)}"
    hours = f", at most {asked.gpu_hours():.0f} GPU-hours an attempt" if asked.gpu_hours() else ""
    kinds = {"afterok": "after", "afterany": "after the end of", "afternotok": "after a failure of"}
    waits = (" or " if job.any_need else ", ").join(f"{kinds[need.kind]} {need.job}" for need in job.needs)
    number = f"job {job_id:<8s} " if job_id else ""
    return f"{job.name:<12s} {number}{nodes}, {tasks}, {limit}{hours}: {' '.join(job.stages)}" + (
        f" ({waits})" if waits else ""
    )


def explain(settings: Mapping[str, Setting]) -> list[str]:
    """Each setting and where it came from."""
    return [f"--{name}{f'={found.value}' if found.value else ''}  ({found.source})" for name, found in settings.items()]


def gpu_hours(jobs: Sequence[JobPlan]) -> float:
    """Upper bound over all jobs, each started once."""
    return sum(job.resources.gpu_hours() for job in jobs if not job.stands_in_for)


def spent_gpu_hours(run: RunDir) -> float:
    """What all attempts of the run's jobs have spent until now, as their batch scripts note it and read it."""
    notes = [path.read_bytes()[:100] for path in (run.path / "jobs").glob("*.gpu_s") if path.is_file()]
    return sum(int(note) for note in notes if re.fullmatch(rb"[0-9]{1,15}\n?", note)) / 3600


def with_files(folder: Path, found: Sequence[Sending]) -> list[Sending]:
    """The same calls with the scripts in ``folder``."""
    return [dataclasses.replace(one, file=str(folder / one.file)) for one in found]
