"""Slurm's spelling of numbers. The same table is put to a real sbatch in tests/cluster."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm.errors import FlagError
from slurm.resources import (
    UNLIMITED,
    Resources,
    format_memory,
    format_time,
    parse_gpus,
    parse_memory_gb,
    parse_nodes,
    parse_time,
)

TIMES = {
    "90": 90,
    "90:00": 90,
    "0:30": 1,
    "1:30:00": 90,
    "01:30:01": 91,
    "1-12": 36 * 60,
    "1-12:30": 36 * 60 + 30,
    "2-00:00:59": 48 * 60 + 1,
    "0": UNLIMITED,
    "-1": UNLIMITED,
    "infinite": UNLIMITED,
    "UNLIMITED": UNLIMITED,
}


@pytest.mark.parametrize(("text", "minutes"), TIMES.items())
def test_time_as_sbatch_reads_it(text: str, minutes: int) -> None:
    assert parse_time(text) == minutes


@pytest.mark.parametrize("text", ["", "1h", "1:2:3:4", "1-", "-5", "1-1:1:1:1", "1.5", "1 0", "٣", "1\n"])
def test_time_that_is_none(text: str) -> None:
    with pytest.raises(FlagError, match="--time="):
        parse_time(text)


@given(st.integers(min_value=1, max_value=10**6))
def test_time_round_trip(minutes: int) -> None:
    assert parse_time(format_time(minutes)) == minutes


def test_time_spelling() -> None:
    assert [format_time(m) for m in (0, 5, 90, 1440, 2 * 1440 + 61)] == [
        "UNLIMITED",
        "00:05:00",
        "01:30:00",
        "1-00:00:00",
        "2-01:01:00",
    ]


def test_nodes() -> None:
    assert [parse_nodes(text) for text in ("4", "16-32", "1k", "8-8")] == [(4, 4), (16, 32), (1024, 1024), (8, 8)]


@pytest.mark.parametrize("text", ["0", "4-2", "", "a", "4-", "1,2", "-4", "4x", "0-3"])
def test_nodes_that_are_none(text: str) -> None:
    with pytest.raises(FlagError, match="--nodes="):
        parse_nodes(text)


def test_memory() -> None:
    assert [parse_memory_gb(text) for text in ("64G", "2048", "512M", "1T", "64gb", "0")] == [64, 2, 0.5, 1024, 64, 0]
    assert [format_memory(gb) for gb in (64, 0.5, 0, 1.3)] == ["64G", "512M", "0G", "1332M"]
    with pytest.raises(FlagError, match="--mem="):
        parse_memory_gb("many")


def test_gpus() -> None:
    assert parse_gpus("8") == ("", 8)
    assert parse_gpus("a100:4") == ("a100", 4)
    with pytest.raises(FlagError):
        parse_gpus("4:a100")


def test_gpu_hours_bound() -> None:
    assert Resources(nodes=(16, 32), gpus_per_node=8, time_min=90).gpu_hours() == 32 * 8 * 1.5
