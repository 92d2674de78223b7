"""``python -m pipeline.submit``: make or continue a run and send its chain to this machine or to Slurm."""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.publish import publish_json, publish_text
from pipeline import batch, corpora, groups, scripts
from pipeline.chain import Chain
from pipeline.config import Recipe, load_profile, load_recipe, restore
from pipeline.errors import ConfigError, run_command
from pipeline.groups import JobPlan
from pipeline.journal import Journal, live_jobs, refuse_running
from pipeline.local import run_chain
from pipeline.rundir import RunDir, read_json
from pipeline.stages import TASKS
from pipeline.worker import made_with
from slurm import flags, queue
from slurm.errors import SlurmError
from slurm.profile import SECTIONS, Profile
from slurm.resources import parse_nodes


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
        code = run_chain(run, todo, profile.processes, profile.threads)
    if code == 0:
        show_results(run)
    return code


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Our own options by argparse; Slurm's by their own names as ``flags``, what follows ``--`` as ``extra``."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.submit",
        description=__doc__,
        epilog="Slurm's options keep their names and letters (-p gpu -A project -t 2-00:00:00) and mean pretraining; "
        "-p data=cpu addresses the jobs of one kind (data, pretrain, finetune), --no-qos removes what the profile "
        "says, and words after -- go to sbatch untouched.",
    )
    parser.add_argument(
        "--recipe", help="what to train: a name in pipeline/recipes or a .toml file (default: the run's)"
    )
    parser.add_argument(
        "--cluster",
        help="how the site runs jobs: a name in slurm/profiles or a .toml file (default: the run's)",
    )
    parser.add_argument("--run", type=Path, required=True, help="run directory: everything of this training")
    parser.add_argument(
        "--data", type=Path, help="folder of the corpora that the recipe names (default: the profile's)"
    )
    parser.add_argument(
        "--nodes",
        "-N",
        help="nodes for pretraining, as 32 or 16-32; the global batch stays the same (default: the run's, else 1)",
    )
    parser.add_argument("--processes", type=int, help="local runner: ranks in training and data workers")
    parser.add_argument("--stages", help="run only these, separated by commas")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="change a recipe value, such as phase1.steps=100",
    )
    slurm = parser.add_argument_group("Slurm")
    slurm.add_argument("--split", action="store_true", help="one job for each stage")
    slurm.add_argument("--dry-run", action="store_true", help="show the jobs and where each setting comes from")
    slurm.add_argument(
        "--write-scripts", type=Path, metavar="DIR", help="write batch files and submit.sh; send nothing"
    )
    slurm.add_argument("--test-only", action="store_true", help="ask Slurm when the jobs would start; send nothing")
    slurm.add_argument("--replace", action="store_true", help="cancel jobs of this run that are at work")
    line = flags.split(words, sections=SECTIONS, own=("--nodes", "-N"))
    arguments = parser.parse_args(line.rest)
    arguments.flags, arguments.extra = list(line.flags), list(line.passthrough)
    return arguments


def selected(chain: Chain, arguments: argparse.Namespace) -> dict[str, str]:
    """The stages to run with the reasons, which are printed."""
    todo = chain.select(arguments.stages.split(",")) if arguments.stages else chain.todo()
    for name, why in todo.items():
        print(f"  will run {name:12s} {why}")
    return todo


def nothing_to_do(run: RunDir) -> int:
    print(f"{run.path}: everything is done, nothing to do")
    show_results(run)
    return 0


def plan_jobs(chain: Chain, profile: Profile, todo: dict[str, str], arguments: argparse.Namespace) -> list[JobPlan]:
    """The jobs of ``todo`` with what they ask for."""
    jobs = groups.jobs_of(chain.stages, todo, split=arguments.split)
    return groups.equipped(jobs, profile, arguments.nodes, arguments.flags, os.environ)


def to_slurm(run: RunDir, recipe: Recipe, profile: Profile, arguments: argparse.Namespace) -> int:
    """Send what is missing; returns at once."""
    from pipeline.send import send, settle  # submitit is imported only where jobs are sent

    old = settle(run, replace=arguments.replace, say=print)
    begin(run, recipe, profile, arguments)
    chain = Chain.of(run)
    todo = selected(chain, arguments)
    if not todo:
        return nothing_to_do(run)
    if ignored := flags.ignored(os.environ):
        print(f"without effect: {', '.join(ignored)}")
    jobs = plan_jobs(chain, profile, todo, arguments)
    sent = send(run, profile, jobs, old, arguments.extra, say=print)
    for job, handle in zip(jobs, sent, strict=True):
        print(scripts.describe(job, handle.job_id))
    if hours := scripts.gpu_hours(jobs):
        print(f"at most {hours:.0f} GPU-hours if no job is started again")
    print(f"watch it:  python -m pipeline.status {run.path}")
    return 0


