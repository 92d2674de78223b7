"""Weights cast once per step: the bits of autocast alone, in fewer casts and kernels, and nothing left behind."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.bert.encoder import Layer, run_layer
from pipeline.bert.linear import Linear
from pipeline.engine.cast import CastWeights
from pipeline.engine.reduce import GradientBuffer, _Buckets
from support.layers import CONFIG, compiled_regions, kernels_of_a_layer, layers, stream


class Casts(TorchDispatchMode):
    """How many weight matrices are cast."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float32:
            self.count += args[0].dim() == 2 and torch._C._current_autograd_node() is None
        return func(*args, **kwargs or {})


def step(dtype, once, *, around=contextlib.nullcontext, micro_batches=3):
    """Two layers, three micro-batches of a step: outputs, gradients and the layers."""
    stack = torch.nn.ModuleList(layers(p=0.1))
    gradients = GradientBuffer(list(stack.parameters()))
    outs = []
    autocast = torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)
    cast = CastWeights(stack, gradients, autocast) if once else contextlib.nullcontext()
    with around(), autocast, cast:
        for number in range(micro_batches):
            torch.manual_seed(number)
            out, blocks = stream(64 + 32 * number)
            out = out.to(dtype or torch.float32).requires_grad_()
            for layer in stack:
                out = run_layer(layer, out, blocks)
            with torch.autocast("cpu", enabled=False):
                out.float().mul(torch.linspace(-1, 1, CONFIG.hidden_size)).sigmoid().sum().backward()
            outs.append(out.detach())
    return outs, gradients.flat, stack


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
@pytest.mark.parametrize("around", [contextlib.nullcontext, pytest.param(compiled_regions, marks=pytest.mark.slow)])
def test_outputs_and_gradients_are_those_of_autocast_bit_for_bit(dtype, around):
    (outs, gradients, _), (expected, wanted, _) = (step(dtype, once, around=around) for once in (True, False))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(outs, expected, strict=True))
    assert torch.equal(gradients, wanted)
    assert wanted.any()
    assert all(out.dtype == (dtype or torch.float32) for out in outs)


def test_a_weight_is_cast_once_in_a_step_and_left_to_none():
    counted = {}
    for micro_batches in (1, 3):
        with Casts() as casts:
            *_, stack = step(torch.bfloat16, True, micro_batches=micro_batches)
        counted[micro_batches] = casts.count
        assert not any(module.cast for module in stack.modules() if isinstance(module, Linear))
    weights = sum(isinstance(module, Linear) for module in stack.modules())
    assert weights == 6 * len(stack)
    assert counted == {1: weights, 3: weights}
    with Casts() as casts:
        step(torch.bfloat16, False)
    assert casts.count > weights  # the attention's three matrices, which autocast does not see
    cast = CastWeights(stack, GradientBuffer([*stack.parameters()]), torch.autocast("cpu"))
    with pytest.raises(ZeroDivisionError), cast:
        raise ZeroDivisionError
    assert not any(module.cast for module in stack.modules() if isinstance(module, Linear))


def test_a_layers_bucket_leaves_before_the_layers_below_have_their_gradients():
    stack = torch.nn.ModuleList(layers(p=0.0))
    gradients = GradientBuffer(list(stack.parameters()))
    buckets = _Buckets(gradients, None, 1e-9)  # one for each parameter
    sent, at_lower_layer = [], []
    buckets._send_up_to = lambda bucket: sent.append(bucket)
    stack[0].output.LayerNorm.weight.register_post_accumulate_grad_hook(lambda _: at_lower_layer.append(max(sent)))
    buckets.armed = True
    with torch.autocast("cpu"), CastWeights(stack, gradients, torch.autocast("cpu")):
        out, blocks = stream(64)
        out = out.bfloat16()
        for layer in stack:
            out = run_layer(layer, out, blocks)
        out.float().square().sum().backward()
    assert max(sent) == len(list(stack.parameters()))
    assert at_lower_layer == [len(list(Layer.parameters(stack[1])))]


@pytest.mark.slow
def test_a_compiled_layer_neither_casts_its_weights_nor_their_gradients():
    parameters = 12  # of its linears
    assert 0 < kernels_of_a_layer() <= min(50, kernels_of_a_layer(cast_once=False) - parameters)
