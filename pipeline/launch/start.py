"""A run from a request: planned, shown, begun, and its chain run on this machine or sent to Slurm."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from data_prep.publish import publish_json, publish_text
from pipeline.batch import BatchPlan, better_micro_batch
from pipeline.config import TASKS
from pipeline.errors import NO_TF32, ConfigError, EnvironmentFault
from pipeline.launch import code, corpora, scripts
from pipeline.launch.jobs import equipped, in_one, jobs_of, with_spares
from pipeline.launch.local import run_chain
from pipeline.launch.request import Request
from pipeline.monitor.cpu import has_gpu
from pipeline.run.chain import Chain, made_with
from pipeline.run.files import OF_OTHERS, masked, read_json
from pipeline.run.journal import Journal, live_jobs, refuse_running
from pipeline.run.rundir import RunDir
from pipeline.run.state import rows_of
from pipeline.stages import Command
from pipeline.strict_toml import table_of
from slurm import flags, queue
from slurm.errors import Refused, SlurmError
from slurm.refusal import blame
from slurm.submission import JobPlan, Need
from slurm.verdict import LEAST_S

if TYPE_CHECKING:
    from pipeline.launch.send import SlurmJob


def start(asked: Request) -> int:
    """Do what a call asks for; the exit code."""
    run, profile = asked.run, asked.profile
    absent = corpora.missing(asked)
    if asked.dry_run == "sbatch":
        return to_pipe(asked)
    if asked.dry_run:
        show_plan(planned(asked), asked)
        if asked.local or not absent:
            corpora.check(asked, planned(asked))
        return 0
    if asked.test_only or (asked.write_scripts and absent):
        without_sending(planned(asked), asked)
        if asked.write_scripts:
            print(f"{run.path} is not begun, {absent[0]} is missing: give --data DIR before submit.sh is run")
        return 0
    if not asked.local and not asked.write_scripts:
        to_slurm(asked)
        return 0
    corpora.check(asked, planned(asked))
    run.path.mkdir(parents=True, exist_ok=True)
    with run.held():
        if Journal.read(run) is not None:
            refuse_if_slurm_runs_it(run)
        begin(asked)
        chain = Chain.of(run)
        if not asked.local:
            (run.path / "logs").mkdir(exist_ok=True)
            return without_sending(chain, asked)
        todo = selected(chain, asked)
        if not todo:
            return nothing_to_do(asked)
        move_aside(chain, asked)
        exit_code = run_chain(run, todo, profile.processes, profile.threads, asked.command)
    if exit_code == 0:
        show_results(run)
    return exit_code


def planned(asked: Request) -> Chain:
    """The chain as it will be, whether or not the run exists yet.

    ConfigError where it would write through a link, or where ``--stages`` or ``--remake`` cannot be done: before the
    run is begun or takes new settings.
    """
    chain = Chain.planned(asked.run, asked.recipe, corpora.identities(asked), asked.elsewhere)
    chain.select(asked.stages, chain.with_followers(asked.remake))
    faults = [
        f"{path}: is a link to {os.readlink(path)}, and this stage is to run here ({why}); run it where it lies, or "
        "take the link away"
        for name, why in chain.todo(chain.with_followers(asked.remake)).items()
        if not asked.stages or name in asked.stages or chain.stages[name].is_seed
        if (path := asked.run.stage(name).path).is_symlink()
    ]
    if faults:
        raise ConfigError("\n".join(faults))
    refuse_tf32(chain, asked)
    return chain


def refuse_tf32(chain: Chain, asked: Request) -> None:
    """EnvironmentFault where stages that are to run here need a GPU, and none is here: before the data are made."""
    if asked.local and not asked.profile.gpus_per_node and not has_gpu():
        for name in chain.todo(chain.with_followers(asked.remake)):
            trains = "train" if name in getattr(asked.recipe, "phases", ()) else name
            precision = getattr(getattr(asked.recipe, trains, None), "precision", "")
            if precision == "tf32" and (not asked.stages or name in asked.stages):
                raise EnvironmentFault(f"{trains}.{NO_TF32}")


def selected(chain: Chain, asked: Request) -> dict[str, str]:
    """The stages to run with the reasons, which are printed."""
    remake = chain.with_followers(asked.remake)
    todo = chain.select(asked.stages, remake) if asked.stages else chain.todo(remake)
    ended = [row for row in rows_of(chain, held=False) if row["state"] in ("failed", "cancelled")]
    before = {row["name"]: f"; {row['state']} before: {row['reason']}" for row in ended}
    for name, why in todo.items():
        print(f"  will run {name:12s} {why}{before.get(name, '')}")
    if older := [name for name in chain.older() if name not in todo]:
        named = ",".join(older)
        print(f"  kept: {named}, made by an older version of the stage; --remake {named} makes it again")
    return todo


def move_aside(chain: Chain, asked: Request) -> None:
    """What ``--remake`` names goes to RUN/old with all that was made from it; ``--verify`` forgets what is trusted."""
    for name in chain.with_followers(asked.remake):
        chain.run.stage(name).move_aside()
    for record in chain.run.path.glob("stages/*/verified/*.json") if asked.verify else ():
        record.unlink(missing_ok=True)


def nothing_to_do(asked: Request) -> int:
    print(f"{asked.run.path}: {', '.join(asked.stages) or 'everything'} is done, nothing to do")
    show_results(asked.run)
    return 0


def plan_jobs(chain: Chain, todo: dict[str, str], asked: Request) -> list[JobPlan]:
    """The jobs of ``todo`` with what they ask for."""
    jobs = jobs_of(chain.stages, todo, split=asked.split or bool(asked.command), split_seeds=asked.split_seeds)
    if asked.one_job and jobs:
        jobs = [in_one(equipped(jobs, asked.asked))]
    spared = with_spares(jobs, asked.profile.spares) if asked.profile.spares else jobs
    return spared if asked.one_job else equipped(spared, asked.asked)


def to_slurm(asked: Request) -> list[SlurmJob]:
    """Send what is missing; returns at once, with the jobs that were sent."""
    with sending(asked) as sent:
        pass
    if sent:
        print(f"watch it:  python -m pipeline.status {asked.run.word}")
    return sent


@contextlib.contextmanager
def sending(asked: Request, after: Sequence[Need] = (), any_need: bool = False) -> Iterator[list[SlurmJob]]:
    """What is missing, sent and held until the block ends well; taken back where it does not.

    It starts after jobs of other runs: ``after``, of which one is enough by ``any_need``.
    """
    from pipeline.launch.send import finish_interrupted, send  # submitit is imported only where jobs are sent

    corpora.check(asked, planned(asked))
    asked.run.path.mkdir(parents=True, exist_ok=True)
    with asked.run.held():
        old = finish_interrupted(asked.run, replace=asked.replace, say=print)
        chain = planned(asked)
        todo = selected(chain, asked)
        jobs = plan_jobs(chain, todo, asked)
        check_budget(asked, jobs)
        try_out(asked, jobs)  # before anything of the run is changed
        begin(asked)
        if not todo:
            nothing_to_do(asked)
            yield []
            return
        move_aside(chain, asked)
        if ignored := flags.ignored(os.environ):
            print(f"without effect: {', '.join(ignored)}")
        with send(asked, jobs, old, print, after, any_need) as sent:
            for plan, job in zip(jobs, sent, strict=True):
                print(scripts.describe(plan, job.job_id))
            if hours := scripts.gpu_hours(jobs):
                print(f"at most {hours:.0f} GPU-hours if no job is started again")
            yield sent


def check_budget(asked: Request, jobs: list[JobPlan]) -> None:
    """ConfigError when a job needs GPUs and the GPU-hours that the run may spend are spent."""
    limit, spent = asked.max_gpu_hours, scripts.spent_gpu_hours(asked.run)
    gpus = [job.resources.nodes[0] * job.resources.gpus_per_node for job in jobs]
    if limit and any(gpus):
        if (limit - spent) * 3600 < LEAST_S * max(gpus):
            raise ConfigError(
                f"{asked.run.path}: {spent:.2f} GPU-hours are spent, --max-gpu-hours allows {limit:g}; allow more"
            )
        print(f"{spent:.2f} of {limit:g} GPU-hours are spent; the chain stops when they are used up")


def try_out(asked: Request, jobs: list[JobPlan]) -> dict[str, str]:
    """Slurm's estimate for each job by name. Raises Refused where it would never start.

    sbatch checks less of a job that is held or waits: it would be accepted and stay in the queue for ever.
    """
    estimates, known = {}, queue.patiently(lambda: queue.partitions(print), say=print)
    with tempfile.TemporaryDirectory() as folder:
        for job in (job for job in jobs if not job.stands_in_for):
            file = Path(folder) / job.file
            file.write_text(scripts.script_text(asked, job), encoding="utf-8")
            partition = job.left["partition"].value if "partition" in job.left else ""
            beyond = queue.beyond_limits(known, partition, job.resources)
            if beyond and "qos" not in job.left:  # which may have limits of its own
                raise Refused(f"{job.name}: {beyond}")
            try:
                estimates[job.name] = queue.patiently(lambda: queue.estimate_start(file, asked.extra), say=print)  # noqa: B023
            except Refused as refused:
                away = queue.unavailable_nodes(partition)
                if "node configuration is not available" not in str(refused) or not away or asked.test_only:
                    own = ", ".join(queue.accounts()) if "account" in str(refused) else ""
                    hint = f"; your accounts: {own}" if own else ""
                    raise Refused(f"{refused}{blame(str(refused), job.settings, asked.extra)}{hint}") from None
                print(f"{job.name}: no nodes for it now, {away} are down or reserved; it waits")
    return estimates


def without_sending(chain: Chain, asked: Request) -> int:
    """``--write-scripts`` and ``--test-only``."""
    jobs = plan_jobs(chain, selected(chain, asked), asked)
    if asked.write_scripts:
        for path in scripts.write_scripts(asked.write_scripts, asked, jobs):
            print(path)
        move_aside(chain, asked)
        print(f"send them with  bash {quote(str(asked.write_scripts / 'submit.sh'))}")
    if asked.test_only:
        for name, estimate in try_out(asked, jobs).items():
            print(f"{name}: {estimate}")
    return 0


def to_pipe(asked: Request) -> int:
    """``--dry-run=sbatch``: begin the run and print the batch file of its first job; all other words go to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        corpora.check(asked, planned(asked))
        (asked.run.path / "logs").mkdir(parents=True, exist_ok=True)
        with asked.run.held():
            refuse_if_slurm_runs_it(asked.run)
            begin(asked)
            chain = Chain.of(asked.run)
            jobs = plan_jobs(chain, selected(chain, asked), asked)
            move_aside(chain, asked)
            if not jobs:
                return nothing_to_do(asked)
            print(f"for | sbatch{''.join(f' {word}' for word in asked.extra)}: {scripts.describe(jobs[0])}")
            if jobs[1:]:
                print(f"then {', '.join(job.name for job in jobs[1:])}, by the same call; --one-job has all in one")
    print(scripts.piped(asked, jobs[0]))
    return 0


