"""The batch files of a chain and what to tell sbatch about them: text only, needs no Slurm."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_prep.publish import publish_text
from pipeline.launch import code
from pipeline.launch.request import Request
from pipeline.run.journal import Journal, run_key
from pipeline.run.rundir import RunDir
from slurm.flags import Setting
from slurm.header import header_line, spell
from slurm.resources import format_time
from slurm.script import Part, Script, quote, render
from slurm.submission import JobPlan, submit_sh

UNSET = "unset RANK WORLD_SIZE LOCAL_RANK PIPELINE_LAUNCH PIPELINE_PARENT"  # of a launcher that submitted us


def script_text(request: Request, job: JobPlan) -> str:
    """The batch file of one job, and of its spares."""
    place, profile = request.run.path.resolve(), request.profile
    left = dict(job.left)
    left.pop("comment", None)  # goes to sbatch behind our tag
    left.setdefault("job-name", Setting(f"{place.name}/{job.name}", "submit"))
    left.setdefault("chdir", Setting(str(request.data_dir.resolve() if request.command else code.ROOT), "submit"))
    command = ["--", *request.command] if request.command else []

    def arguments(stages: Sequence[str]) -> list[str]:
        return ["-m", "pipeline.worker", str(place), *stages, *command]

    def srun_args(section: str) -> list[str]:
        return [*profile.srun_args, *profile.section(section).srun_args]

    return render(
        Script(
            resources=job.resources,
            settings=left,
            program=[*profile.container, profile.python or sys.executable],
            arguments=arguments(job.stages),
            parts=[
                Part(
                    name=part.name,
                    arguments=arguments(part.stages),
                    tasks_per_node=part.resources.tasks_per_node,
                    cpus_per_task=part.resources.cpus_per_task,
                    width=part.resources.nodes[1] if part.resources.nodes[1] < job.resources.nodes[1] else 0,
                    srun_args=srun_args(part.section),
                    always=part.name == "report",
                )
                for part in job.parts
            ],
            log_dir=str(place / "logs"),
            log_name=f"{job.name}-%j.out",
            state_dir=str(place / "jobs"),
            code=str(code.folder(RunDir(place), request.code)),
            modules=profile.modules,
            setup=[UNSET, *profile.setup],
            env={"OMP_NUM_THREADS": str(profile.threads), **profile.env},
            srun_args=srun_args(job.section),
            max_gpu_s=round(request.max_gpu_hours * 3600),
        )
    )


def tag_of(run: RunDir, job: JobPlan, submission: str) -> str:
    """``run/submission/job`` as the job's comment, by which squeue tells which are ours; then the user's own words."""
    own = job.settings.get("comment")
    return f"{run_key(run)}/{submission}/{job.name}" + (f" {own.value}" if own and own.value else "")


def write_scripts(folder: Path, request: Request, jobs: Sequence[JobPlan]) -> list[Path]:
    """Write the batch files and a ``submit.sh`` that sends them; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {job.file: script_text(request, job) for job in jobs if not job.stands_in_for}
    words = {job.name: [f"--comment={tag_of(request.run, job, 'by-hand')}", *request.extra] for job in jobs}
    ids = {job.name: f"$job{number}" for number, job in enumerate(jobs, start=1)}
    journal = dataclasses.replace(Journal.of(jobs, "by-hand", ids), state="$1")
    note = json.dumps(dataclasses.asdict(journal))
    texts["submit.sh"] = submit_sh(jobs, words, str(Journal.path(request.run).resolve()), note)
    for name, text in texts.items():
        publish_text(folder / name, text)
    (folder / "submit.sh").chmod(0o755)
    return [folder / name for name in texts]


def piped(request: Request, job: JobPlan) -> str:
    """The batch file of one job as ``sbatch`` may read it from a pipe: tagged, and noting itself in the journal."""
    path = str(Journal.path(request.run).resolve())
    journal = dataclasses.replace(Journal.of([job], "by-hand", {job.name: "$SLURM_JOB_ID"}), state="released")
    new, file = quote("journal", f"{path}.new"), quote("journal", path)
    note = [
        'if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then # so that status and cancel find it',
        f"  cat >{new} <<END",
        json.dumps(dataclasses.asdict(journal)),
        "END",
        f"  mv {new} {file}",
        "fi",
    ]
    header, variables, rest = script_text(request, dataclasses.replace(job, needs=())).split("\n\n", 2)
    tag = header_line("comment", tag_of(request.run, job, "by-hand"))
    return "\n\n".join([f"{header}\n{tag}", "\n".join(note), variables, rest])


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
    return [f"{spell(name, setting.value)}  ({setting.source})" for name, setting in settings.items()]


def gpu_hours(jobs: Sequence[JobPlan]) -> float:
    """Upper bound over all jobs, each started once."""
    return sum(job.resources.gpu_hours() for job in jobs if not job.stands_in_for)


def spent_gpu_hours(run: RunDir) -> float:
    """What all attempts of the run's jobs have spent until now, as their batch scripts note it and read it."""
    notes = [path.read_bytes()[:100] for path in (run.path / "jobs").glob("*.gpu_s") if path.is_file()]
    return sum(int(note) for note in notes if re.fullmatch(rb"[0-9]{1,15}\n?", note)) / 3600
