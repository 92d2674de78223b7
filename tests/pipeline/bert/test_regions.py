"""Compiled regions: one graph for all shapes and layers, few kernels, the same numbers, dropout by the seed alone."""

import pytest
import torch

from pipeline.bert import attention, regions
from pipeline.bert.attention import Blocks
from pipeline.bert.encoder import run_layer
from support.layers import CU, compiled_regions, forward_and_backward, layers, stream


@pytest.fixture
def compiled():
    with compiled_regions():
        yield


@pytest.mark.slow
def test_a_layer_is_one_graph_of_at_most_50_kernels_and_computes_what_it_did(compiled):
    from torch._dynamo.utils import counters
    from torch._inductor import metrics

    metrics.reset()
    counters.clear()
    stack = layers(p=0.0)
    for slots in (80, 96, 160):  # none is a width of the model: equal sizes are taken for one
        hidden, blocks = stream(slots)
        out, gradients = forward_and_backward(stack, hidden, blocks, run_layer)
        expected, wanted = forward_and_backward(stack, hidden, blocks, run_layer.__wrapped__)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        whole = torch.cat([gradient.flatten() for gradient in wanted]).norm()
        for ours, theirs in zip(gradients, wanted, strict=True):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-6 * whole  # a key's bias has no gradient
    assert (counters["stats"]["unique_graphs"], dict(counters["graph_break"])) == (1, {})
    assert 0 < metrics.generated_kernel_count <= 50


@pytest.mark.slow
def test_dropout_of_a_region_follows_the_seed_alone(compiled):
    stack = layers(p=0.5)
    hidden, blocks = stream(64)

    def run(seed):
        torch.manual_seed(seed)
        return forward_and_backward(stack, hidden, blocks, run_layer)

    (first, gradients), (again, same), (other, _) = run(1), run(1), run(2)
    assert torch.equal(first, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))
    assert not torch.equal(first, other)


def test_regions_run_as_they_are_on_a_cpu_and_in_inference_mode(monkeypatch):
    assert regions.compile_regions(torch.device("cpu")) is False
    monkeypatch.setattr(regions, "_enabled", True)
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda *args: "compiled")
    assert regions.region(lambda: "as it is")() == "compiled"
    with torch.inference_mode():
        assert regions.region(lambda: "as it is")() == "as it is"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_public_way_over_a_stream_equals_samples_one_by_one():
    hidden, _ = stream(64)
    layer = layers(p=0.0)[0].attention.self
    runs = tuple(run for run in CU.diff().tolist() if run)
    expected = layer(hidden, Blocks("samples", runs=runs))
    found = layer(hidden, Blocks("varlen", varlen=attention.jagged, cu=CU, longest=35))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    expected.square().sum().backward()
    wanted = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    found.square().sum().backward()
    for parameter, gradient in zip(layer.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


def test_this_pytorch_has_the_operators_as_we_call_them_and_others_are_noticed():
    assert attention.takes("_flash_attention_forward", attention.FLASH_ARGUMENTS)
    assert attention.takes("_efficient_attention_forward", attention.EFFICIENT_ARGUMENTS)
    assert not attention.takes("_flash_attention_forward", attention.FLASH_ARGUMENTS + " another")
    assert not attention.takes("_no_such_operator", "")
