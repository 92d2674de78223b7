"""A phase that starts from the weights of others, and fp16 with its skipped batches, through whole commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from support.running import call, digests, states, submit

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def with_weights(small_run: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small data and beside it, as a user would put them there, a vocabulary and a model in both forms."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copytree(small_data, folder, dirs_exist_ok=True)
    shutil.copytree(small_run / "model", folder / "bert")
    shutil.copy(folder / "bert" / "vocab.txt", folder / "vocab.txt")
    done = call("export", folder / "bert", folder / "ckpt_24.pt", "--to", "nvidia")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def lines(run: Path, phase: str) -> list[dict[str, float]]:
    paths = sorted((run / "stages" / phase / "attempts").glob("*/metrics.jsonl"))
    found = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    return [line for line in found if "loss" in line]


@pytest.mark.parametrize("weights", ["bert", "ckpt_24.pt"])
def test_a_phase_starts_from_weights_of_others(small_run, with_weights, tmp_path, weights):
    """Phase 2 alone: there is no phase 1 in its chain, and its first loss is that of a trained model."""
    run = tmp_path / "run"
    words = ("--set", "data.vocab=vocab.txt", "--set", f"phase2.start={weights}", "--set", "phase2.steps=2")
    done = submit(run, with_weights, "--stages", "extract,shard,samples_128,phase2", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"starts from the weights of {weights}" in done.stdout
    assert "phase1" not in states(run)
    trained, fresh = lines(run, "phase2")[0]["loss"], lines(small_run, "phase1")[0]["loss"]
    assert trained < fresh - 0.2
    assert trained == pytest.approx(lines(small_run, "phase2")[-1]["loss"], rel=0.15)


def test_weights_of_another_vocabulary_are_refused_by_line(with_weights, tmp_path):
    other = tmp_path / "data"
    shutil.copytree(with_weights, other)
    words = (other / "vocab.txt").read_text(encoding="utf-8").splitlines()
    words[100], words[101] = words[101], words[100]
    (other / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    settings = ("--set", "data.vocab=vocab.txt", "--set", "phase1.start=bert", "--set", "phase1.steps=2")
    done = submit(tmp_path / "run", other, "--stages", "extract,shard,samples_64,phase1", *settings)
    assert done.returncode == 4
    assert "vocab.txt" in done.stderr
    assert "line 101" in done.stderr


def test_weights_need_their_own_vocabulary(small_data, tmp_path):
    done = submit(tmp_path / "run", small_data, "--set", "phase1.start=bert")
    assert done.returncode == 2
    assert "data.vocab is missing" in done.stderr


def test_fp16_skips_batches_that_overflow_and_still_makes_all_its_steps(small_run, small_data, tmp_path):
    """The scale starts too high on purpose: skipped batches use up samples, never steps of the schedule."""
    run = tmp_path / "run"
    shutil.copytree(small_run, run, symlinks=True, ignore=shutil.ignore_patterns("phase*", "export", "old"))
    done = submit(run, small_data, "--stages", "phase1", "--set", "train.precision=fp16")
    assert done.returncode == 0, done.stdout + done.stderr
    found = lines(run, "phase1")
    reference = lines(small_run, "phase1")
    assert [line["step"] for line in found] == list(range(1, 25))
    assert [line["learning_rate"] for line in found] == [line["learning_rate"] for line in reference]
    skipped, scale = found[-1]["skipped"], found[-1]["loss_scale"]
    assert skipped > 0
    assert scale == 2.0 ** (20 - skipped)
    assert found[0]["samples"] == reference[int(found[0]["skipped"])]["samples"]
    assert abs(found[-1]["loss"] - reference[-1]["loss"]) < 0.3
    again = tmp_path / "again"
    shutil.copytree(run, again, symlinks=True)
    shutil.rmtree(again / "stages/phase1/attempts/0001/step-00000024")
    (again / "stages/phase1/done.json").unlink()
    assert submit(again, small_data, "--stages", "phase1", "--set", "train.precision=fp16").returncode == 0
    assert digests(again)["phase1", 24] == digests(run)["phase1", 24]  # scale and position came back too