def idle_ranks(asked: Request) -> Iterator[str]:
    """A line for each phase whose ranks would wait for one another a tenth of the time or more."""
    for name, phase in ({} if isinstance(asked.recipe, Command) else asked.recipe.phases).items():
        plan = BatchPlan(phase.global_batch, phase.micro_batch or 1, asked.asked["pretrain"].resources.most_tasks)
        if better := better_micro_batch(plan):
            yield (
                f"{name}: {1 - plan.balance:.0%} of the time of {plan.world_size} ranks is idle with micro-batches of "
                f"{plan.micro_batch}; --set {name}.micro_batch={better} balances them"
            )


def show_plan(chain: Chain, asked: Request) -> None:
    """``--dry-run``: nothing is written and nobody is asked."""
    todo = selected(chain, asked)
    if not todo:
        nothing_to_do(asked)
    if asked.local:
        return
    jobs = plan_jobs(chain, todo, asked)
    for job in jobs:
        print(scripts.describe(job))
        for line in [] if job.stands_in_for else scripts.explain(job.settings):
            print(f"    {line}")
        scripts.script_text(asked, job)  # refuses what cannot stand in it
    if hours := scripts.gpu_hours(jobs):
        print(f"at most {hours:.0f} GPU-hours if no job is started again")
    for line in idle_ranks(asked):
        print(line)


