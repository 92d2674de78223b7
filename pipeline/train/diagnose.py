"""A step whose loss or gradient is not finite, computed again micro-batch by micro-batch to name the culprit."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

from pipeline.train.data import MaskedSamples
from pipeline.train.reduce import GradientBuffer


def culprit(
    micro_batches: Iterable[tuple[int, MaskedSamples]],
    loss_of: Callable[[MaskedSamples, int], Tensor],
    parameters: Iterable[tuple[str, Parameter]],
    gradients: GradientBuffer,
) -> str | None:
    """One line on the first of this rank's micro-batches with a gradient that is not finite; None: all are."""
    named = list(parameters)
    for index, found in micro_batches:
        gradients.zero_()
        loss = loss_of(found, index)
        torch.autograd.backward(loss)
        for name, parameter in named:
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                ids = ", ".join(map(str, found.ids[:8])) + (" ..." if len(found.ids) > 8 else "")
                return (
                    f"micro-batch {index}: loss {float(loss):.4g}, the gradient of {name} is not finite (samples {ids})"
                )
    return None
