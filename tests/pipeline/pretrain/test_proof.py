"""A training that strangers can check: from a bundle alone, whose code is never run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from data_prep.publish import SEAL, file_sha256, publish_sealed
from support.running import call, one_line

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def bundle(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("proof") / "bundle"
    done = call("prove", small_run, "--to", folder)
    assert done.returncode == 0, done.stderr
    assert "phase1, steps to check: 21" in done.stdout
    return folder


def resealed(folder: Path, changed: Path) -> None:
    """What a forger does who has changed a file."""
    record = json.loads((folder / "proof.json").read_text())
    record["files"][str(changed.relative_to(folder))] = file_sha256(changed)
    publish_sealed(folder / "proof.json", {key: value for key, value in record.items() if key != SEAL})


def test_a_step_is_computed_again_without_the_run_and_without_the_bundles_code(bundle, tmp_path):
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    for poisoned in (copy / "code" / "pipeline" / "__init__.py", copy / "pipeline" / "__init__.py"):
        poisoned.parent.mkdir(parents=True, exist_ok=True)
        poisoned.write_text("raise SystemExit('the code of the bundle was run')")
    done = call("prove", "--check", copy, "--step", 21)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = {line.split()[0]: line for line in done.stdout.splitlines()}
    for exact in ("loss", "mlm_loss", "nsp_loss", "samples"):  # sums in the order of micro-batches, for any ranks
        assert figures[exact].endswith(" equal"), done.stdout
    assert float(figures["grad_norm"].split()[1]) == pytest.approx(float(figures["grad_norm"].split()[2]), rel=1e-5)


def test_a_single_micro_batch_is_computed_again(bundle, tmp_path):
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    done = call("prove", "--check", copy, "--step", 21, "--index", 1)
    assert done.returncode == 0, done.stderr
    assert "nsp_loss of 1" in done.stdout
    assert done.stdout.endswith("equal bit for bit\n")
    one_line(call("prove", "--check", copy, "--step", 21, "--index", 99), 2, "shares of", "on record")
    record = copy / "phase1" / "metrics.jsonl"
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    lines[20]["shares"].reverse()
    record.write_text("".join(json.dumps(line) + "\n" for line in lines))
    resealed(copy, record)
    assert call("prove", "--check", copy, "--step", 21, "--index", 0).returncode == 5


def test_forgeries_are_found(bundle, tmp_path):
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    record = copy / "phase1" / "metrics.jsonl"
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    better = [{**line, "mlm_loss": 0.9 * line["mlm_loss"]} for line in lines]
    record.write_text("".join(json.dumps(line) + "\n" for line in better))
    one_line(call("prove", "--check", copy, "--step", 21), 3, "is not the file that proof.json lists")
    resealed(copy, record)
    done = call("prove", "--check", copy, "--step", 21)
    assert done.returncode == 5
    assert "step 21: mlm_loss not reproduced" in done.stderr
    shutil.copyfile(bundle / "phase1" / "metrics.jsonl", record)
    resealed(copy, record)
    samples = copy / "phase1" / "samples-21.safetensors"
    arrays = load_file(samples)
    arrays["tokens"] = arrays["tokens"][::-1].copy()
    save_file(arrays, samples)
    resealed(copy, samples)
    assert call("prove", "--check", copy, "--step", 21).returncode == 5  # other text has another loss
    arrays["tokens"][:] = 65535
    save_file(arrays, samples)
    resealed(copy, samples)
    one_line(call("prove", "--check", copy, "--step", 21), 3, "tokens outside the vocabulary")


def test_what_cannot_be_proved_is_said(bundle, small_run):
    one_line(call("prove", "--check", bundle, "--step", 7), 2, "name one of its steps", "phase1: 21")
    one_line(call("prove", small_run, "--to", bundle), 2, "exists already")
