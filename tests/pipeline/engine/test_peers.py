"""What ranks find out about each other: another program, other parameters, one that is slow."""

from __future__ import annotations

import statistics
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.nn import Parameter

from pipeline.engine import peers
from pipeline.errors import EnvironmentFault

RECORD = {
    "host": "node0", "config": "c", "code": "d", "torch": "2.13.0", "numpy": "2.4", "python": "3.11", "threads": 1,
    "gpu": "", "cpu": "AVX512",
}  # fmt: skip


def test_ranks_that_are_alike_have_nothing_to_say():
    assert peers.check_same([RECORD, {**RECORD, "host": "node1"}], allow_mixed=False) == []


@pytest.mark.parametrize("field", [*peers.MUST_AGREE, "gpu"])
def test_another_program_is_refused_by_rank_host_and_field(field):
    other = {**RECORD, "host": "node1", field: "other"}
    with pytest.raises(EnvironmentFault, match=rf"rank 1 on node1 has {field} other, rank 0 on node0"):
        peers.check_same([RECORD, other], allow_mixed=False)


def test_mixed_gpus_may_be_allowed_and_are_said():
    lines = peers.check_same([RECORD, {**RECORD, "gpu": "A100", "cpu": "AVX2"}], allow_mixed=True)
    assert [line.split()[0] for line in lines] == ["cpu", "gpu"]


def test_the_introduction_of_this_process_is_complete():
    found = peers.introduction({"train": {"seed": 1}}, 1, torch.device("cpu"), "pipeline.pretrain.task")
    assert found.keys() == RECORD.keys()
    assert (
        found["config"]
        != peers.introduction({"train": {"seed": 2}}, 1, torch.device("cpu"), "pipeline.pretrain.task")["config"]
    )


def test_every_single_flipped_bit_of_a_parameter_changes_the_digest():
    parameters = [Parameter(torch.randn(3, 5)), Parameter(torch.randn(7))]
    whole = int(peers.digest(parameters))
    for bit in range(32):
        (old,) = struct.unpack("<i", struct.pack("<f", float(parameters[1].detach()[3])))
        flipped = parameters[1].detach().clone().view(torch.int32)
        flipped[3] = old ^ (1 << bit) if bit < 31 else old ^ -(1 << 31)
        assert int(peers.digest([parameters[0], flipped.view(torch.float32)])) != whole, bit


def test_a_rank_at_half_speed_is_named_once_within_twenty_steps():
    watch = peers.SlowRanks(3)
    found = [watch.add(np.array([0.2, 0.4, 0.2]), np.array([2, 2, 2])) for _ in range(60)]
    assert [index for index, names in enumerate(found) if names] == [peers.WINDOW - 1]
    ((rank, ratio),) = found[peers.WINDOW - 1]
    assert (rank, ratio) == (1, pytest.approx(2.0))


@pytest.mark.parametrize(
    ("seconds", "shares"),
    [
        ([0.2, 0.27, 0.2], [2, 2, 2]),  # not slow enough
        ([0.2, 0.3, 0.2], [2, 3, 2]),  # more work, not less speed
        ([0.002, 0.004, 0.002], [1, 1, 1]),  # half speed of next to nothing
        ([0.2, 0.0, 0.2], [1, 0, 1]),  # a rank without work
        ([0.2, 0.9, 0.2], [1, 0, 1]),  # the same, which waited for its device
        ([0.4], [2]),
    ],
)
def test_no_false_alarm(seconds, shares):
    watch = peers.SlowRanks(len(seconds))
    assert not any(watch.add(np.array(seconds), np.array(shares)) for _ in range(60))


def test_a_single_stall_is_not_slowness():
    watch = peers.SlowRanks(2)
    assert not any(watch.add(np.array([0.2, 30.0 if step == 10 else 0.2]), np.array([1, 1])) for step in range(60))


@given(st.lists(st.floats(0, 9), min_size=2, max_size=40))
def test_medians_without_are_medians_of_the_others_that_work(values):
    assume(sum(value > 0 for value in values) >= 2)
    for index, median in enumerate(peers.medians_without(np.array(values))):
        others = [value for at, value in enumerate(values) if value > 0 and at != index]
        assert median == (statistics.median(others) if values[index] > 0 else 0)


PROGRAM = {
    "pipeline/engine/loop.py": "from pipeline.batch import plan\nimport math\n\ndef step(x):\n    return math.exp(x)\n",
    "pipeline/pretrain/task.py": "RATE = 3\n",
    "pipeline/finetune/task.py": "RATE = 4\n",
    "data_prep/masking.py": "def mask(x):\n    return x\n",
}
LOOP = PROGRAM["pipeline/engine/loop.py"]
SAME = [
    {"pipeline/engine/loop.py": LOOP.replace("return", "'''Says what it does.'''\n    # and why\n    return")},
    {"pipeline/engine/loop.py": '"""A module."""\n' + LOOP.replace("pipeline.batch", "pipeline.elsewhere.batch")},
    {"pipeline/engine/loop.py": "", "pipeline/bert/moved.py": LOOP},
    {"pipeline/engine/loop.py": "import math\n", "pipeline/engine/step.py": LOOP},
    {"pipeline/finetune/task.py": "RATE = 5\n"},
    {"pipeline/report/page.py": "print()\n"},
]
OTHER = [
    {"pipeline/engine/loop.py": LOOP.replace("exp", "exp2")},
    {"pipeline/engine/loop.py": LOOP.replace("import math", "import cmath as math")},
    {"pipeline/pretrain/task.py": "RATE = 3.0\n"},
    {"data_prep/masking.py": "def mask(x):\n    return -x\n"},
    {"pipeline/engine/loop.py": ""},
]


@pytest.mark.parametrize(("changes", "same"), [*((each, True) for each in SAME), *((each, False) for each in OTHER)])
def test_the_digest_of_the_code_is_of_what_computes_not_of_where_it_lies_or_what_it_says(tmp_path, changes, same):
    def digest(files: dict[str, str]) -> str:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return peers.code_digest("pipeline.pretrain.task", tmp_path)

    assert (digest(PROGRAM) == digest(changes)) == same


def test_the_digest_of_this_code_covers_every_room_that_computes():
    assert peers.code_digest("pipeline.pretrain.task") != peers.code_digest("pipeline.finetune.task")
    root = Path(peers.__file__).parents[2]
    assert all(list(root.glob(place)) for place in peers.COMPUTES)
