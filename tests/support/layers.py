"""Layers as a GPU runs them, on the CPU: a stream, a stand-in for attention, compiled regions."""

import contextlib
from unittest import mock

import torch
from torch.nn import functional

from pipeline.bert import encoder, regions
from pipeline.bert.attention import Blocks
from pipeline.bert.config import BertConfig
from pipeline.bert.encoder import Layer, run_layer
from pipeline.engine.cast import CastWeights
from pipeline.engine.reduce import GradientBuffer

CONFIG = BertConfig(
    vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, hidden_act="tanh"
)


CU = torch.tensor([0, 5, 40, 64, 64], dtype=torch.int32)


def stand_in(query, key, value, cu, longest, p):
    """For the operators of a GPU, which no compiler looks into and a CPU does not have."""
    return query * key + value


@contextlib.contextmanager
def compiled_regions():
    """Regions run compiled, on the CPU, by Inductor's C++ backend, with the dropout that a GPU has."""
    torch._dynamo.reset()
    with mock.patch.object(regions, "_enabled", True), mock.patch.object(encoder, "dropout", functional.dropout):
        yield
    torch._dynamo.reset()


def layers(p):
    torch.manual_seed(0)
    config = BertConfig(**vars(CONFIG) | {"hidden_dropout_prob": p, "attention_probs_dropout_prob": 0.0})
    return [Layer(config).train() for _ in range(2)]


def stream(slots):
    """Hidden states, and what a layer is told beside them."""
    hidden = torch.randn(1, slots, CONFIG.hidden_size, generator=torch.Generator().manual_seed(slots))
    return hidden, Blocks("varlen", varlen=stand_in, cu=CU, longest=35)


def forward_and_backward(stack, hidden, blocks, run):
    """Output and all gradients."""
    leaf = hidden.clone().requires_grad_()
    out = leaf
    for layer in stack:
        out = run(layer, out, blocks)
    out.mul(torch.linspace(-1, 1, CONFIG.hidden_size)).sigmoid().sum().backward()  # a norm hides plain sums
    parameters = [parameter for layer in stack for parameter in layer.parameters()]
    gradients = [leaf.grad, *(parameter.grad for parameter in parameters)]
    for parameter in parameters:
        parameter.grad = None
    return out.detach(), gradients


def kernels_of_a_layer(cast_once=True):
    """How many kernels Inductor makes of a layer in bf16, forward and backward, its weights cast as in training."""
    from torch._inductor import metrics

    stack = torch.nn.ModuleList(layers(p=0.0)[:1])
    autocast = torch.autocast("cpu", torch.bfloat16)
    cast = (
        CastWeights(stack, GradientBuffer([*stack.parameters()]), autocast) if cast_once else contextlib.nullcontext()
    )
    metrics.reset()
    with compiled_regions(), autocast, cast:
        hidden, blocks = stream(80)
        run_layer(stack[0], hidden.bfloat16().requires_grad_(), blocks).sum().backward()
    return metrics.generated_kernel_count
