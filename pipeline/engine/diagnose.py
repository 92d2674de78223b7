"""A batch whose loss or gradient is not finite, computed again micro-batch by micro-batch to name the culprit."""

from __future__ import annotations

import torch

from pipeline.engine.accumulate import Accumulator, Sums
from pipeline.engine.feed import Fed, on_device


def culprit(accumulator: Accumulator, sums: Sums) -> str | None:
    """One line on the first of this rank's micro-batches with a gradient that is not finite; None: all are.

    ``sums`` are those of the batch that comes next by the state's count.
    """
    task, state, ranks, gradients = accumulator.task, accumulator.state, accumulator.ranks, accumulator.gradients
    for index in sums.plan.range_of(ranks.rank):
        ranks.alive("working")
        micro_batch = task.read(state.batches, index)
        fed = Fed(index, on_device(micro_batch, ranks.device), micro_batch.counts, digest=0)
        gradients.zero_()
        with accumulator.autocast:
            loss = accumulator.losses(state.batches, fed, sums.plan, list(sums.counts.values())).sum()
        torch.autograd.backward(loss)
        for name, parameter in state.model.named_parameters():
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                ids = ", ".join(map(str, micro_batch.ids[:8])) + (" ..." if len(micro_batch.ids) > 8 else "")
                value = float(loss.detach())
                return f"micro-batch {index}: loss {value:.4g}, the gradient of {name} is not finite (samples {ids})"
    return None
