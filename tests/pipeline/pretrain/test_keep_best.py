"""`train.keep_best`: the phase ends with the checkpoint of its lowest held-out loss, also after a kill."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from faults import training
from pipeline.config import science
from pipeline.engine import checkpoint
from pipeline.engine.checkpoint_folder import read, read_manifest
from pipeline.errors import StorageError
from pipeline.pretrain.task import Pretraining
from pipeline.run.rundir import RunDir

BETTER_THEN_WORSE = {"eval_every": 1, "eval_samples": 64, "learning_rate": 0.05, "steps": 12, "schedule": "constant"}


def ended(run: Path, samples: Path, **changes) -> dict:
    training.train(run, samples, **BETTER_THEN_WORSE | changes)
    return (RunDir(run).stage(training.STAGE).done or {})["result"]


@pytest.mark.slow
def test_the_best_is_kept_named_in_every_manifest_and_the_result(tmp_path, monkeypatch) -> None:
    samples = training.make_samples(tmp_path / "samples")
    every = ended(tmp_path / "every", samples, checkpoint_every=1, keep_checkpoints=99)
    stage = RunDir(tmp_path / "every").stage(training.STAGE).path / "attempts" / "0001"
    lines = [line for line in RunDir(tmp_path / "every").stage(training.STAGE).metrics() if "eval_mask_loss" in line]
    losses = {line["step"]: line["eval_mask_loss"] for line in lines}
    best = min(losses, key=losses.__getitem__)
    assert 1 < best < 12, "the toy must get better and then worse, else this shows nothing"
    assert every["checkpoint"].endswith("step-00000012")

    result = ended(tmp_path / "kept", samples, keep_best=True)
    assert result["best"] == {"attempt": 1, "step": best, "value": losses[best]}
    assert result["checkpoint"] == f"attempts/0001/step-{best:08d}"
    assert (result["step"], result["eval_mask_loss"]) == (12, losses[best])  # figures are those of the result
    folder = RunDir(tmp_path / "kept").stage(training.STAGE).path
    theirs, ours = read(stage / f"step-{best:08d}").weights, read(folder / result["checkpoint"]).weights
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    kept = {path.name: read_manifest(path)["best"]["step"] for path in (folder / "attempts" / "0001").glob("step-*")}
    assert len(kept) <= 3, kept  # two, and the best
    assert set(kept.values()) == {best}

    # Killed after the best and before the end: nothing is different but the number of the attempt.
    read_batch = Pretraining.read
    monkeypatch.setattr(
        Pretraining, "read", lambda task, batch, index: 1 / 0 if batch > 9 else read_batch(task, batch, index)
    )
    with pytest.raises(ZeroDivisionError):
        ended(tmp_path / "killed", samples, keep_best=True)
    monkeypatch.undo()
    again = ended(tmp_path / "killed", samples, keep_best=True)
    assert again["best"] == result["best"]
    assert again["checkpoint"] == result["checkpoint"]
    assert again["eval_mask_loss"] == result["eval_mask_loss"]


def test_a_best_checkpoint_that_the_disk_refused_does_not_cost_the_training(tmp_path, monkeypatch, capsys) -> None:
    samples = training.make_samples(tmp_path / "samples")
    save = checkpoint.save

    def refused(attempt_dir, *, step, best, **fields):
        if step == best["step"] > 1:
            raise StorageError("no space left on device")
        return save(attempt_dir, step=step, best=best, **fields)

    monkeypatch.setattr(checkpoint, "save", refused)
    monkeypatch.setattr(checkpoint, "RETRY_S", 0)
    result = ended(tmp_path / "run", samples, keep_best=True)
    assert result["checkpoint"].endswith("step-00000012")
    assert "best" not in result
    assert "was the best but could not be saved" in capsys.readouterr().out


def test_when_one_looks_is_science_only_where_the_best_is_kept() -> None:
    for keep, told in ((False, set()), (True, {"eval_every", "eval_samples", "keep_best"})):
        train = training.changed(training.TRAIN, {"keep_best": keep})
        assert science(train).keys() & {"eval_every", "eval_samples", "keep_best"} == told
