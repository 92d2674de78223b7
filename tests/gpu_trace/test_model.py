"""The model and the optimizer on a GPU that is not there: nothing waits, nothing is wasted, nothing lands elsewhere."""

import shutil

import pytest
from gpu_trace.bars import bars, seen


@pytest.fixture(scope="session")
def traced(tmp_path_factory):
    """What `traced.py` saw."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed: what the product asks of a GPU is not checked")
    return seen(tmp_path_factory.mktemp("guard"))


MODELS = ["bf16", "fp32", "squad"]


@pytest.mark.parametrize("what", MODELS)
def test_random_numbers_come_from_the_generator_of_their_device(traced, what):
    assert "native_dropout" in traced[what]["names"]
    assert traced[what]["generators"] in ([], ["cuda:1"])


@pytest.mark.parametrize(("what", "operator"), [("bf16", "flash"), ("fp32", "efficient"), ("squad", "flash")])
def test_attention_is_one_operator_and_no_square_of_slots_exists(traced, what, operator):
    assert {f"_{operator}_attention_forward", f"_{operator}_attention_backward"} <= set(traced[what]["names"])
    slots = (128, 3584)  # of a sample, of the stream
    assert [1, 3584, 192] in traced[what]["shapes"]
    assert not [shape for shape in traced[what]["shapes"] if len(shape) > 1 and set(shape[-2:]) <= set(slots)]


def test_every_bar_holds(traced):
    found = bars(traced)
    assert len(found) == 17
    assert [bar for bar in found if bar.found > bar.most] == []


@pytest.mark.parametrize("what", MODELS)
def test_what_the_bars_count_was_there_to_be_counted(traced, what):
    assert traced[what]["outside"].count("add_") == traced[what]["parameters"]
    assert {"run_layer", "sum_norm"} <= set(traced[what]["regions"])
    assert traced["optimizer"]["gigabytes"] > 14
    assert traced["optimizer"]["waits"] == ["_local_scalar_dense"]
