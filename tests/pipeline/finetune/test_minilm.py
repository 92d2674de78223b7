"""A published encoder learns the sentiment stand-in: the long proof that fine-tuning works on real text."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_minilm_reaches_80_percent_on_held_out_snippets(carriers: Path, sample_dir: Path, tmp_path: Path) -> None:
    files = ["--train", f"{sample_dir}/sentiment-train.tsv", "--eval", f"{sample_dir}/sentiment-dev.tsv"]
    settings = ["--epochs", "1", "--batch", "32", "--learning-rate", "6e-5", "--max-seq-len", "64"]
    arguments = ["sst2", "--model", f"{carriers}/minilm", *files, "--out", str(tmp_path), *settings]
    run = subprocess.run(
        [sys.executable, "-m", "pipeline.finetune", *arguments, "--precision", "bf16"],
        env=os.environ | {"OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    print(run.stdout)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["examples"] > 2000
    assert scores["scores"]["accuracy"] >= 80
