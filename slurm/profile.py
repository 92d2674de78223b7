"""The cluster profile: how one site runs jobs. A TOML file in ``slurm/profiles`` or of the user's own.

Only the dataclasses live here; ``pipeline.config`` reads both recipes and profiles with one strict reader.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

PROFILES = Path(__file__).parent / "profiles"


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One site. ``micro_batch`` maps opaque keys ``recipe.phase.precision`` to the largest micro-batch that fits."""

    name: str
    runner: str = field(default="slurm", metadata={"choices": ("slurm", "local")})
    gpus_per_node: int = field(default=8, metadata={"low": 0})
    processes: int = field(default=2, metadata={"low": 1})  # local runner: ranks and data workers
    threads: int = field(default=1, metadata={"low": 1})  # CPU threads per rank; changes the bits of a result
    data_dir: str = "data"
    micro_batch: dict[str, int] = field(default_factory=dict)

    def ranks(self, nodes: int) -> int:
        """World size on ``nodes`` nodes: one rank per GPU; on this machine, one per process."""
        return self.processes if self.runner == "local" else nodes * max(1, self.gpus_per_node)
