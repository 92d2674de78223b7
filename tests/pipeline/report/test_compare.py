"""Runs beside each other: what differs, what is pooled, and which differences exceed the seeds' noise."""

from __future__ import annotations

import json
import math
import os
import sys

import numpy as np
import pytest

from pipeline import compare
from pipeline.errors import ConfigError, StorageError
from pipeline.report.compare import STUDENT, as_page, differing, in_terminal, judged, pooled, scored, sides_of
from pipeline.run.rundir import RunDir
from support.reporting import Page, begin, finish, start, train
from support.running import TWO_PHASES


def trained(path, *settings, score=71.0, gain=1.2):
    chain = begin(path, TWO_PHASES, "local", *settings)
    train(start(chain, "phase1"), "phase1", 1, 100, None, 100, gain=gain)
    finish(chain, "phase1", {"step": 100})
    start(chain, "sst2")
    record = {
        "dataset": "reviews",
        "scores": {"accuracy": score},
        "seeds": [{"seed": 1, "scores": {"accuracy": score}}],
    }
    (chain.run.stage("sst2").path / "scores.json").write_text(json.dumps(record))
    finish(chain, "sst2", record)
    return path


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Two learning rates with two seeds each; the second rate is better by more than the seeds differ."""
    folder = tmp_path_factory.mktemp("runs")
    cases = {"a1": (1e-2, 1, 71.0), "a2": (1e-2, 2, 71.4), "b1": (2e-2, 1, 75.0), "b2": (2e-2, 2, 75.2)}
    return [
        trained(folder / name, f"phase1.learning_rate={rate}", f"train.seed={seed}", score=score)
        for name, (rate, seed, score) in cases.items()
    ]


def test_seeds_are_pooled_and_judge_the_difference(four):
    sides, changes = sides_of(four)
    assert changes == []
    assert {row[0] for row in differing(sides)} == {"recipe phase1.learning_rate", "recipe train.seed"}
    groups = pooled(sides)
    assert [len(group.name.split(" + ")) for group in groups] == [2, 2]
    (row,) = [row for row in scored(groups) if row[0] == "reviews accuracy"]
    assert row[1].startswith("71.2 ± 0.283 (2 seeds)")
    assert "+3.9 (beyond the seeds' noise of" in row[3]
    (row,) = [row for row in scored(groups) if row[0] == "phase1 gain at [MASK]"]
    assert "+0 (within the seeds' noise" in row[3]
    page = Page(as_page(sides, changes))
    assert page.open == []
    assert "recipe phase1.learning_rate 0.01 0.01 0.02 0.02" in page.text
    for axis in ("step", "tokens", "hours"):
        assert f"Held-out MLM loss by {axis}" in page.text


def test_the_same_seed_twice_is_no_spread(tmp_path):
    sides, _ = sides_of([trained(tmp_path / "a"), trained(tmp_path / "b")])
    assert len(pooled(sides)) == 2
    assert "noise not known" in "\n".join(in_terminal(sides, []))
    assert len(pooled([sides[0], sides[0]])) == 2  # named twice


def test_a_run_beside_its_older_results(tmp_path, monkeypatch, capsys):
    path = trained(tmp_path / "run", "phase1.learning_rate=5e-3", gain=0.4)
    for name in ("phase1", "sst2"):
        RunDir(path).stage(name).move_aside()
    trained(path, "phase1.learning_rate=1e-2", gain=1.1)
    monkeypatch.setattr(sys, "argv", ["compare", str(path), "--html", str(tmp_path / "page.html")])
    assert compare.main() == 0
    said = capsys.readouterr().out
    assert "since old/phase1-1: phase.learning_rate was 0.005, is 0.01" in said
    assert "-0.7 (one seed: noise not known)" in said
    assert (tmp_path / "page.html").exists()
    monkeypatch.setattr(sys, "argv", ["compare", str(path), "--html", str(tmp_path / "new" / "page.html")])
    with open(os.devnull, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
    with pytest.raises(ValueError, match="closed file"):
        compare.main()  # as with | head
    assert (tmp_path / "new" / "page.html").exists()
    monkeypatch.setattr(sys, "argv", ["compare", str(path), "--html", str(tmp_path)])
    with pytest.raises(StorageError, match="is a folder, or its folder takes no files"):
        compare.main()
    with pytest.raises(ConfigError, match="nothing to compare"):
        sides_of([trained(tmp_path / "alone")])


@pytest.mark.parametrize("freedom", range(1, 11))
def test_the_table_is_students(freedom):
    """95 % of Student's distribution lie between the points, by Simpson's rule over its density."""
    scale = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
    x = np.linspace(0.0, STUDENT[freedom], 20_001)
    density = scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    weights = np.where(np.arange(len(x)) % 2, 4.0, 2.0)
    weights[[0, -1]] = 1.0
    assert 2 * (weights * density).sum() * x[1] / 3 == pytest.approx(0.95, abs=5e-4)


def test_the_noise_of_a_difference():
    """Two samples of the same spread: the textbook's pooled t test, by hand."""
    assert judged([1, 2, 3], [5, 6, 7]).startswith("+4 (beyond the seeds' noise of 2.3)")  # 2.78 * sqrt(2 / 3)
    assert judged([1, 2, 3], [2, 3, 4]).startswith("+1 (within")
