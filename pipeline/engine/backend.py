"""Which code computes an optimizer: ours, or the kernel of NVIDIA's apex where it is there."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.nn import Parameter

from pipeline.config import OptimizerConfig
from pipeline.engine.optim import AdamW, Factors, Lamb, Optimizer
from pipeline.engine.reduce import GradientBuffer
from pipeline.errors import ConfigError, EnvironmentFault


class ApexLamb(Lamb):
    """NVIDIA's CUDA kernel of the same update. It leaves the update, not the gradient, in ``grad``."""

    def __init__(self, fused_lamb: type[Any], named_parameters: Iterable[tuple[str, Parameter]], **options: Any):
        super().__init__(named_parameters, **options)
        groups = [
            {"params": [p for name, p in self.parameters.items() if self.decay[name] == decay], "weight_decay": decay}
            for decay in sorted(set(self.decay.values()))
        ]
        self._fused = fused_lamb(groups, betas=self.betas, eps=self.eps, use_nvlamb=self.variant == "nvlamb")
        for name, p in self.parameters.items():  # the kernel then works on our moments
            self._fused.state[p] = {"exp_avg": self.exp_avg[name], "exp_avg_sq": self.exp_avg_sq[name]}

    def step(self, learning_rate: float, *, max_grad_norm: float) -> float:
        """As ``Optimizer.step``; the kernel computes the norm that it clips by itself."""
        self._fused.defaults["max_grad_norm"] = max_grad_norm or math.inf
        return super().step(learning_rate, max_grad_norm=max_grad_norm)

    def _update(self, names: Sequence[str], factors: Factors) -> None:
        for group in self._fused.param_groups:
            group.update(lr=factors.learning_rate, step=self.finished_steps - 1)
        self._fused.step()


def apex_fused_lamb() -> type[Any] | None:
    """NVIDIA apex's FusedLAMB, or None where it cannot run.

    PyPI's ``apex`` is an unrelated web package that imports without error, so nothing named apex is imported
    unless NVIDIA's compiled extension ``amp_C`` is there and CUDA can be used.
    """
    if not torch.cuda.is_available():
        return None
    try:
        importlib.import_module("amp_C")  # first: it fails where apex is not NVIDIA's
        fused_lamb: type[Any] = importlib.import_module("apex.optimizers").FusedLAMB
    except (ImportError, AttributeError):
        return None
    return fused_lamb


def of_config(
    config: OptimizerConfig,
    named_parameters: Iterable[tuple[str, Parameter]],
    gradients: GradientBuffer | None = None,
) -> Optimizer:
    """The optimizer that a configuration describes; ``auto`` takes apex for lamb where it can run.

    Raises ConfigError for adamw by apex, EnvironmentFault where apex is asked for and cannot run.
    """
    options: dict[str, Any] = {name: getattr(config, name) for name in ("betas", "eps", "weight_decay")}
    options["gradients"] = gradients
    if config.name == "adamw":
        if config.backend == "apex":
            raise ConfigError("optimizer.backend = apex has lamb only; take auto or torch with adamw")
        return AdamW(named_parameters, **options)
    fused_lamb = apex_fused_lamb() if config.backend != "torch" else None
    if fused_lamb is not None:
        return ApexLamb(fused_lamb, named_parameters, variant=config.variant, **options)
    if config.backend == "apex":
        raise EnvironmentFault(
            "optimizer.backend = apex needs CUDA and NVIDIA's apex (built with amp_C; the package named apex "
            "on PyPI is another one): install it or take backend = auto"
        )
    return Lamb(named_parameters, variant=config.variant, **options)
