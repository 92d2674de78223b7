"""One, two and three phases through the real runner, one run directory after the other set of phases."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from stored.make import HERE, write_data

from pipeline.engine.checkpoint_folder import read_manifest
from pipeline.run.rundir import RunDir
from support.running import call

RECIPE = HERE / "stored.toml"
SHORT = [word for name in ("phase1", "phase2") for word in ("--set", f"{name}.steps=2")]
THIRD = {"seq_len": 48, "max_predictions": 7, "global_batch": 4, "micro_batch": 2, "learning_rate": 5e-3, "warmup": 0.1}
WITH_THIRD = [word for key, value in {**THIRD, "steps": 3}.items() for word in ("--set", f"phase3.{key}={value}")]
pytestmark = [pytest.mark.slow]


def trained(run: Path, data: Path, stages: str, *words: object) -> list[str]:
    """Submit up to ``stages``; the names of the stages that ran."""
    options = ["--recipe", RECIPE, "--cluster", "local", "--processes", 1, "--run", run, "--data", data]
    done = call("submit", *options, "--stages", stages, *SHORT, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split()[2] for line in done.stdout.splitlines() if line.startswith("  will run")]


def origin(run: Path, stage: str) -> str:
    """What a phase said of its start."""
    log = RunDir(run).stage(stage).attempts[-1].log.read_text()
    return next((line.partition("starts from ")[2] for line in log.splitlines() if "starts from " in line), "")


def weights_of(run: Path, stage: str) -> str:
    """Digest of what a phase ended with."""
    folder = RunDir(run).stage(stage)
    return read_manifest(folder.path / folder.done["result"]["checkpoint"])["digest"]


def test_one_two_and_three_phases_in_any_selection(tmp_path):
    data, run = write_data(tmp_path / "data"), tmp_path / "run"
    makers = "extract,shard,vocab,samples_32"
    first = ["--set", 'phases=["phase1"]']
    assert trained(run, data, f"{makers},phase1", *first) == [*makers.split(","), "phase1"]
    assert json.loads((run / "run.json").read_text())["recipe"]["phases"] == ["phase1"]
    assert [row["name"] for row in json.loads(call("status", run, "--json").stdout)["stages"]].count("phase2") == 0

    assert trained(run, data, "samples_64,phase2") == ["samples_64", "phase2"]
    assert origin(run, "phase2") == "the weights of phase1"

    assert trained(run, data, "samples_48,phase3,export", *WITH_THIRD) == ["samples_48", "phase3", "export"]
    assert origin(run, "phase3") == "the weights of phase2"
    assert "from step 3 of phase3" in RunDir(run).stage("export").attempts[-1].log.read_text()

    alone = tmp_path / "alone"
    for name in ("extract", "shard", "vocab", "samples_64"):
        shutil.copytree(run / "stages" / name, alone / "stages" / name)
    second = ["--set", 'phases=["phase2"]']
    assert trained(alone, data, "phase2", *second) == ["phase2"]
    assert origin(alone, "phase2") == ""  # random weights
    assert weights_of(alone, "phase2") != weights_of(run, "phase2")
