"""``python -m pipeline.submit``: make or continue a run and send its chain to this machine or to Slurm."""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from data_prep.publish import publish_json, publish_text
from pipeline.config import Recipe
from pipeline.errors import ConfigError, run_command
from pipeline.launch import corpora, scripts
from pipeline.launch import jobs as groups
from pipeline.launch.configure import configure, find_data_dir
from pipeline.launch.configure import micro_batch_limit as micro_batch_limit
from pipeline.launch.jobs import JobPlan
from pipeline.launch.local import run_chain
from pipeline.launch.options import parse
from pipeline.run.chain import Chain
from pipeline.run.journal import Journal, live_jobs, refuse_running
from pipeline.run.rundir import RunDir, read_json
from pipeline.stages import TASKS
from pipeline.strict_toml import table_of
from pipeline.worker import made_with
from slurm import flags, queue
from slurm.errors import Refused, SlurmError
from slurm.profile import Profile
from slurm.refusal import blame
from slurm.shell import LEAST_S


def main() -> int:
    arguments = parse(sys.argv[1:])
    run = RunDir(arguments.run)
    recipe, profile = configure(run, arguments)
    data_dir = find_data_dir(run, profile, arguments)
    if arguments.dry_run:
        show_plan(Chain.planned(run, recipe, corpora.identities(run, recipe, data_dir)), profile, arguments)
        return 0
    absent = corpora.missing(run, recipe, data_dir)
    if arguments.test_only or (arguments.write_scripts and absent):
        without_sending(Chain.planned(run, recipe, corpora.identities(run, recipe, data_dir)), profile, arguments)
        if arguments.write_scripts:
            print(f"{run.path} is not begun, {absent[0]} is missing: give --data DIR before submit.sh is run")
        return 0
    corpora.check(run, recipe, data_dir, "run make fetch, or " if profile.runner == "local" else "")
    run.path.mkdir(parents=True, exist_ok=True)
    with run.held():
        if profile.runner != "local" and not arguments.write_scripts:
            return to_slurm(run, recipe, profile, arguments)
        if Journal.read(run) is not None:
            refuse_if_slurm_runs_it(run)
        begin(run, recipe, profile, arguments)
        chain = Chain.of(run)
        if profile.runner != "local":
            (run.path / "logs").mkdir(exist_ok=True)
            return without_sending(chain, profile, arguments)
        todo = selected(chain, arguments)
        if not todo:
            return nothing_to_do(run)
        move_aside(chain, arguments)
        code = run_chain(run, todo, profile.processes, profile.threads)
    if code == 0:
        show_results(run)
    return code


def selected(chain: Chain, arguments: argparse.Namespace) -> dict[str, str]:
    """The stages to run with the reasons, which are printed."""
    remake = chain.with_followers(arguments.remake)
    todo = chain.select(arguments.stages.split(","), remake) if arguments.stages else chain.todo(remake)
    for name, why in todo.items():
        print(f"  will run {name:12s} {why}")
    if older := [name for name in chain.older() if name not in todo]:
        named = ",".join(older)
        print(f"  kept: {named}, made by an older version of the stage; --remake {named} makes it again")
    return todo


def move_aside(chain: Chain, arguments: argparse.Namespace) -> None:
    """What ``--remake`` names goes to RUN/old with all that was made from it."""
    for name in chain.with_followers(arguments.remake):
        chain.run.stage(name).move_aside()


def nothing_to_do(run: RunDir) -> int:
    print(f"{run.path}: everything is done, nothing to do")
    show_results(run)
    return 0


def plan_jobs(chain: Chain, profile: Profile, todo: dict[str, str], arguments: argparse.Namespace) -> list[JobPlan]:
    """The jobs of ``todo`` with what they ask for."""
    jobs = groups.jobs_of(chain.stages, todo, split=arguments.split)
    if profile.spares:
        jobs = groups.with_spares(jobs, profile.spares)
    return groups.equipped(jobs, profile, arguments.nodes, arguments.flags, os.environ)


def to_slurm(run: RunDir, recipe: Recipe, profile: Profile, arguments: argparse.Namespace) -> int:
    """Send what is missing; returns at once."""
    from pipeline.launch.send import send, settle  # submitit is imported only where jobs are sent

    old = settle(run, replace=arguments.replace, say=print)
    chain = Chain.planned(run, recipe, corpora.identities(run, recipe, find_data_dir(run, profile, arguments)))
    todo = selected(chain, arguments)
    jobs = plan_jobs(chain, profile, todo, arguments)
    check_budget(run, jobs, arguments.max_gpu_hours)
    try_out(run, profile, jobs, arguments)  # before anything of the run is changed
    begin(run, recipe, profile, arguments)
    if not todo:
        return nothing_to_do(run)
    move_aside(chain, arguments)
    if ignored := flags.ignored(os.environ):
        print(f"without effect: {', '.join(ignored)}")
    sent = send(run, profile, jobs, old, arguments.extra, print, arguments.max_gpu_hours)
    for job, handle in zip(jobs, sent, strict=True):
        print(scripts.describe(job, handle.job_id))
    if hours := scripts.gpu_hours(jobs):
        print(f"at most {hours:.0f} GPU-hours if no job is started again")
    print(f"watch it:  python -m pipeline.status {run.path}")
    return 0


