"""Every name, address, port and path of a developer cluster, from a few values (pure)."""

from __future__ import annotations

import dataclasses
import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

from slurm.errors import SlurmError

SLOTS = 200
PORTS_PER_SLOT = 100
FIRST_PORT = 10_000  # the last slot ends below 30 000, under the kernel's ephemeral ports (32 768 and up)
MAX_NODES = 90
NAME = re.compile(r"[a-z][a-z0-9-]{0,19}")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One cluster. ``isolation``: "netns" (own network, host name and mounts per node; root) or "host".

    ``slot`` (0..199) separates clusters side by side: subnet, ports and interface names follow from it.
    ``settings`` are slurm.conf lines of the caller, put in the place of ours. What sites do differently: ``cpus``,
    the cores of the nodes in turn; ``memory_mb`` (1: nobody has set it, and Slurm does not count memory); ``domain``,
    behind the hosts' own names; ``max_submit``, jobs that a user may have queued (0: any number; needs
    ``accounting``); ``banner``: sbatch greets around the id.
    """

    name: str
    nodes: int
    slot: int
    state: Path
    isolation: str
    user: str
    host: str
    gpus_per_node: int = 0
    accounting: bool = False
    first_job_id: int = 1
    settings: tuple[tuple[str, str], ...] = ()
    cpus: tuple[int, ...] = (64,)
    memory_mb: int = 500_000
    domain: str = ""
    max_submit: int = 0
    banner: bool = False

    @property
    def conf(self) -> Path:
        return self.state / "slurm.conf"

    @property
    def node_names(self) -> list[str]:
        return [f"{self.name}-n{k:02d}" for k in range(1, self.nodes + 1)]

    def host_name(self, node: str) -> str:
        """What ``hostname`` prints on the node."""
        return f"{node}.{self.domain}" if self.domain else node

    @property
    def node_list(self) -> str:
        """All nodes in Slurm's own bracket spelling."""
        return f"{self.name}-n[01-{self.nodes:02d}]"

    @property
    def controller_address(self) -> str:
        return f"10.77.{self.slot}.254" if self.isolation == "netns" else "127.0.0.1"

    @property
    def controller_port(self) -> int:
        return FIRST_PORT + self.slot * PORTS_PER_SLOT

    @property
    def database_port(self) -> int:
        return self.controller_port + 1

    @property
    def bridge(self) -> str:
        return f"devcl{self.slot}"

    def namespace(self, number: int) -> str:
        """Name of the node's network namespace; by slot, since users may give two clusters one name."""
        return f"devcl{self.slot}-n{number:02d}"

    @property
    def munge_socket(self) -> Path:
        return self.state / "munge" / "socket"

    def address(self, number: int) -> str:
        return f"10.77.{self.slot}.{number}" if self.isolation == "netns" else "127.0.0.1"

    def port(self, number: int) -> int:
        """slurmd's port of node ``number`` (1, 2, …)."""
        return self.controller_port + 1 + number

    def link(self, number: int) -> str:
        """Host side of the node's network cable (at most 15 characters, the kernel's limit)."""
        return f"devcl{self.slot}n{number}"

    def number(self, node: str) -> int:
        """Node number from ``lab-n02``, ``n02``, ``n2`` or ``2``; SlurmError for an unknown node."""
        found = re.fullmatch(rf"(?:(?:{re.escape(self.name)}-)?n)?(\d+)", node)
        if not found or not 1 <= int(found[1]) <= self.nodes:
            raise SlurmError(f"{self.name}: no node {node!r}; nodes are {self.node_list}")
        return int(found[1])

    def dump(self) -> str:
        return json.dumps(dataclasses.asdict(self) | {"state": str(self.state)}, indent=1)


def load(text: str) -> Layout:
    """The layout that ``dump`` wrote."""
    values = json.loads(text)
    values["state"] = Path(values["state"])
    values["settings"] = tuple((key, value) for key, value in values["settings"])
    values["cpus"] = tuple(values.get("cpus", (64,)))
    return Layout(**values)


def check_name(name: str) -> str:
    """The name, when it can be part of host and file names; SlurmError otherwise."""
    if not NAME.fullmatch(name):
        raise SlurmError(f"cluster name {name!r}: use a letter, then at most 19 of lower case letters, digits and '-'")
    return name


def preferred_slot(name: str) -> int:
    """Where the search for a free slot starts: the same for the same name on every machine."""
    return zlib.crc32(name.encode()) % SLOTS
