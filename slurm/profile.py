"""The cluster profile: how one site runs jobs. A TOML file in ``slurm/profiles`` or of the user's own.

Only data lives here; ``pipeline.config`` reads both recipes and profiles with one strict reader.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from slurm.resources import Resources, format_memory

PROFILES = Path(__file__).parent / "profiles"
SECTIONS = ("data", "pretrain", "finetune")


@dataclass(frozen=True, kw_only=True)
class Section:
    """[data], [pretrain], [finetune]: what jobs of one kind ask for. What is left out is the site's choice."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str | None = None  # as sbatch spells it: 90, 12:00:00, 2-00:00:00
    cpus_per_task: int | None = field(default=None, metadata={"low": 1})
    mem_gb: float | None = field(default=None, metadata={"low": 0})  # per node; 0 is all of it
    exclusive: bool = False  # whole nodes
    srun_args: tuple[str, ...] = ()  # after those of all jobs: --mpi=pmix for [data]
    sbatch: dict[str, str] = field(default_factory=dict)  # any other option by its long name; "" for one without value


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One site. ``micro_batch`` maps opaque keys ``recipe.phase.precision`` to the largest micro-batch that fits,
    ``rates`` the same keys to the sequences per second of one GPU, forward and backward (see pipeline.plan).
    """

    name: str
    runner: Literal["slurm", "local"] = "slurm"
    gpus_per_node: int = field(default=8, metadata={"low": 0})
    gpu_type: str = ""  # as in --gpus-per-node=TYPE:8
    gpu_request: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    tasks_per_node: int = field(default=1, metadata={"low": 1})  # ranks per node where there are no GPUs
    processes: int = field(default=2, metadata={"low": 1})  # local runner: ranks and data workers
    threads: int = field(default=1, metadata={"low": 1})  # CPU threads per rank; changes the bits of a result
    data_dir: str = "data"
    python: str = ""  # interpreter on the nodes; none: the one that submits
    modules: tuple[str, ...] = ()  # `module purge` and then `module load` of each
    setup: tuple[str, ...] = ()  # shell lines before every stage
    env: dict[str, str] = field(default_factory=dict)
    container: tuple[str, ...] = ()  # words before the interpreter, as apptainer exec --nv IMAGE
    srun_args: tuple[str, ...] = ()
    requeue: bool = True
    spares: int = field(default=0, metadata={"low": 0})  # jobs that wait to go on where one ended and was not requeued
    signal_s: int = field(default=120, metadata={"low": 0})  # SIGUSR2 so long before the time limit; 0: none
    sbatch: dict[str, str] = field(default_factory=dict)  # options of every job
    data: Section = Section()
    pretrain: Section = Section()
    finetune: Section = Section()
    micro_batch: dict[str, int] = field(default_factory=dict)
    gpu_memory_gb: float | None = field(default=None, metadata={"low": 1})
    rates: dict[str, float] = field(default_factory=dict)

    @property
    def ranks_per_node(self) -> int:
        return self.gpus_per_node or self.tasks_per_node

    def ranks(self, nodes: int) -> int:
        """World size on ``nodes`` nodes: one rank per GPU; on this machine, one per process."""
        return self.processes if self.runner == "local" else nodes * self.ranks_per_node

    def resources(self, section: str) -> Resources:
        """What a job of ``section`` asks for before any flag: a rank for each GPU, or one process without any."""
        trains = section != "data"
        return Resources(
            tasks_per_node=self.ranks_per_node if trains else 1,
            gpus_per_node=self.gpus_per_node if trains else 0,
            gpu_type=self.gpu_type,
            gpu_request=self.gpu_request,
        )

    def section(self, name: str) -> Section:
        section: Section = getattr(self, name)
        return section

    def options(self, section: str) -> dict[str, str]:
        """sbatch options of a section by long name, spelled as on a command line."""
        part = self.section(section)
        options = {name: getattr(part, name) for name in ("partition", "account", "qos", "constraint", "time")}
        options["cpus-per-task"] = None if part.cpus_per_task is None else str(part.cpus_per_task)
        options["mem"] = None if part.mem_gb is None else format_memory(part.mem_gb)
        options["exclusive"] = "" if part.exclusive else None
        options["requeue"] = "" if self.requeue else "no"
        options["signal"] = f"USR2@{self.signal_s}" if self.signal_s else None
        # a spare that is not needed, and what waits for a stage that failed, must not wait for ever
        options["kill-on-invalid-dep"] = "yes"
        return {**{name: value for name, value in options.items() if value is not None}, **self.sbatch, **part.sbatch}
