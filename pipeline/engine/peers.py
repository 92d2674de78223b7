"""What the ranks of one training know of each other: that they run the same program, compute the same parameters,
and which of them is slow.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from data_prep.publish import json_sha256
from pipeline.batch import BatchPlan
from pipeline.config import science
from pipeline.engine.ranks import Ranks
from pipeline.errors import EnvironmentFault, NodeFault, PeerLost
from pipeline.node.distributed import Group
from pipeline.node.job import Job
from slurm.environment import this_node

COMPUTES = (  # what decides the bits of a training beside its task: model, engine, batches, the data's reader
    *("pipeline/bert/*.py", "pipeline/engine/*.py", "pipeline/batch.py"),
    *("data_prep/hdf5.py", "data_prep/masking.py", "data_prep/splitmix.py"),
)
MUST_AGREE = ("config", "code", "torch", "numpy", "threads")
SLOW = 1.43  # times the others' median: their share of it is below 0.7
WINDOW = 20  # steps
LEAST_LOSS_S = 1.0  # in a window; less is noise


def introduction(config: Mapping[str, Any], threads: int, device: torch.device, task: str) -> dict[str, Any]:
    """What a rank says of itself: host, a hash of its configuration and of the task's code, versions, GPU."""
    return {
        "host": this_node(),
        "config": json_sha256(science(config))[:16],
        "code": code_digest(task),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "threads": threads,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def code_digest(task: str, root: Path = Path(__file__).parents[2]) -> str:
    """One hash of the statements that compute, wherever in ``COMPUTES`` they lie and whatever is said about them.

    Taken are all top-level statements as syntax trees without docstrings, in order of their text; imports from our
    own packages, which say only where something lies, are left out. ``task`` is a module of the task's own room.
    """
    files = [path for place in (str(Path(*task.split(".")[:-1], "*.py")), *COMPUTES) for path in root.glob(place)]
    texts = {ast.dump(node) for path in files for node in _bare(ast.parse(path.read_bytes())).body}
    return hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()[:16]


def _bare(tree: ast.Module) -> ast.Module:
    """The tree without docstrings (strings that are statements) and without imports from our own packages."""
    for node in ast.walk(tree):
        for name, value in ast.iter_fields(node):
            if isinstance(value, list):
                setattr(node, name, [item for item in value if not _says_only(item)])
    return tree


def _says_only(node: Any) -> bool:
    match node:
        case ast.Expr(value=ast.Constant(value=str())):
            return True
        case ast.ImportFrom(module=str(module)):
            return module.partition(".")[0] in ("pipeline", "data_prep", "slurm", "__future__")
    return False


def check_same(ranks: Sequence[Mapping[str, Any]], *, allow_mixed: bool) -> list[str]:
    """Lines to say about differences that only change bits.

    Raises EnvironmentFault naming host and field where ranks run another program, or other GPUs without
    ``allow_mixed``: their gradients would be added all the same.
    """
    wanted = [*MUST_AGREE, *([] if allow_mixed else ["gpu"])]
    for field in wanted:
        for rank, record in enumerate(ranks):
            if record[field] != ranks[0][field]:
                hint = "; --allow-mixed lets them train together" if field == "gpu" else ""
                raise EnvironmentFault(
                    f"rank {rank} on {record['host']} has {field} {record[field] or 'none'}, rank 0 on "
                    f"{ranks[0]['host']} has {ranks[0][field] or 'none'}: all ranks must run the same{hint}"
                )
    return [
        f"{field} differs between the ranks ({', '.join(sorted({str(record[field]) for record in ranks}))})"
        for field in ("python", "cpu", "gpu")
        if len({record[field] for record in ranks}) > 1
    ]


class Peers:
    """The ranks of one attempt, introduced to each other and known to run the same program.

    Raises EnvironmentFault when they do not. ``own`` is this rank's introduction.
    """

    def __init__(self, job: Job, ranks: Ranks, config: Mapping[str, Any], task: str):
        self.job, self.group = job, ranks.group
        self.own = job.patiently(lambda: introduction(config, job.threads, ranks.device, task))
        ranks.meet("introduction")  # one may have waited long for its files
        records = ranks.gather(self.own)
        self.hosts = [str(record["host"]) for record in records]
        self.mixed = job.run.exists and bool(job.run.settings.get("allow_mixed"))
        for line in check_same(records, allow_mixed=self.mixed):
            job.say(line)
        self._slow = SlowRanks(len(self.hosts))

    def compare(self, state: Iterable[Tensor], step: int) -> None:
        """Raise NodeFault or PeerLost on every rank when the ranks' ``state`` differs; that of mixed GPUs may."""
        if not self.mixed:
            check_state(state, step, self.hosts, self.group)

    def put_slow_on_record(self, seconds: NDArray[np.float64], plan: BatchPlan, step: int) -> None:
        """Take the ranks' compute seconds of a step; whoever turns out slow is warned of and goes into the events.

        On rank 0 alone: at a thousand ranks the medians are work.
        """
        if self.job.rank != 0:
            return
        for rank, ratio in self._slow.add(seconds, shares_of(plan)):
            host, attempt = self.hosts[rank], self.job.attempt.number
            self.job.warn(f"rank {rank} on {host} is slow: {ratio:.1f} times the others over {WINDOW} steps")
            facts = {"stage": self.job.stage, "attempt": attempt, "step": step, "rank": rank, "host": host}
            self.job.run.event("slow_rank", **facts, ratio=round(ratio, 3))


@functools.lru_cache(maxsize=2)
def shares_of(plan: BatchPlan) -> NDArray[np.int64]:
    """Micro-batches of each rank, int64 ``[ranks]``: steps are shared alike, so that one answer serves many."""
    return np.array(plan.shares)


class SlowRanks:
    """Finds ranks that need much longer for a micro-batch than the others (a score below 0.7, as others call it)."""

    def __init__(self, ranks: int) -> None:
        self._seconds = np.zeros((ranks, WINDOW))  # of a micro-batch, the oldest step overwritten
        self._steps = 0
        self._named = np.zeros(ranks, bool)

    def add(self, seconds: NDArray[np.float64], micro_batches: NDArray[np.int64]) -> list[tuple[int, float]]:
        """Take one step's compute ``seconds [ranks]``, float64, and micro-batches ``[ranks]``.

        Returns the ``(rank, times the others' median)`` of ranks found slow over the last 20 steps, each once.
        """
        each = np.divide(seconds, micro_batches, out=np.zeros(len(seconds)), where=micro_batches > 0)
        self._seconds[:, self._steps % WINDOW] = each
        self._steps += 1
        if self._steps < WINDOW:
            return []
        typical = np.median(self._seconds, axis=1)
        if np.count_nonzero(typical > 0) < 2:
            return []
        usual = medians_without(typical)
        slow = (typical > SLOW * usual) & ((typical - usual) * micro_batches * WINDOW > LEAST_LOSS_S) & ~self._named
        self._named |= slow
        return [(rank, float(typical[rank] / usual[rank])) for rank in np.flatnonzero(slow).tolist()]


def medians_without(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each value ``[n]`` the median of the others that are above 0, of which there must be one; 0 for one of 0."""
    ordered = np.sort(values[values > 0])
    # One that is left out moves all after it a place down.
    left_out, count = np.searchsorted(ordered, values), len(ordered) - 1
    low, high = (index + (index >= left_out) for index in ((count - 1) // 2, count // 2))
    return np.where(values > 0, (ordered[low] + ordered[high]) / 2, 0.0)


def digest(tensors: Iterable[Tensor]) -> Tensor:
    """One int64 [] over float32 tensors: the sum of their bit patterns, which any single flipped bit changes."""
    sums = [tensor.detach().view(torch.int32).sum(dtype=torch.int64) for tensor in tensors]
    return torch.stack(sums).sum()


def check_state(state: Iterable[Tensor], step: int, hosts: Sequence[str], group: Group) -> None:
    """Compare parameters and moments of all ranks; every rank raises when they are not the same.

    NodeFault (77) names the ranks and hosts that differ from the majority; PeerLost (76) when there is none.
    """
    if group is None:
        return
    own = digest(state)
    received = [torch.empty_like(own) for _ in hosts]
    dist.all_gather(received, own, group=group)
    digests = [int(value) for value in received]
    if len(set(digests)) == 1:
        return
    usual = statistics.mode(digests)
    others = [rank for rank, digest in enumerate(digests) if digest != usual]
    again = "nothing of it was saved; training starts again from the last checkpoint"
    if 2 * len(others) >= len(digests):
        raise PeerLost(f"step {step}: the ranks' parameters or moments differ and no majority agrees; {again}")
    named = ", ".join(f"{rank} on {hosts[rank]}" for rank in others)
    raise NodeFault(
        f"step {step}: parameters or moments of rank {named} differ from those of the "
        f"{len(digests) - len(others)} others; {again}",
        tuple(sorted({hosts[rank] for rank in others})),
    )
