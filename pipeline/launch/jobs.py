"""Which stages share a job, and what each job asks of the site. Pure: reads no file, asks no Slurm.

A stage is not a job: by default the data stages share one on CPU nodes, both phases share one on all nodes, the
fine-tuning stages share one. The report is a small job of its own, because it runs also after a failure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.errors import ConfigError
from pipeline.stage import Stage
from slurm import flags
from slurm.flags import Flag, Setting
from slurm.profile import Profile
from slurm.resources import Resources, parse_nodes
from slurm.sending import Need

REPORT_MIN, REPORT_GB = 30, 4.0  # the report reads small files
REPORT_OWN = ("time", "cpus-per-task", "mem", "exclusive", "nodes", "ntasks-per-node")


@dataclass(frozen=True, kw_only=True)
class JobPlan:
    """One job: its stages in order, the jobs it waits for, its request, and where each setting came from."""

    name: str
    section: str
    stages: tuple[str, ...]
    needs: tuple[Need, ...] = ()
    any_need: bool = False  # one of the needs is enough
    stands_in_for: str = ""  # the job that this spare one goes on for
    resources: Resources = field(default_factory=Resources)
    left: Mapping[str, Setting] = field(default_factory=dict)  # settings that are no numbers
    settings: Mapping[str, Setting] = field(default_factory=dict)  # all of them, to be shown

    @property
    def held_by_user(self) -> bool:
        return "hold" in self.settings


def jobs_of(stages: Mapping[str, Stage], todo: Iterable[str], *, split: bool = False) -> list[JobPlan]:
    """The jobs that run ``todo``, in an order in which needs come first; a need that is not in ``todo`` is done."""
    grouped: dict[str, list[str]] = {}
    last: list[str] = []
    wanted = set(todo)
    for name, stage in stages.items():
        if name in wanted and stage.always:
            last.append(name)
        elif name in wanted:
            grouped.setdefault(name if split else stage.job, []).append(name)
    home = {name: job for job, names in grouped.items() for name in names}
    found: list[JobPlan] = []
    ahead: dict[str, set[str]] = {}  # all jobs that a job waits for, directly or not
    for job, names in grouped.items():
        before = dict.fromkeys(home[need] for name in names for need in stages[name].needs if need in home)
        before.pop(job, None)
        ahead[job] = set(before).union(*(ahead[other] for other in before))
        needs = tuple(Need(job=other) for other in before if not any(other in ahead[third] for third in before))
        found.append(JobPlan(name=job, section=stages[names[0]].job, stages=tuple(names), needs=needs))
    for name in last:
        needs, any_need = _after_all(found)
        found.append(JobPlan(name=name, section="data", stages=(name,), needs=needs, any_need=any_need))
    return found


def with_spares(jobs: Iterable[JobPlan], spares: int) -> list[JobPlan]:
    """The jobs, each but the report with spare jobs, which start when it and the spares before them ended badly.

    A failed stage then cancels what waits for it, so the report need only wait for the end of the last job. Raises
    ConfigError where a job waits for two: Slurm takes "all of" or "one of" several jobs, not a mixture.
    """
    found: list[JobPlan] = []
    family: dict[str, list[str]] = {}  # a job and its spares
    for job in jobs:
        if len(job.needs) > 1 and job.name != "report":
            raise ConfigError(f"{job.name} waits for {len(job.needs)} jobs that have spares: leave out --split")
        kinds = {need.kind for need in job.needs}
        parents = [Need(job=name, kind=n.kind) for n in job.needs if n.kind != "afternotok" for name in family[n.job]]
        found.append(dataclasses.replace(job, needs=tuple(parents), any_need="afterok" in kinds))
        family[job.name] = [job.name]
        for number in range(2, 2 + spares if job.name != "report" else 2):
            after = tuple(Need(job=name, kind="afternotok") for name in family[job.name])
            family[job.name].append(f"{job.name}-{number}")
            spare = dataclasses.replace(job, name=family[job.name][-1], needs=after, stands_in_for=job.name)
            found.append(spare)
    return found


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


def equipped(
    jobs: Iterable[JobPlan], profile: Profile, nodes: str, given: Sequence[Flag], environ: Mapping[str, str]
) -> list[JobPlan]:
    """The jobs with what they ask for: profile, SBATCH_* and flags resolved; ``nodes`` is for pretraining."""
    ready = []
    for job in jobs:
        settings, resources, left = request(profile, job.section, nodes, given, environ)
        if job.name == "report":
            resources = _small(resources, left)
            settings = {name: found for name, found in settings.items() if name not in REPORT_OWN}
        ready.append(dataclasses.replace(job, resources=resources, left=left, settings=settings))
    return ready


def _small(resources: Resources, left: Mapping[str, Setting]) -> Resources:
    """One core for half an hour instead of what a data job asks for."""
    resources = dataclasses.replace(resources, nodes=(1, 1), tasks_per_node=1)
    mem_gb = None if {"mem-per-cpu", "mem-per-gpu"} & left.keys() else REPORT_GB
    time_min = min(resources.time_min or REPORT_MIN, REPORT_MIN)
    return dataclasses.replace(resources, exclusive=None, cpus_per_task=1, mem_gb=mem_gb, time_min=time_min)


def request(
    profile: Profile, section: str, nodes: str, given: Sequence[Flag], environ: Mapping[str, str]
) -> tuple[dict[str, Setting], Resources, dict[str, Setting]]:
    """All settings of a section with their sources; as resources; and the rest of them for the header.

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
        start = dataclasses.replace(start, nodes=parse_nodes(nodes))
    resources, left = flags.apply(start, settings)
    if resources.tasks_per_node < 1:
        resources = dataclasses.replace(resources, tasks_per_node=profile.tasks_per_node)
    if section == "finetune" and resources.most_tasks != 1:
        raise ConfigError(
            f"finetune runs as one process: {resources.most_tasks} tasks were asked for it; leave them out"
        )
    return settings, resources, left
