"""The linears of the encoder, which can compute with parameters that were cast for them beforehand."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class Linear(nn.Linear):
    """A linear that computes with ``cast``, its weight and bias in another type, where somebody left them there.

    What autocast does for any linear, it does anew each time a compiled function runs.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.cast: tuple[Tensor, ...] = ()

    def operands(self) -> tuple[Tensor, ...]:
        """``weight [out, in]`` and ``bias [out]`` to compute with."""
        return self.cast or (self.weight, self.bias)

    def forward(self, values: Tensor) -> Tensor:
        """``[…, out]`` of ``[…, in]``."""
        return functional.linear(values, *self.operands())
