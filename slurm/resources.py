"""What one job asks of a site, in numbers; and Slurm's spelling of those numbers, read exactly as sbatch reads it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from slurm.errors import FlagError

UNLIMITED = 0  # minutes; what `--time=0`, `-1`, INFINITE and UNLIMITED mean to sbatch
MEMORY_MB = {"": 1.0, "K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0**2}


@dataclass(frozen=True, kw_only=True)
class Resources:
    """One job's request. None leaves the choice to the site.

    ``nodes`` is (least, most); ``cpus_per_task`` counts cores of one task; ``mem_gb`` is per node, 0 meaning all of it.
    """

    nodes: tuple[int, int] = (1, 1)
    tasks_per_node: int = 1
    gpus_per_node: int = 0
    gpu_type: str = ""
    cpus_per_task: int | None = None
    mem_gb: float | None = None
    time_min: int | None = None
    exclusive: str | None = None  # "" whole nodes, "user", "mcs"
    gpu_request: str = "gpus-per-node"  # or "gres", on sites that know only that

    @property
    def most_tasks(self) -> int:
        return self.nodes[1] * self.tasks_per_node

    def gpu_hours(self) -> float:
        """Upper bound of one attempt: all nodes for the whole time limit (0 without GPUs or without a limit)."""
        return self.nodes[1] * self.gpus_per_node * (self.time_min or 0) / 60


def parse_nodes(text: str) -> tuple[int, int]:
    """``"16"`` → (16, 16), ``"16-32"`` → (16, 32); sbatch's suffix ``k`` means 1024. FlagError otherwise."""
    match = re.fullmatch(r"(\d{1,7})(k?)(?:-(\d{1,7})(k?))?", text, re.ASCII)
    if not match:
        raise FlagError(f"--nodes={text}: write a number or a range, as 16 or 16-32")
    least = int(match[1]) * (1024 if match[2] else 1)
    most = least if match[3] is None else int(match[3]) * (1024 if match[4] else 1)
    if not 1 <= least <= most:
        raise FlagError(f"--nodes={text}: at least 1 node, and the smaller number first")
    return least, most


def parse_time(text: str) -> int:
    """Minutes (rounded up, as sbatch does) of ``MM``, ``MM:SS``, ``HH:MM:SS``, ``D-HH``, ``D-HH:MM``, ``D-HH:MM:SS``.

    Returns UNLIMITED (0) for ``0``, ``-1``, ``INFINITE`` and ``UNLIMITED``; FlagError for anything else.
    """
    if text.upper() in ("-1", "INFINITE", "UNLIMITED"):
        return UNLIMITED
    match = re.fullmatch(r"(?:(\d{1,6})-)?(\d{1,9})(?::(\d{1,9}))?(?::(\d{1,9}))?", text, re.ASCII)
    if not match:
        raise FlagError(
            f"--time={text}: write minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS, as in 90 or 1-12:00:00"
        )
    numbers = [int(part) for part in match.groups()[1:] if part is not None]
    if match[1] is not None:  # D-HH[:MM[:SS]]
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:  # MM[:SS]
        hours, minutes, seconds = 0, numbers[0], (*numbers, 0)[1]
    total_s = ((int(match[1] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    return -(-total_s // 60)


def parse_duration(text: str) -> int:
    """Minutes of ``2h`` or ``90m``, or as ``parse_time``."""
    match = re.fullmatch(r"(\d{1,4})([hm])", text, re.ASCII)
    return int(match[1]) * (60 if match[2] == "h" else 1) if match else parse_time(text)


def format_time(minutes: int) -> str:
    """``D-HH:MM:SS`` or ``HH:MM:SS``; ``UNLIMITED`` for 0."""
    if minutes == UNLIMITED:
        return "UNLIMITED"
    days, rest = divmod(minutes, 24 * 60)
    return (f"{days}-" if days else "") + f"{rest // 60:02d}:{rest % 60:02d}:00"


def parse_memory_gb(text: str) -> float:
    """GiB of ``500`` (MB), ``500M``, ``64G``, ``1T``, ``64GB``; 0 asks for all memory of a node."""
    match = re.fullmatch(r"(\d{1,12})([KMGT]?)B?", text.upper(), re.ASCII)
    if not match:
        raise FlagError(f"--mem={text}: write a number and K, M, G or T, as in 64G")
    return int(match[1]) * MEMORY_MB[match[2]] / 1024


def format_memory(mem_gb: float) -> str:
    """sbatch's spelling: whole GiB with G, else MB rounded up."""
    return f"{int(mem_gb)}G" if mem_gb == int(mem_gb) else f"{-int(-mem_gb * 1024 // 1)}M"


def parse_gpus(text: str, flag: str = "--gpus-per-node") -> tuple[str, int]:
    """``"8"`` → ("", 8), ``"a100:4"`` → ("a100", 4)."""
    match = re.fullmatch(r"(?:([A-Za-z][\w.-]*):)?(\d{1,4})", text, re.ASCII)
    if not match:
        raise FlagError(f"{flag}={text}: write a number, or a type and a number, as in a100:8")
    return match[1] or "", int(match[2])


def parse_count(flag: str, text: str) -> int:
    """A whole number of at least 1."""
    if not re.fullmatch(r"\d{1,7}", text, re.ASCII) or int(text) < 1:
        raise FlagError(f"--{flag}={text}: write a whole number of at least 1")
    return int(text)
