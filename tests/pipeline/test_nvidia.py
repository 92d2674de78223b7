"""Calls of NVIDIA's scripts, as its page prints them and as its repository reads them, become commands of ours."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.running import ROOT
from support.toys import examples, write_model

PAGE = "/bert/large.pt 2.0 {batch} 3e-5 fp16 8 42 /bert/squad /bert/vocab /results {mode} /bert/large.json -1"


def call(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.nvidia", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.parametrize(
    ("mode", "has", "lacks"),
    [
        ("train", "--mode train --precision fp16 --processes 8 --seed 42 --epochs 2 --batch 256", "--eval"),
        ("eval", "--eval /bert/squad/dev-v1.1.json --out /results --mode eval --precision fp16", "--epochs"),
    ],
)
def test_both_examples_of_the_page(mode, has, lacks):
    done = call("--dry-run", "scripts/run_squad.sh", *PAGE.format(batch=32, mode=mode).split())
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("python -m pipeline.finetune squad --model /bert/large.pt --config ")
    assert has in done.stdout
    assert lacks not in done.stdout
    assert "--max-steps" not in done.stdout


def test_the_repositorys_form_has_the_warm_up_fifth():
    words = PAGE.format(batch=4, mode="train").split()
    done = call("--dry-run", "run_squad.sh", *words[:4], "0.2", *words[4:-1], "30")
    assert "--learning-rate 3e-05 --warmup 0.2 --max-steps 30 --micro-batch 4" in done.stdout
    assert call("--dry-run", "run_squad.sh", *words[:5]).stdout.count("--warmup 0.1") == 1  # a tail is missing


def test_a_pretraining_is_told_with_what_has_no_counterpart():
    words = ["8192", "6e-3", "fp16", "8", "0.2843", "7038", "200", "true"]
    done = call("--dry-run", "--data", "corpora", "run_pretraining.sh", *words)
    assert "--set phase1.global_batch=65536 --set phase1.micro_batch=64" in done.stdout
    assert "--set phase2.global_batch=32768 --set phase2.micro_batch=8" in done.stdout
    assert done.stderr == "resume = true has no counterpart: a run continues by itself\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["run_swag.sh"], "run_swag.sh: choose from run_squad.sh, run_glue.sh, run_pretraining.sh"),
        (["run_squad.sh", "x", "2", "4", "3e-5", "0.1", "half"], "argument 6 is the precision"),
        (["run_squad.sh", "x", "two"], "epochs = 'two' is no number"),
        (["run_squad.sh", *map(str, range(5)), "fp16", *["1"] * 9], "takes 14 arguments"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(words, line):
    done = call("--dry-run", *words)
    assert done.returncode == 2
    assert line in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_command_is_run(tmp_path: Path):
    write_model(tmp_path / "model", positions=128)
    data = examples(tmp_path, "sst2")
    for name in ("train.tsv", "dev.tsv"):
        shutil.copy(data, tmp_path / name)
    words = [tmp_path / "model", tmp_path, "-", "-", tmp_path / "out", "sst-2", 1, 8, 2, 1e-3, 0.1, 1, -1, "fp32", 2]
    done = call("run_glue.sh", *map(str, words), "train eval")
    assert done.returncode == 0, done.stderr
    assert "dev.tsv: accuracy" in done.stdout
