"""The model and the optimizer on a GPU that is not there: nothing waits, nothing is wasted, nothing lands elsewhere."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


@pytest.fixture(scope="session")
def guard(tmp_path_factory):
    """The device guard, compiled against this PyTorch."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed: what the product asks of a GPU is not checked")
    sys.path.insert(0, str(HERE))
    from fake_gpu import compiler_command

    library = tmp_path_factory.mktemp("guard") / "guard.so"
    subprocess.run(compiler_command(HERE / "guard.cpp", library), check=True)
    return library


@pytest.fixture(scope="session")
def traced(guard):
    """What `traced.py` saw."""
    environment = os.environ | {
        "LD_PRELOAD": str(guard),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]),
        "OMP_NUM_THREADS": "1",
    }
    child = subprocess.run(
        [sys.executable, str(HERE / "traced.py")], env=environment, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


MODELS = ["bf16", "fp32", "squad"]


@pytest.mark.parametrize("what", MODELS)
def test_a_micro_batch_neither_waits_nor_copies_to_or_from_the_host(traced, what):
    assert traced[what]["waits"] == []
    assert traced[what]["devices"] == ["cuda:1"]


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


@pytest.mark.parametrize("what", MODELS)
def test_outside_compiled_regions_at_most_60_kernels_and_one_accumulation_per_parameter(traced, what):
    outside = traced[what]["outside"]
    accumulations = outside.count("add_")
    assert accumulations == traced[what]["parameters"]
    assert len(outside) - accumulations <= 60
    assert {"run_layer", "sum_norm"} <= set(traced[what]["regions"])


def test_lamb_waits_for_the_norm_alone_and_moves_at_most_18_gigabytes(traced):
    assert traced["optimizer"]["waits"] == ["_local_scalar_dense"]
    assert traced["optimizer"]["devices"] == ["cuda:1"]
    assert 14 < traced["optimizer"]["gigabytes"] <= 18
