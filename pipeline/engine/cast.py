"""The weights of compiled layers in the type of the matrix products, cast once for all micro-batches of a step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.bert.encoder import Layer
from pipeline.bert.linear import Linear
from pipeline.engine.reduce import GradientBuffer


class CastWeights:
    """Within ``with``, the layers of ``model`` compute with weights cast at its beginning; outside, as ever.

    Autocast casts a weight once as long as it lasts, but a compiled function does so each time it runs, and casts the
    gradient back into a float32 one only to have it added. The copies are leaves of the graph: their gradients are
    added to those of the parameters, ``gradients``, as soon as they are there. The bits are the same.
    """

    def __init__(self, model: nn.Module, gradients: GradientBuffer, autocast: torch.autocast) -> None:
        layers = [module for module in model.modules() if isinstance(module, Layer)] if autocast._enabled else []
        self.linears = [module for layer in layers for module in layer.modules() if isinstance(module, Linear)]
        self.parameters = [parameter for linear in self.linears for parameter in (linear.weight, linear.bias)]
        self.copies = [parameter.detach().to(autocast.fast_dtype).requires_grad_() for parameter in self.parameters]

        for parameter, copy in zip(self.parameters, self.copies, strict=True):

            def add(copy: Tensor, parameter: Tensor = parameter) -> None:
                gradient, copy.grad = copy.grad, None
                assert gradient is not None
                gradients.add(parameter, gradient)

            copy.register_post_accumulate_grad_hook(add)  # type: ignore[no-untyped-call]

    def __enter__(self) -> None:
        if self.copies:
            with torch.no_grad():
                torch._foreach_copy_(self.copies, self.parameters)
        for number, linear in enumerate(self.linears):
            linear.cast = (self.copies[2 * number], self.copies[2 * number + 1])

    def __exit__(self, *_: object) -> None:
        for linear in self.linears:
            linear.cast = ()
