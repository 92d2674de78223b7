"""Which stages share a job, and what each job asks of the site. Pure: reads no file, asks no Slurm.

A stage is not a job: by default the data stages share one on CPU nodes, both phases share one on all nodes, the
fine-tuning stages share one on a whole node. The report is a small job of its own: it runs also after a failure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import ConfigError
from pipeline.stage import Stage
from slurm import flags, header
from slurm.errors import FlagError
from slurm.flags import Flag, Setting
from slurm.profile import Profile
from slurm.resources import UNLIMITED, Resources, format_time, parse_duration
from slurm.submission import JobPlan, Need

REPORT_MIN, REPORT_GB = 30, 4.0  # the report reads small files
REPORT_OWN = ("time", "cpus-per-task", "mem", "exclusive", "nodes", "ntasks-per-node")

OF_PART = ("nodes", "ntasks-per-node", "cpus-per-task", "mem")  # each part of a job has its own


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What jobs of a section ask for: all settings with their sources; as resources; and the rest for the header."""

    settings: Mapping[str, Setting]
    resources: Resources
    left: Mapping[str, Setting]


def jobs_of(
    stages: Mapping[str, Stage], todo: Iterable[str], *, split: bool = False, split_seeds: bool = False
) -> list[JobPlan]:
    """The jobs that run ``todo``, in an order in which needs come first; a need that is not in ``todo`` is done.

    A stage is a job by ``split``; each seed of a task, and what gathers them, by ``split_seeds``.
    """
    seeds = {name for name, stage in stages.items() if stage.is_seed}
    alone = {name for name, stage in stages.items() if split or (split_seeds and seeds & {name, *stage.needs})}
    grouped: dict[str, list[str]] = {}
    last: list[str] = []
    wanted = set(todo)
    for name, stage in stages.items():
        if name in wanted and stage.always:
            last.append(name)
        elif name in wanted:
            grouped.setdefault(name if name in alone else stage.job, []).append(name)
    home = {name: job for job, names in grouped.items() for name in names}
    plans: list[JobPlan] = []
    ahead: dict[str, set[str]] = {}  # all jobs that a job waits for, directly or not
    for job, names in grouped.items():
        before = dict.fromkeys(home[need] for name in names for need in stages[name].needs if need in home)
        before.pop(job, None)
        ahead[job] = set(before).union(*(ahead[other] for other in before))
        needs = tuple(Need(job=other) for other in before if not any(other in ahead[third] for third in before))
        plans.append(JobPlan(name=job, section=stages[names[0]].job, stages=tuple(names), needs=needs))
    for name in last:
        needs, any_need = _after_all(plans)
        plans.append(JobPlan(name=name, section="data", stages=(name,), needs=needs, any_need=any_need))
    return plans


def with_spares(jobs: Iterable[JobPlan], spares: int) -> list[JobPlan]:
    """The jobs, each but the report with spare jobs, which start when it and the spares before them ended badly.

    A failed stage then cancels what waits for it, so the report need only wait for the end of the last job. Raises
    ConfigError where a job waits for two: Slurm takes "all of" or "one of" several jobs, not a mixture.

    With one spare, data -> pretrain -> report becomes
    data; data-2 after a failure of data; pretrain after data or data-2; pretrain-2 after a failure of pretrain;
    report after the end of pretrain or pretrain-2.
    """
    plans: list[JobPlan] = []
    family: dict[str, list[str]] = {}  # a job and its spares
    for job in jobs:
        if len(job.needs) > 1 and job.name != "report":
            raise ConfigError(f"{job.name} waits for {len(job.needs)} jobs that have spares: leave out --split")
        kinds = {need.kind for need in job.needs}
        parents = [Need(job=name, kind=n.kind) for n in job.needs if n.kind != "afternotok" for name in family[n.job]]
        plans.append(dataclasses.replace(job, needs=tuple(parents), any_need="afterok" in kinds))
        family[job.name] = [job.name]
        for number in range(2, 2 + spares if job.name != "report" else 2):
            after = tuple(Need(job=name, kind="afternotok") for name in family[job.name])
            family[job.name].append(f"{job.name}-{number}")
            plans.append(dataclasses.replace(job, name=family[job.name][-1], needs=after, stands_in_for=job.name))
    return plans


