"""States in words, from the run's own files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from pipeline.config import load_profile, load_recipe
from pipeline.rundir import RunDir
from pipeline.status import survey


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    recipe, profile = load_recipe("tiny"), load_profile("local")
    settings = {"recipe": dataclasses.asdict(recipe), "profile": dataclasses.asdict(profile), "corpora": {}}
    (tmp_path / "run.json").write_text(json.dumps({**settings, "data_dir": "."}))
    return RunDir(tmp_path)


def states(run: RunDir) -> dict[str, str]:
    return {row["name"]: row["state"] for row in survey(run)}


def test_nothing_begun_is_todo(run):
    assert set(states(run).values()) == {"todo"}


def test_while_a_runner_is_at_work(run):
    earlier = run.stage("shard").new_attempt("earlier")
    earlier.judge(3, "a bad file, corrected since", 0)
    with run.held():
        run.stage("extract").new_attempt("now")
        assert states(run)["extract"] == "running"
        assert states(run)["shard"] == "waiting"  # it failed before this runner began
        run.stage("shard").new_attempt("now").judge(3, "a bad file", 0)
        assert states(run)["shard"] == "failed"
        run.stage("vocab").new_attempt("now").judge(76, "lost a peer", 0)
        assert states(run)["vocab"] == "waiting"  # it is started again


@pytest.mark.parametrize(("code", "state"), [(3, "failed"), (5, "failed"), (75, "cancelled"), (130, "cancelled")])
def test_after_the_runner_has_gone(run, code, state):
    run.stage("extract").new_attempt("x").judge(code, "the reason", 0)
    row = survey(run)[0]
    assert row["state"] == state
    assert "the reason" in row["reason"]
