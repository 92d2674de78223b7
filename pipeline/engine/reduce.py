"""Gradients of one optimizer step summed over micro-batches and ranks: fast with overlap, or bitwise equal for any
number of ranks along one fixed binary tree over the step's micro-batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Parameter

from pipeline.batch import BatchPlan
from pipeline.errors import ConfigError

BUCKET_MB = 25  # large enough for full bandwidth, small enough that the first starts early in the backward
ALIGN = 16  # elements: every gradient starts on its own cache line


class GradientBuffer:
    """One flat float32 buffer of which every parameter's ``grad`` is a view.

    Parameters are laid out in the order given; ``span`` of each is its ``(start, stop)`` in ``flat``.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self.parameters = list(parameters)
        self.spans: list[tuple[int, int]] = []
        end = 0
        for number, parameter in enumerate(self.parameters):
            if parameter.dtype != torch.float32:
                raise ConfigError(
                    f"parameter {number} of shape {tuple(parameter.shape)} is {parameter.dtype}; gradients are summed "
                    f"in torch.float32: keep the model in float32 and choose train.precision = bf16 instead"
                )
            self.spans.append((end, end + parameter.numel()))
            end += -(-parameter.numel() // ALIGN) * ALIGN
        self.flat = torch.zeros(end, device=self.parameters[0].device)
        self.views = [self.flat[a:b].view_as(p) for p, (a, b) in zip(self.parameters, self.spans, strict=True)]
        self.added: Callable[[Tensor], None] | None = None  # told the parameter by `add`
        self.zero_()

    def zero_(self) -> None:
        """Set all gradients to zero (and back to views, should anything have replaced them)."""
        self.flat.zero_()
        for parameter, view in zip(self.parameters, self.views, strict=True):
            if parameter.grad is not view:
                parameter.grad = view

    def add(self, parameter: Tensor, gradient: Tensor) -> None:
        """Add a gradient of any floating-point type, which autograd has not added itself."""
        assert parameter.grad is not None
        parameter.grad.add_(gradient)
        if self.added is not None:
            self.added(parameter)


class Reducer:
    """Sums one step's gradients, and a few float64 scalars beside them, over all micro-batches of all ranks.

    Use per step: ``begin(plan)``; for each micro-batch of this rank, in order, ``with micro_batch(index) as scalars:``
    around forward and one ``backward``, writing its losses into ``scalars``; ``finish()``. Then every rank's
    ``grad`` hold the same sum. ``group`` None means one process. ``reduction="fast"`` sends buckets with asynchronous
    all-reduces from within the backward of the rank's last micro-batch; ``"tree"`` see ``_Tree``.

    The scalars are gathered per micro-batch, so that their sum in index order does not depend on the ranks either.
    """

    def __init__(
        self,
        gradients: GradientBuffer,
        rank: int,
        group: dist.ProcessGroup | None,
        reduction: Literal["fast", "tree"],
        *,
        scalars: int = 2,
        bucket_mb: float = BUCKET_MB,
    ) -> None:
        self.gradients, self.rank, self.group, self.width = gradients, rank, group, scalars
        self._tree = _Tree(gradients.flat, rank, group) if reduction == "tree" else None
        self._buckets = _Buckets(gradients, group, bucket_mb) if reduction == "fast" and group is not None else None

    def begin(self, plan: BatchPlan) -> None:
        """Start a step that is shared as ``plan`` says: gradients and scalars are zero."""
        self.mine = plan.range_of(self.rank)
        self.gradients.zero_()
        self._scalars = torch.zeros(
            plan.micro_batches, self.width, dtype=torch.float64, device=self.gradients.flat.device
        )
        if self._tree is not None:
            self._tree.begin(plan)
        if self._buckets is not None:
            self._buckets.begin()

    @contextlib.contextmanager
    def micro_batch(self, index: int) -> Iterator[Tensor]:
        """Forward and backward of one micro-batch; gives its float64 ``scalars`` [n] to be filled."""
        if self._tree is not None:
            self.gradients.flat.zero_()
        if self._buckets is not None:
            self._buckets.armed = index == self.mine[-1]
        yield self._scalars[index]
        if self._tree is not None:
            self._tree.add(index)

    def finish(self, extra: NDArray[np.float64] | None = None) -> tuple[Tensor, NDArray[np.float64]]:
        """Complete the sums; returns the scalars of every micro-batch, float64 [micro_batches, n] on the CPU, and
        the ranks' ``extra`` summed entry by entry.
        """
        if self._tree is not None:
            self._tree.finish()
        # Each scalar is filled by one rank and zero on the others: their sum is exact in any order.
        beside = torch.from_numpy(np.zeros(0) if extra is None else extra)
        if self._scalars.is_cuda:  # from pageable memory the host would wait for the copy
            beside = beside.pin_memory().to(self._scalars.device, non_blocking=True)
        together = torch.cat([self._scalars.view(-1), beside])
        if self._buckets is not None:
            self._buckets.finish(together)
        elif self.group is not None:
            dist.all_reduce(together, group=self.group)
        together = together.cpu()
        size = self._scalars.numel()
        return together[:size].view_as(self._scalars), together[size:].numpy()


class _Buckets:
    """All-reduce of slices of the flat buffer, each sent as soon as the backward has filled it.

    Buckets go from the last parameter to the first, the order in which a backward fills them, and are sent in that
    order by every rank; a rank without micro-batches and a parameter without gradient take part with zeros.
    """

    def __init__(self, gradients: GradientBuffer, group: dist.ProcessGroup, bucket_mb: float) -> None:
        self.group, self.armed = group, False
        self.slices: list[Tensor] = []
        self.sizes: list[int] = []  # parameters in each bucket
        self.bucket: dict[Tensor, int] = {}  # of each parameter
        gradients.added = self._filled
        stop, count = gradients.flat.numel(), 0
        for number in reversed(range(len(gradients.parameters))):
            count += 1
            start = gradients.spans[number][0]
            parameter = gradients.parameters[number]
            self.bucket[parameter] = len(self.slices)
            parameter.register_post_accumulate_grad_hook(self._filled)  # type: ignore[no-untyped-call]
            if (stop - start) * 4 >= bucket_mb * 1e6 or number == 0:
                self.slices.append(gradients.flat[start:stop])
                self.sizes.append(count)
                stop, count = start, 0
        self.begin()

    def begin(self) -> None:
        self.armed = False
        self.waiting = list(self.sizes)  # parameters that each bucket still lacks
        self.sent: list[dist.Work] = []

    def finish(self, beside: Tensor) -> None:
        """Send what is left, ``beside`` after it without a wait between them, and wait for everything."""
        self.armed = False
        self._send_up_to(len(self.slices))
        self._send(beside)
        for work in self.sent:
            work.wait()

    def _filled(self, parameter: Tensor) -> None:
        if self.armed:
            bucket = self.bucket[parameter]
            if self.waiting[bucket] == 0:
                raise RuntimeError("a second backward in the last micro-batch: its gradients are already on the way")
            self.waiting[bucket] -= 1
            ready = next((i for i, lacking in enumerate(self.waiting) if lacking > 0), len(self.waiting))
            self._send_up_to(ready)

    def _send_up_to(self, bucket: int) -> None:
        for part in self.slices[len(self.sent) : bucket]:
            self._send(part)

    def _send(self, part: Tensor) -> None:
        work = dist.all_reduce(part, group=self.group, async_op=True)
        assert work is not None
        self.sent.append(work)


class _Tree:
    """Sum along a binary tree over micro-batch indices that does not depend on the ranks.

    Node (level, i) is the sum of the micro-batches [i * 2^level, (i + 1) * 2^level) that exist: its left child plus
    its right child, or the left one alone. It is held by the rank of its first micro-batch. A rank merges what it
    has as it goes, like a binary counter, so that it holds at most about log2 of its share in buffers; in the end
    right children travel to the holders of the left ones, level by level, and the root to everybody.

    Five micro-batches on three ranks, which hold 0, 1 2 and 3 4::

        level 0    0   1   2   3   4      rank 0: 0     rank 1: 1, 2     rank 2: 3, 4
        level 1    0+1     2+3     4      1 goes to rank 0, 3 to rank 1
        level 2    0+1+2+3         4      2+3 goes to rank 0
        level 3    0+1+2+3+4              4 goes to rank 0, the whole to everybody
    """

    def __init__(self, flat: Tensor, rank: int, group: dist.ProcessGroup | None) -> None:
        self.flat, self.rank, self.group = flat, rank, group
        self.blocks: dict[tuple[int, int], Tensor] = {}
        self.free: list[Tensor] = []

    def begin(self, plan: BatchPlan) -> None:
        self.count = plan.micro_batches
        self.holder = [r for r in range(plan.world_size) for _ in plan.range_of(r)]  # of each micro-batch
        self.free += self.blocks.values()
        self.blocks = {}

    def add(self, index: int) -> None:
        """Take over ``flat`` as the gradient of one micro-batch; indices come in order."""
        level, value = 0, self.flat
        while index % 2 and (level, index - 1) in self.blocks:
            left = self.blocks.pop((level, index - 1))
            left.add_(value)
            self._release(value)
            level, index, value = level + 1, index // 2, left
        self.blocks[level, index] = self._buffer().copy_(value) if value is self.flat else value

    def finish(self) -> None:
        """Merge over the ranks; afterwards every rank has the root in ``flat``."""
        level = 0
        while (1 << level) < self.count:
            for left in range(0, -(-self.count >> level), 2):
                self._merge(level, left)
            level += 1
        if self.holder[0] == self.rank:
            self.flat.copy_(self.blocks[level, 0])
        if self.group is not None:
            dist.broadcast(self.flat, self._global(self.holder[0]), group=self.group)

    def _merge(self, level: int, left: int) -> None:
        """Node (level + 1, left / 2) from its children, on the ranks that hold them."""
        at_left = self.holder[left << level]
        if (left + 1) << level < self.count:
            at_right = self.holder[(left + 1) << level]
            if self.rank == at_right != at_left:
                block = self.blocks.pop((level, left + 1))
                dist.send(block, self._global(at_left), group=self.group)
                self._release(block)
            elif self.rank == at_left and (level, left) in self.blocks:
                if at_right != at_left:
                    received = self._buffer()
                    dist.recv(received, self._global(at_right), group=self.group)
                else:
                    received = self.blocks.pop((level, left + 1))
                self.blocks[level, left].add_(received)
                self._release(received)
        if (level, left) in self.blocks:
            self.blocks[level + 1, left // 2] = self.blocks.pop((level, left))

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def _buffer(self) -> Tensor:
        return self.free.pop() if self.free else torch.empty_like(self.flat)

    def _release(self, buffer: Tensor) -> None:
        if buffer is not self.flat:
            self.free.append(buffer)
