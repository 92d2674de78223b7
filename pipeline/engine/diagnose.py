"""A step whose loss or gradient is not finite, computed again micro-batch by micro-batch to name the culprit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Parameter

from pipeline.engine.reduce import GradientBuffer


class HasIds(Protocol):
    """Samples that can be named."""

    @property
    def ids(self) -> NDArray[np.int64]: ...


Samples = TypeVar("Samples", bound=HasIds)


def culprit(
    micro_batches: Iterable[tuple[int, Samples]],
    loss_of: Callable[[Samples, int], Tensor],
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
