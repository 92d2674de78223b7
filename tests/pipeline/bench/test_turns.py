"""Several processes measure together; whichever fails, the others end and its reason is told, once."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from pipeline.bench import turns
from pipeline.bench.turns import Row, Work, of_precision, on_processes
from pipeline.engine.ranks import Ranks
from pipeline.errors import ConfigError, PipelineError
from support.running import ROOT, children_of, command

OPTIONS = argparse.Namespace(threads=1, warmup=1, steps=2, beside=None)
ASKED = {"seq_len": 8, "gpus": 2, "micro_batch": 4, "precision": "fp32"}


def ranks_of(pid: int) -> list[int]:
    """The measuring processes of a benchmark."""
    return [child for child in sorted(children_of(pid)) if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


@contextmanager
def sums(options: argparse.Namespace, asked: Row, ranks: Ranks) -> Iterator[Work]:
    """A step in which every process waits for the others."""

    def step(number: int, learning_rate: float) -> None:
        time.sleep(0.01)
        assert ranks.sum(torch.ones(1)).item() == ranks.world_size

    yield Work(asked, {"ours": step}, 8, lambda number: (60 + number, 1e12))


@contextmanager
def refuses(options: argparse.Namespace, asked: Row, ranks: Ranks) -> Iterator[Work]:
    """The second process cannot; the first waits for it, or has lost it before it says why."""

    def step(number: int, learning_rate: float) -> None:
        if ranks.rank == 0 and asked["late_s"]:
            raise RuntimeError("Connection closed by peer")
        if ranks.rank == 1 and number == 2:
            time.sleep(asked["late_s"])
            raise asked["error"]
        if not asked["late_s"]:
            ranks.sum(torch.ones(1))

    yield Work(asked, {"ours": step}, 8, lambda number: (64, 0.0))


@pytest.mark.slow
def test_a_measurement_is_made_by_all_its_processes():
    (row,) = on_processes(sums, OPTIONS, ASKED)
    assert (row["variant"], row["gpus"], row["steps"], row["mean_tokens"]) == ("ours", 2, 2, round(61.5 / 8, 1))
    assert row["sequences_per_s"] == pytest.approx(8 / row["step_s"], rel=0.2)
    assert row["padded_tokens_per_s"] == pytest.approx(8 * row["sequences_per_s"], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "late_s", "code", "line"),
    [
        (ConfigError("no such thing"), 0.0, 2, "no such thing"),
        (ConfigError("no such thing"), 1.0, 2, "no such thing"),
        (ZeroDivisionError("of ours"), 0.0, 1, "ZeroDivisionError: of ours"),
        (torch.OutOfMemoryError("CUDA out of memory."), 0.0, 2, "fp32: take a --micro-batch below 4: CUDA out of mem"),
    ],
)
def test_a_process_that_fails_ends_the_others_and_is_told(error: Exception, late_s: float, code: int, line: str):
    with pytest.raises(PipelineError, match=line) as caught:
        on_processes(refuses, OPTIONS, {**ASKED, "error": error, "late_s": late_s})
    assert caught.value.exit_code == code
    assert ("in step\n" in "".join(getattr(caught.value, "__notes__", ()))) == (code == 1)  # where, in the child
    assert ranks_of(os.getpid()) == []


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_others_and_is_told():
    words = ("train", "--recipe", "tiny", "--phase", "phase1", "--micro-batch", "2", "--threads", "1", "--gpus", "2")
    call = command("bench", *words, "--steps", "1000000")
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as bench:
        while len(ranks := ranks_of(bench.pid)) < 2:
            assert bench.poll() is None
        os.kill(ranks[1], signal.SIGKILL)
        out, error = bench.communicate(timeout=120)
    assert (bench.returncode, out) == (76, "")
    assert error == "rank 1 of 2 was ended by SIGKILL, as when memory runs out: nothing is measured\n"
    assert not Path(f"/proc/{ranks[0]}").exists()


def test_a_value_for_each_precision():
    assert (of_precision("8", "fp16"), of_precision("tf32=4,fp16=8", "fp16"), of_precision("", "fp16")) == (8, 8, None)
    with pytest.raises(ConfigError, match="for each precision"):
        of_precision("tf32=4", "fp16")


def test_all_mistakes_are_told_at_once():
    parser = argparse.ArgumentParser()
    turns.common_options(parser)
    words = ["--steps", "0", "--accumulation", "fp16=2", "--batch-per-gpu", "9", "--micro-batch", "2"]
    options, wrong = parser.parse_args(words), list[str]()
    for precision in ("fp32", "fp16"):
        turns.amounts(options, precision, 1, wrong)
    with pytest.raises(ConfigError) as caught:
        turns.refuse(options, ["fp32", "fp17"], wrong)
    assert str(caught.value).splitlines() == [
        "'fp16=2': give a number, or one for each precision, as tf32=128,fp16=256",
        "--batch-per-gpu 9: no multiple of the micro-batch 2",
        "--precision fp17: choose from fp32, tf32, bf16, fp16",
        "--steps 0: at least 1",
        "--batch-per-gpu and --accumulation: give one of them",
    ]