def refuse_if_slurm_runs_it(run: RunDir) -> None:
    """InUseError when Slurm has jobs of this run at work; without an answer from Slurm there is nothing to refuse."""
    try:
        jobs = live_jobs(run)
    except SlurmError as error:
        print(f"{run.path}: whether Slurm runs this is not known ({error})", file=sys.stderr)
        return
    refuse_running(run, jobs, f"wait for it, or stop it with python -m pipeline.cancel {run.word}")


def begin(asked: Request) -> None:
    """Write run.json and what is needed to repeat the run, with the code that its jobs will run."""
    run, stored = asked.run, asked.stored
    if not asked.command and not run.model.is_symlink():
        run.model.symlink_to("stages/export/model")
    now = code.digest()
    if asked.local and asked.code != now:
        print(f"the code has changed since this run began ({asked.code[:12]}, now {now[:12]}); --upgrade notes it")
    elif asked.code != now:
        print(f"jobs run the code with which this run began ({asked.code[:12]}); --upgrade takes this checkout's")
    if not asked.local:
        code.keep(run, asked.code)
    commit = stored.get("commit", "")
    if asked.code != stored.get("code"):
        commit, diff = code.version()
        publish_text(run.path / "code.diff", diff)
    settings = {
        **stored,
        "format": 1,
        "recipe": table_of(asked.recipe),
        "profile": dataclasses.asdict(asked.profile),
        "nodes": asked.nodes[1],
        "node_range": "-".join(map(str, dict.fromkeys(asked.nodes))),
        "max_gpu_hours": asked.max_gpu_hours,
        "allow_mixed": asked.allow_mixed,
        "corpora": corpora.identities(asked),
        "data_dir": os.path.relpath(asked.data_dir.resolve(), run.path.resolve()),
        "versions": made_with(),
        "commit": commit,
        "code": asked.code,
    }
    with masked(OF_OTHERS):  # in a folder of a group, too: who goes on relies on it (foreign.py)
        publish_json(run.path / "run.json", settings)
    run.event(
        "submitted",
        recipe=asked.recipe.name,
        cluster=asked.profile.name,
        nodes=asked.nodes[1],
        commit=commit,
        code=now if asked.local else asked.code,
        settings=asked.settings,
    )


def show_results(run: RunDir) -> None:
    """Scores of the fine-tuning stages and where the report lies."""
    for name in TASKS:
        if record := read_json(run.stage(name).path / "scores.json"):
            scores = ", ".join(f"{key} {value:.4g}" for key, value in record["scores"].items())
            print(f"{record['dataset']}: {scores} ({record['examples']} examples)")
    if run.report.exists():
        print(f"report: {run.report}")
