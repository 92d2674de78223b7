"""Runs of every released format go on: what is finished stays finished, what is half trained is trained to its end.

The runs were made by the release itself (see ``make.py``); there is one pair for each released format.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
from stored.make import write_data

from data_prep.manifest import load, publish_manifest, read_manifest
from data_prep.publish import publish_sealed
from pipeline.config import load_recipe
from pipeline.engine import checkpoint_folder
from pipeline.launch.start import selected
from pipeline.report.facts import gather
from pipeline.run.chain import Chain
from pipeline.run.rundir import RunDir
from pipeline.stage import fingerprints
from pipeline.stages import table
from support.running import call, states

HERE = Path(__file__).parent
VERSIONS = sorted(path.name for path in HERE.iterdir() if (path / "finished.tar.xz").exists())
STEPS = 24


def unpacked(folder: Path, version: str, name: str) -> RunDir:
    with tarfile.open(HERE / version / f"{name}.tar.xz") as tar:
        tar.extractall(folder / name, filter="data")
    return RunDir(folder / name)


def by_newer(run: RunDir, *stages: str) -> dict:
    """What a later version says of a run, after it has run ``stages``."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])}
    command = [sys.executable, "-m", "support.newer", str(run.path), *stages]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("version", VERSIONS)
def test_a_finished_run_is_finished_for_this_version_and_for_a_later_one(tmp_path, version):
    run = unpacked(tmp_path, version, "finished")
    assert Chain.of(run).todo() == {}
    assert set(states(run.path).values()) == {"done"}
    facts = gather(run, held=False)
    assert [(phase.name, phase.last("step")) for phase in facts.phases] == [("phase1", STEPS), ("phase2", 4)]
    assert facts.scores.keys() == {"squad", "mrpc", "sst2"}
    newer = by_newer(run)
    assert newer["todo"] == {}
    assert newer["fresh"] == fingerprints(table(load_recipe("tiny")), {}, {})
    assert newer["older"] == [name for name, stage in facts.chain.stages.items() if not stage.always]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_value_that_is_really_another_makes_it_stale(tmp_path, version):
    run = unpacked(tmp_path, version, "finished")
    settings = run.settings
    settings["recipe"]["optimizer"]["weight_decay"] = 0.02
    settings["recipe"]["data"]["test_fraction"] = 0.01  # its default, which it was not
    (run.path / "run.json").write_text(json.dumps(settings))
    todo = Chain.of(run).todo()
    assert next(iter(todo)) == "shard"
    assert todo["shard"] == "test_fraction was 0.2, is 0.01"
    assert "optimizer.weight_decay was 0.01, is 0.02" in todo["phase1"]
    settings["recipe"]["data"].update(jsonl=[], books=["books"])  # one file less, one more
    (run.path / "run.json").write_text(json.dumps(settings))
    assert "file books changed; file text.jsonl changed" in Chain.of(run).todo()["extract"]
    settings["recipe"]["data"].update(jsonl=["more.jsonl", "text.jsonl"], books=[])
    (run.path / "run.json").write_text(json.dumps({**settings, "corpora": {**settings["corpora"], "more.jsonl": {}}}))
    assert "file more.jsonl changed" in Chain.of(run).todo()["extract"]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_later_version_trains_a_half_trained_phase_to_the_same_end(tmp_path, version):
    whole, run = unpacked(tmp_path, version, "finished"), unpacked(tmp_path, version, "halfway")
    assert next(iter(by_newer(run)["todo"].items())) == ("phase1", "continues")
    newer = by_newer(run, "phase1")
    assert next(iter(newer["todo"])) == "phase2"
    attempts = run.stage("phase1").attempts
    assert len(attempts) == 2
    assert json.loads((attempts[1].path / "attempt.json").read_text())["resumed_from"] == {"attempt": 1, "step": 4}
    done, wanted = (each.stage("phase1").done["result"] for each in (run, whole))
    assert done["step"] == STEPS
    assert done["eval_mlm_loss"] == pytest.approx(wanted["eval_mlm_loss"], rel=1e-4)
    assert Chain.of(run).is_done("phase1")


def test_a_run_of_a_later_version_is_read_as_far_as_it_is_understood(tmp_path):
    run = unpacked(tmp_path, VERSIONS[-1], "finished")
    for path in [run.path / "run.json", *run.path.glob("stages/*/*.json"), *run.path.glob("**/attempts/*/*.json")]:
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or path.name == "manifest.json":
            continue
        content["newer"] = {"any": "thing"}
        if path.name == "run.json":
            for table in (content["recipe"], content["recipe"]["phase1"], content["profile"]):
                table["newer"] = "a value"
        path.write_text(json.dumps(content))
    samples = run.stage("samples_32").path
    publish_manifest(samples, {**read_manifest(samples), "newer": 1})
    with pytest.raises(Exception, match="is missing"):  # its shards are not kept: as far as that it is read
        load(samples, "train")
    step = next(run.path.glob("stages/phase2/attempts/0001/step-*"))
    manifest = {**checkpoint_folder.read_manifest(step), "newer": 1}
    publish_sealed(step / "manifest.json", manifest)
    assert checkpoint_folder.read_manifest(step)["newer"] == 1
    done = call("status", run.path, "--json")
    assert {row["state"] for row in json.loads(done.stdout)["stages"]} == {"done"}
    assert done.stderr.count("means nothing to this version") == 1  # the recipe, once, however often it is read
    assert "newer, phase1.newer" in done.stderr


def test_remake_moves_a_stage_and_what_follows_from_it_aside(tmp_path):
    run = unpacked(tmp_path, VERSIONS[-1], "finished")
    options = ["--run", run.path, "--cluster", "generic", "--data", write_data(tmp_path / "data")]
    planned = call("submit", *options, "--remake", "mrpc,export", "--dry-run")
    assert planned.returncode == 0, planned.stderr
    again = ["export", "squad", "mrpc", "sst2", "inference"]
    assert [line.split()[2] for line in planned.stdout.splitlines() if "will run" in line] == [*again, "report"]
    assert not (run.path / "old").exists()
    written = call("submit", *options, "--remake", "mrpc,export", "--write-scripts", tmp_path / "scripts")
    assert written.returncode == 0, written.stderr
    assert sorted(path.name for path in (run.path / "old").iterdir()) == sorted(f"{name}-1" for name in again)
    assert list(Chain.of(run).todo()) == [*again, "report"]
    assert Chain.of(run).todo()["mrpc"] == "not done yet"


def test_submit_names_what_an_older_version_has_made(tmp_path, capsys):
    chain = Chain.of(unpacked(tmp_path, VERSIONS[-1], "finished"))
    stages = {name: replace(stage, version=1 + (name in ("vocab", "sst2"))) for name, stage in chain.stages.items()}
    todo = selected(replace(chain, stages=stages), Namespace(remake=["sst2"], stages=None))
    assert list(todo) == ["sst2", "report"]
    assert (
        "kept: vocab, made by an older version of the stage; --remake vocab makes it again" in capsys.readouterr().out
    )