def _after_all(jobs: Sequence[JobPlan]) -> tuple[tuple[Need, ...], bool]:
    """Needs of a job that comes last whatever happens: the end of the last job, or the failure of one before it.

    Without the second half it would wait for ever behind a job that can never start.
    """
    needed = {need.job for job in jobs for need in job.needs}
    ends = [job.name for job in jobs if job.name not in needed]
    if len(ends) != 1:
        return tuple(Need(job=name, kind="afterany") for name in ends), False
    early = [Need(job=job.name, kind="afternotok") for job in jobs if job.name in needed]
    return (*early, Need(job=ends[0], kind="afterany")), bool(early)


def equipped(jobs: Iterable[JobPlan], asked: Mapping[str, Asked]) -> list[JobPlan]:
    """The jobs with what those of their section ask for; the report with one core for half an hour instead."""
    ready = []
    for job in jobs:
        ask = asked[job.section]
        if job.name == "report":
            ask = _small(ask)
        ready.append(dataclasses.replace(job, resources=ask.resources, left=ask.left, settings=ask.settings))
    return ready


def in_one(jobs: Sequence[JobPlan]) -> JobPlan:
    """One job that is all of them, one after another (``submit --one-job``): it asks for what the widest asks for.

    Cores and memory are enough for each of them. A narrower one runs on some of the nodes while the others idle.
    ConfigError for a flag that addresses a job which there is not.
    """
    widest = max(jobs, key=lambda job: (job.resources.most_tasks, job.section == "pretrain"))
    for job in jobs:
        for name, setting in job.settings.items():
            same = name in OF_PART or widest.settings.get(name) == setting
            if setting.source == "flag" and job.section != widest.section and not same:
                raise ConfigError(
                    f"--{name}={job.section}={setting.value}: with --one-job the one job is {widest.section}'s; "
                    f"say it without {job.section}= or leave it out"
                )
    asked = widest.resources
    cores = [job.resources.cpus_per_task * job.resources.tasks_per_node for job in jobs if job.resources.cpus_per_task]
    if cores and asked.exclusive is None:
        asked = dataclasses.replace(asked, cpus_per_task=-(-max(cores) // asked.tasks_per_node))
    memory = [job.resources.mem_gb for job in jobs if job.resources.mem_gb is not None]
    if memory and not {"mem-per-cpu", "mem-per-gpu"} & widest.left.keys():
        asked = dataclasses.replace(asked, mem_gb=max(memory) if all(memory) else 0)
    stages = tuple(name for job in jobs for name in job.stages)
    return dataclasses.replace(widest, name="chain", stages=stages, needs=(), resources=asked, parts=tuple(jobs))


def _small(ask: Asked) -> Asked:
    mem_gb = ask.resources.mem_gb and min(ask.resources.mem_gb, REPORT_GB)  # none where a site's nodes have no figure
    time_min = min(ask.resources.time_min or REPORT_MIN, REPORT_MIN)
    one = dataclasses.replace(ask.resources, nodes=(1, 1), tasks_per_node=1, cpus_per_task=1, exclusive=None)
    return Asked(
        settings={name: setting for name, setting in ask.settings.items() if name not in REPORT_OWN},
        resources=dataclasses.replace(one, mem_gb=mem_gb, time_min=time_min),
        left=ask.left,
    )


def no_longer(ask: Asked, chunk: str) -> Asked:
    """``ask`` with a time limit of at most ``chunk``. FlagError for no time at all."""
    most, asked = parse_duration(chunk), ask.resources.time_min
    if most == UNLIMITED:
        raise FlagError(f"--chunk {chunk}: name a time of at least a minute, as 90m or 2h")
    if asked and asked <= most:
        return ask
    settings = {**ask.settings, "time": Setting(format_time(most), "--chunk")}
    return dataclasses.replace(ask, settings=settings, resources=dataclasses.replace(ask.resources, time_min=most))


def asked_by(
    profile: Profile, section: str, nodes: tuple[int, int], given: Sequence[Flag], environ: Mapping[str, str]
) -> Asked:
    """Profile, SBATCH_* and flags resolved for a section; ``nodes`` are for pretraining.

    Raises FlagError for what sbatch would refuse, ConfigError for a request that makes no sense for the chain.
    """
    settings = flags.resolve(
        section,
        given,
        default_section="pretrain",
        environ=environ,
        profile=profile.options(section),
        profile_name=f"profile {profile.name}",
    )
    start = profile.resources(section)
    if section == "pretrain":
        start = dataclasses.replace(start, nodes=nodes)
    resources, left = header.apply(start, settings)
    if resources.tasks_per_node < 1:
        resources = dataclasses.replace(resources, tasks_per_node=profile.tasks_per_node)
    return Asked(settings=settings, resources=resources, left=left)