def without_sending(chain: Chain, profile: Profile, arguments: argparse.Namespace) -> int:
    """``--write-scripts`` and ``--test-only``."""
    run, jobs = chain.run, plan_jobs(chain, profile, selected(chain, arguments), arguments)
    if arguments.write_scripts:
        for path in scripts.write_scripts(arguments.write_scripts, run, profile, jobs, arguments.extra):
            print(path)
        print(f"send them with  bash {arguments.write_scripts / 'submit.sh'}")
    if arguments.test_only:
        with tempfile.TemporaryDirectory() as folder:
            for job in jobs:
                file = Path(folder) / f"{job.name}.sbatch"
                file.write_text(scripts.script_text(run, profile, job), encoding="utf-8")
                print(f"{job.name}: {queue.estimate_start(file, arguments.extra)}")
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
        for line in scripts.explain(job.settings):
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


def configure(run: RunDir, arguments: argparse.Namespace) -> tuple[Recipe, Profile]:
    """Recipe and profile from the command line, else from the run."""
    stored = read_json(run.path / "run.json")
    if stored is None and (arguments.recipe is None or arguments.cluster is None):
        raise ConfigError(f"{run.path} is not a run yet: name a --recipe and a --cluster")
    origin = str(run.path / "run.json")
    if arguments.recipe is not None:
        recipe = load_recipe(arguments.recipe, arguments.settings)
    else:
        recipe = restore(Recipe, (stored or {})["recipe"], origin, arguments.settings)
    if arguments.cluster is not None:
        profile = load_profile(arguments.cluster)
    else:
        profile = restore(Profile, (stored or {})["profile"], origin)
    if arguments.processes is not None:
        if arguments.processes < 1:
            raise ConfigError(f"--processes {arguments.processes}: must be at least 1")
        profile = dataclasses.replace(profile, processes=arguments.processes)
    if arguments.nodes is not None:
        arguments.flags.append(flags.Flag("nodes", arguments.nodes, "pretrain"))
    arguments.nodes = arguments.nodes or str((stored or {}).get("node_range", "1"))
    ranks, arguments.most_nodes = world_of(profile, arguments)
    return choose_micro_batches(recipe, profile, ranks, stored, arguments.settings), profile


def world_of(profile: Profile, arguments: argparse.Namespace) -> tuple[int, int]:
    """Ranks and nodes of pretraining, at most; ConfigError for Slurm's options where there is no Slurm."""
    if profile.runner == "local":
        given = [flag.name for flag in arguments.flags if flag.name != "nodes"]
        given += [name for name in ("test-only", "write-scripts") if getattr(arguments, name.replace("-", "_"))]
        if given or arguments.extra:
            named = ", ".join(f"--{name}" for name in given) or " ".join(arguments.extra)
            raise ConfigError(f"{named}: means nothing to cluster profile {profile.name!r}, which has no Slurm")
        return profile.ranks(1), parse_nodes(arguments.nodes)[1]
    _, resources, _ = groups.request(profile, "pretrain", arguments.nodes, arguments.flags, os.environ)
    return resources.most_tasks, resources.nodes[1]


def choose_micro_batches(
    recipe: Recipe, profile: Profile, ranks: int, stored: dict[str, Any] | None, settings: list[str]
) -> Recipe:
    """The recipe with each phase's micro_batch fixed: chosen when the run is created, kept afterwards."""
    for name in ("phase1", "phase2"):
        phase = getattr(recipe, name)
        kept = ((stored or {}).get("recipe", {}).get(name) or {}).get("micro_batch")
        if kept and not any(s.startswith(f"{name}.micro_batch=") for s in settings):
            chosen = min(kept, phase.global_batch)
        else:
            limit = micro_batch_limit(recipe, profile, name)
            chosen = batch.plan(phase.global_batch, limit, ranks).micro_batch
        recipe = dataclasses.replace(recipe, **{name: dataclasses.replace(phase, micro_batch=chosen)})
    return recipe


def micro_batch_limit(recipe: Recipe, profile: Profile, phase_name: str) -> int:
    """The recipe's micro_batch limited by the profile's; ConfigError when neither names one."""
    key = f"{recipe.name}.{phase_name}.{recipe.train.precision}"
    given = [value for value in (getattr(recipe, phase_name).micro_batch, profile.micro_batch.get(key)) if value]
    if not given:
        raise ConfigError(
            f"no micro_batch for {key}: cluster profile {profile.name!r} has no such key in "
            f"[micro_batch]; add it, or give --set {phase_name}.micro_batch=N"
        )
    return min(given)


def find_data_dir(run: RunDir, profile: Profile, arguments: argparse.Namespace) -> Path:
    """--data, else where the run found its corpora, else (a copy from another site) the folder of the profile."""
    if arguments.data is not None:
        return Path(arguments.data)
    known = run.exists and (arguments.cluster is None or run.data_dir.is_dir())
    return run.data_dir if known else Path(profile.data_dir)


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
            "format": 1,
            "recipe": dataclasses.asdict(recipe),
            "profile": dataclasses.asdict(profile),
            "nodes": arguments.most_nodes,
            "node_range": arguments.nodes,
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
