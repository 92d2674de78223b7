"""Precisions: what the device cannot do is refused; fp16's scale, skipped batches and its lowest point."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine.precision import LossScale, autocast_for
from pipeline.errors import EnvironmentFault

CPU = torch.device("cpu")


def test_tf32_is_refused_without_cuda():
    with pytest.raises(EnvironmentFault, match="tf32 needs a CUDA device"):
        autocast_for("tf32", CPU)


@pytest.mark.parametrize(("precision", "wanted"), [("fp32", torch.float32), ("bf16", torch.bfloat16),
                                                   ("fp16", torch.float16)])  # fmt: skip
def test_products_are_in_the_precision_and_weights_stay_float32(precision, wanted):
    layer = torch.nn.Linear(4, 4)
    with autocast_for(precision, CPU):
        assert layer(torch.ones(2, 4)).dtype == wanted
    assert layer.weight.dtype == torch.float32


def reference_scaler(finite: list[bool], interval: int) -> list[float]:
    """Scales after each step as torch's own GradScaler computes them."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=interval)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    scales = []
    for good in finite:
        scaler.scale(weight.sum() * (1.0 if good else math.inf)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return scales


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=15))
def test_the_scale_moves_as_torchs_grad_scaler_does(finite):
    scale, scales = LossScale(), []
    scale.GROW_AFTER = 3  # type: ignore[misc]
    for good in finite:
        scale.good() if good else scale.lowered()
        scales.append(scale.scale)
    assert scales == reference_scaler(finite, 3)


def test_the_lowest_scale_is_not_lowered():
    scale = LossScale()
    assert [scale.lowered() for _ in range(20)] == [True] * 20
    assert scale.scale == 1.0
    assert not scale.lowered()
