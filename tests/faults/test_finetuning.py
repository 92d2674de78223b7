"""Fine-tuning on any number of ranks and after any kill: the same bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from faults import finetuning
from faults.table import SCALE, passes, scratch


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("task", ["squad", "mrpc"])
def test_the_tree_makes_the_same_model_and_predictions_on_any_number_of_ranks(task, tmp_path):
    finetuning.prepare(tmp_path, task)
    alone = tmp_path / "run-1"
    finetuning.finish(alone, tmp_path, task, 1)
    assert len(finetuning.losses(alone, task)) == 9  # 14 + 14 + 8 samples, three times
    for world in (2, 3, 4):
        run = tmp_path / f"run-{world}"
        finetuning.finish(run, tmp_path, task, world)
        assert finetuning.results(run, task) == finetuning.results(alone, task)
        assert finetuning.losses(run, task) == finetuning.losses(alone, task)
    other = tmp_path / "other"  # the control: another seed's dropout and order change every bit
    finetuning.finish(other, tmp_path, task, 2, seeds=(2,))
    assert finetuning.results(other, task)[2] != finetuning.results(alone, task)[2]


@pytest.mark.slow
def test_fast_is_within_a_millionth_over_twenty_steps(tmp_path):
    finetuning.prepare(tmp_path, "mrpc")
    changed = {"reduction": "fast", "epochs": 7, "learning_rate": 1e-4}
    runs = [tmp_path / f"run-{world}" for world in (1, 3)]
    for run, world in zip(runs, (1, 3), strict=True):
        finetuning.finish(run, tmp_path, "mrpc", world, **changed)
    one, three = (np.array(finetuning.losses(run, "mrpc")[:20]) for run in runs)
    assert len(one) == 20
    np.testing.assert_allclose(three, one, rtol=1e-6)


@pytest.mark.slow
def test_fp16_keeps_its_scale_over_ranks(tmp_path):
    finetuning.prepare(tmp_path, "mrpc")
    runs = [tmp_path / f"run-{world}" for world in (1, 2)]
    for run, world in zip(runs, (1, 2), strict=True):
        finetuning.finish(run, tmp_path, "mrpc", world, precision="fp16")
    assert finetuning.results(runs[0], "mrpc") == finetuning.results(runs[1], "mrpc")


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_kills_in_the_middle_of_steps_change_nothing():
    with scratch() as folder:
        passes(finetuning.kills(Path(folder), SCALE))