def check_budget(run: RunDir, jobs: list[JobPlan], max_gpu_hours: float) -> None:
    """ConfigError when a job needs GPUs and the GPU-hours that the run may spend are spent."""
    spent, gpus = scripts.spent_gpu_hours(run), [job.resources.nodes[0] * job.resources.gpus_per_node for job in jobs]
    if max_gpu_hours and any(gpus):
        if (max_gpu_hours - spent) * 3600 < LEAST_S * max(gpus):
            raise ConfigError(
                f"{run.path}: {spent:.2f} GPU-hours are spent, --max-gpu-hours allows {max_gpu_hours:g}; allow more"
            )
        print(f"{spent:.2f} of {max_gpu_hours:g} GPU-hours are spent; the chain stops when they are used up")


def try_out(run: RunDir, profile: Profile, jobs: list[JobPlan], arguments: argparse.Namespace) -> dict[str, str]:
    """Slurm's estimate for each job by name. Raises Refused where it would never start.

    sbatch checks less of a job that is held or waits: it would be accepted and stay in the queue for ever.
    """
    estimates = {}
    with tempfile.TemporaryDirectory() as folder:
        for job in (job for job in jobs if not job.stands_in_for):
            file = Path(folder) / f"{job.name}.sbatch"
            file.write_text(scripts.script_text(run, profile, job), encoding="utf-8")
            try:
                estimates[job.name] = queue.patiently(lambda: queue.estimate_start(file, arguments.extra), say=print)  # noqa: B023
            except Refused as refused:
                partition = job.left.get("partition")
                away = queue.unavailable_nodes(partition.value if partition else "")
                if "node configuration is not available" not in str(refused) or not away or arguments.test_only:
                    raise Refused(f"{refused}{blame(str(refused), job.settings, arguments.extra)}") from None
                print(f"{job.name}: no nodes for it now, {away} are down or reserved; it waits")
    return estimates


def without_sending(chain: Chain, profile: Profile, arguments: argparse.Namespace) -> int:
    """``--write-scripts`` and ``--test-only``."""
    run, jobs = chain.run, plan_jobs(chain, profile, selected(chain, arguments), arguments)
    if arguments.write_scripts:
        folder, limit = arguments.write_scripts, arguments.max_gpu_hours
        for path in scripts.write_scripts(folder, run, profile, jobs, arguments.extra, limit):
            print(path)
        move_aside(chain, arguments)
        print(f"send them with  bash {folder / 'submit.sh'}")
    if arguments.test_only:
        for name, estimate in try_out(run, profile, jobs, arguments).items():
            print(f"{name}: {estimate}")
    return 0


def show_plan(chain: Chain, profile: Profile, arguments: argparse.Namespace) -> None:
    """``--dry-run``: nothing is written and nobody is asked."""
    todo = selected(chain, arguments)
    if not todo:
        print(f"{chain.run.path}: everything is done, nothing to do")
    if profile.runner == "local":
        return
    jobs = plan_jobs(chain, profile, todo, arguments)
    for job in jobs:
        print(scripts.describe(job))
        for line in [] if job.stands_in_for else scripts.explain(job.settings):
            print(f"    {line}")
    if hours := scripts.gpu_hours(jobs):
        print(f"at most {hours:.0f} GPU-hours if no job is started again")


def refuse_if_slurm_runs_it(run: RunDir) -> None:
    """InUseError when Slurm has jobs of this run at work; without an answer from Slurm there is nothing to refuse."""
    try:
        found = live_jobs(run)
    except SlurmError as error:
        print(f"{run.path}: whether Slurm runs this is not known ({error})", file=sys.stderr)
        return
    refuse_running(run, found, f"wait for it, or stop it with python -m pipeline.cancel {run.path}")


def begin(run: RunDir, recipe: Recipe, profile: Profile, arguments: argparse.Namespace) -> None:
    """Write run.json and what is needed to repeat the run."""
    data_dir = find_data_dir(run, profile, arguments)
    if not run.model.is_symlink():
        run.model.symlink_to("stages/export/model")
    commit, diff = code_version()
    publish_text(run.path / "code.diff", diff)
    publish_json(
        run.path / "run.json",
        {
            **(read_json(run.path / "run.json") or {}),
            "format": 1,
            "recipe": table_of(recipe),
            "profile": dataclasses.asdict(profile),
            "nodes": arguments.most_nodes,
            "node_range": arguments.nodes,
            "max_gpu_hours": arguments.max_gpu_hours,
            "allow_mixed": arguments.allow_mixed,
            "corpora": corpora.identities(run, recipe, data_dir),
            "data_dir": os.path.relpath(data_dir.resolve(), run.path.resolve()),
            "versions": made_with(),
            "commit": commit,
        },
    )
    run.event(
        "submitted",
        recipe=recipe.name,
        cluster=profile.name,
        nodes=arguments.most_nodes,
        commit=commit,
        settings=arguments.settings,
    )


def code_version() -> tuple[str, str]:
    """Commit of this checkout and the diff against it; empty strings outside a checkout."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, timeout=20, check=False)
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.decode(errors="replace") if done.returncode == 0 else ""

    return git("rev-parse", "HEAD").strip(), git("diff", "HEAD", "--", ".")


def show_results(run: RunDir) -> None:
    """Scores of the fine-tuning stages and where the report lies."""
    for name in TASKS:
        found = read_json(run.stage(name).path / "scores.json")
        if found:
            scores = ", ".join(f"{key} {value:.4g}" for key, value in found["scores"].items())
            print(f"{found['dataset']}: {scores} ({found['examples']} examples)")
    if run.report.exists():
        print(f"report: {run.report}")


if __name__ == "__main__":
    run_command(main)
