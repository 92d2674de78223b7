"""The same training on any number of ranks, through whole commands with real gloo processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from running import digests, submit

pytestmark = [pytest.mark.slow]

FEW, MANY = (1, 2, 3, 5), (1, 2, 3, 4, 5, 7, 8)
DROPOUT = ("model.hidden_dropout_prob=0.1", "model.attention_probs_dropout_prob=0.1")


def phase1(small_run: Path, data: Path, to: Path, processes: int, *settings: str) -> dict[int, dict[str, float]]:
    """Phase 1 alone on ``processes`` ranks, from the small run's samples; its log lines by step."""
    if not to.exists():
        shutil.copytree(small_run, to, symlinks=True, ignore=shutil.ignore_patterns("phase*", "export", "old"))
    words = [word for setting in (*DROPOUT, *settings) for word in ("--set", setting)]
    done = submit(to, data, "--stages", "phase1", "--processes", processes, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {}
    for path in sorted((to / "stages" / "phase1" / "attempts").glob("*/metrics.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            if "loss" in record:
                lines[record["step"]] = record
    assert sorted(lines) == list(range(1, 25))
    return lines


def tree_is_bitwise(small_run: Path, data: Path, folder: Path, worlds: tuple[int, ...], precision: str) -> None:
    found = {}
    for world in worlds:
        run = folder / f"{precision}-{world}"
        phase1(small_run, data, run, world, "train.reduction=tree", f"train.precision={precision}")
        found[world] = digests(run)["phase1", 24]
    assert len(set(found.values())) == 1, found


def test_tree_reduction_is_bitwise_equal_for_any_number_of_ranks(small_run, small_data, tmp_path):
    """Uneven splits (3 micro-batches on 2 ranks) and idle ranks (5) included, dropout on."""
    tree_is_bitwise(small_run, small_data, tmp_path, FEW, "fp32")


@pytest.mark.chaos
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tree_reduction_is_bitwise_equal_for_many_world_sizes(small_run, small_data, tmp_path, precision):
    tree_is_bitwise(small_run, small_data, tmp_path, MANY, precision)


def test_fast_reduction_agrees_step_by_step(small_run, small_data, tmp_path):
    """Per-step losses of 20 steps within 1e-6 relative in fp32, and the data in the same order."""
    reference = phase1(small_run, small_data, tmp_path / "1", 1)
    for world in (2, 3):
        other = phase1(small_run, small_data, tmp_path / str(world), world)
        for step in range(1, 21):
            assert other[step]["loss"] == pytest.approx(reference[step]["loss"], rel=1e-6), (world, step)


def test_the_global_mean_does_not_depend_on_the_micro_batch_and_nvidias_does(small_run, small_data, tmp_path):
    """Without dropout, twelve samples in one micro-batch or in twelve give the same loss; a mean of means does not."""
    off = ("model.hidden_dropout_prob=0", "model.attention_probs_dropout_prob=0")
    lines = {}
    for mean in ("global", "micro"):
        for micro_batch in (12, 1):
            words = (*off, f"train.loss_mean={mean}", f"phase1.micro_batch={micro_batch}")
            lines[mean, micro_batch] = phase1(small_run, small_data, tmp_path / f"{mean}-{micro_batch}", 1, *words)

    def farthest(mean: str, micro_batch: int) -> float:
        """Largest relative difference of a step's loss from that of one big micro-batch."""
        one_big = lines["global", 12]
        return max(abs(line["loss"] / one_big[step]["loss"] - 1) for step, line in lines[mean, micro_batch].items())

    assert lines["global", 1][1]["loss"] == pytest.approx(lines["global", 12][1]["loss"], rel=1e-6)
    assert farthest("global", 1) < 1e-5
    assert farthest("micro", 12) < 1e-6
    assert farthest("micro", 1) > 1e-4
