"""Stops and starts of the whole chain: kills in every stage, Ctrl-C, cancel, changed recipes, a held run."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from support.running import Background, call, children_of, digests, states, submit

STAGES = [
    "extract",
    "shard",
    "vocab",
    "samples_64",
    "samples_128",
    "phase1",
    "phase2",
    "export",
    "squad",
    "mrpc",
    "sst2",
]
pytestmark = [pytest.mark.slow]


def same_result(one: Path, other: Path) -> bool:
    """The same bytes where data is made, the same weights and moments where it is trained, the same scores."""
    for stage in ("extract", "shard", "vocab", "samples_64", "samples_128"):
        files = {
            path.name: path.read_bytes()
            for path in (one / "stages" / stage).iterdir()
            if path.suffix in (".jsonl", ".txt", ".hdf5")
        }
        assert files, stage
        for name, content in files.items():
            assert (other / "stages" / stage / name).read_bytes() == content, f"{stage}/{name}"
    mine, theirs = digests(one), digests(other)
    last = [("phase1", 24), ("phase2", 6)]
    assert [mine[key] for key in last] == [theirs[key] for key in last]
    for task in ("squad", "mrpc", "sst2"):
        scores = [json.loads((run / "stages" / task / "scores.json").read_text())["scores"] for run in (one, other)]
        assert scores[0] == scores[1], task
    return True


def test_the_undisturbed_chain_is_done_and_does_nothing_again(small_run, small_data):
    assert set(states(small_run).values()) == {"done"}
    assert (small_run / "report.html").is_file()
    assert (small_run / "model" / "model.safetensors").is_file()
    again = submit(small_run, small_data)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    settings = json.loads((small_run / "run.json").read_text())
    assert settings["versions"]["torch"]
    assert settings["recipe"]["phase1"]["steps"] == 24
    assert not os.path.isabs(settings["data_dir"])


def test_a_kill_in_every_stage_changes_nothing(small_run, small_data, tmp_path):
    """SIGKILL to the runner as soon as each stage has begun; its children die with it; the next start continues."""
    run = tmp_path / "killed"
    for stage in STAGES:
        background = Background(run, small_data)
        attempts = run / "stages" / stage / "attempts"
        background.wait_until(lambda folder=attempts: folder.is_dir() and bool(list(folder.iterdir())))
        if stage in ("phase1", "phase2"):
            background.wait_until(lambda folder=attempts: bool(list(folder.glob("*/step-*/manifest.json"))))
        children = children_of(background.process.pid)
        background.send(signal.SIGKILL)
        background.end()
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not [child for child in children if Path(f"/proc/{child}").exists()]
    done = submit(run, small_data)
    assert done.returncode == 0, done.stdout + done.stderr
    assert same_result(small_run, run)


def test_a_killed_rank_is_started_again_by_itself(small_run, small_data, tmp_path):
    run = tmp_path / "rank"
    background = Background(run, small_data, "--stages", "extract,shard,vocab,samples_64,phase1")
    attempts = run / "stages" / "phase1" / "attempts"
    background.wait_until(lambda: bool(list(attempts.glob("0001/step-*/manifest.json"))))
    ranks = [
        pid for pid in children_of(background.process.pid) if b"phase1" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    code, output = background.end()
    assert code == 0, output
    assert "starting it again" in output
    verdict = json.loads((attempts / "0001" / "verdict.json").read_text())
    assert verdict["code"] in (75, 76)
    assert digests(run)["phase1", 24] == digests(small_run)["phase1", 24]


def test_ctrl_c_saves_and_ends_with_130(small_run, small_data, tmp_path):
    run = tmp_path / "interrupted"
    background = Background(run, small_data, "--stages", "extract,shard,vocab,samples_64,phase1")
    metrics = run / "stages" / "phase1" / "attempts" / "0001" / "metrics.jsonl"
    background.wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2)
    background.send(signal.SIGINT)
    code, output = background.end()
    assert code == 130, output
    assert states(run)["phase1"] == "cancelled"
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert ("phase1", steps[-1]) in digests(run)  # nothing trained is lost
    assert submit(run, small_data, "--stages", "phase1").returncode == 0
    assert digests(run)["phase1", 24] == digests(small_run)["phase1", 24]
    again = [
        json.loads(line)["step"]
        for line in (run / "stages" / "phase1" / "attempts" / "0002" / "metrics.jsonl").read_text().splitlines()
    ]
    assert again[0] == steps[-1] + 1


def test_cancel_stops_after_the_next_checkpoint(small_data, tmp_path):
    run = tmp_path / "cancelled"
    stages = ("--stages", "extract,shard,vocab,samples_64,phase1")
    background = Background(run, small_data, *stages, "--set", "phase1.steps=1000")  # outlasts the start of a command
    metrics = run / "stages" / "phase1" / "attempts" / "0001" / "metrics.jsonl"
    background.wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2)
    asked = call("cancel", run)
    assert asked.returncode == 0, asked.stderr
    code, output = background.end()
    assert code == 75, output
    assert states(run)["phase1"] == "cancelled"
    assert digests(run)
    assert "nothing is running" in call("cancel", run).stdout


def test_a_run_in_use_is_refused_with_its_holder(small_data, tmp_path):
    run = tmp_path / "busy"
    background = Background(run, small_data)
    background.wait_until(lambda: (run / "lock").exists() and (run / "lock").stat().st_size > 0)
    second = submit(run, small_data)
    assert second.returncode == 8
    assert str(background.process.pid) in second.stderr
    assert second.stderr.count("\n") == 1
    background.send(signal.SIGINT)
    assert background.end()[0] == 130


def test_one_value_changed_redoes_what_depends_on_it_and_keeps_the_old(small_run, small_data, tmp_path):
    run = tmp_path / "changed"
    subset = "extract,shard,vocab,samples_64,samples_128,phase1,phase2"
    assert submit(run, small_data, "--stages", subset).returncode == 0
    before = digests(run)
    done = submit(run, small_data, "--stages", subset, "--set", "phase2.learning_rate=1e-3")
    assert done.returncode == 0
    assert "phase2.learning_rate" in done.stdout or "learning_rate was 0.005, is 0.001" in done.stdout
    assert "will run phase1" not in done.stdout
    after = digests(run)
    assert after["phase1", 24] == before["phase1", 24]
    assert after["phase2", 6] != before["phase2", 6]
    assert (run / "old" / "phase2-1" / "done.json").is_file()


def test_another_number_of_ranks_goes_on_with_the_same_samples(small_run, small_data, tmp_path):
    run = tmp_path / "resized"
    subset = "extract,shard,vocab,samples_64,phase1"
    background = Background(run, small_data, "--stages", subset, "--processes", "2")
    metrics = run / "stages" / "phase1" / "attempts" / "0001" / "metrics.jsonl"
    background.wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 5)
    background.send(signal.SIGINT)
    assert background.end()[0] == 130
    done = submit(run, small_data, "--stages", subset, "--processes", "3")
    assert done.returncode == 0, done.stderr
    lines = [
        json.loads(line)
        for path in sorted(run.glob("stages/phase1/attempts/*/metrics.jsonl"))
        for line in path.read_text().splitlines()
    ]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    reference = [
        json.loads(line)
        for line in (small_run / "stages" / "phase1" / "attempts" / "0001" / "metrics.jsonl").read_text().splitlines()
    ]
    for line in reference:
        if "loss" in line:
            assert losses[line["step"]] == pytest.approx(line["loss"], rel=1e-5)


def test_numbers_that_are_not_finite_stop_with_5_and_are_never_saved(small_data, tmp_path):
    run = tmp_path / "diverged"
    done = submit(
        run,
        small_data,
        "--stages",
        "extract,shard,vocab,samples_64,phase1",
        "--set",
        "phase1.learning_rate=1e30",
        "--set",
        "phase1.warmup=0",
    )
    assert done.returncode == 5, done.stdout + done.stderr
    line = json.loads((run / "stages/phase1/attempts/0001/verdict.json").read_text())["line"]
    assert "rank" in line
    assert "step" in line
    assert not list(run.glob("stages/phase1/attempts/*/step-*/manifest.json"))
    assert states(run)["phase1"] == "failed"
