"""`train.objective = "mlm"`: samples of one text each, no next sentence in training, figures or report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from data_prep.hdf5 import read_listed
from data_prep.manifest import load_verified
from pipeline.run.rundir import RunDir
from support.running import call, one_line, submit

pytestmark = [pytest.mark.slow]

SETTINGS = ('train.objective="mlm"', "data.vocab_size=300", "phase1.steps=6", "phase1.seq_len=256",
            "train.eval_every=6", 'phases=["phase1"]')  # fmt: skip
STAGES = "extract,shard,vocab,samples_256,phase1,export,report"


@pytest.fixture(scope="module")
def run(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("objective") / "run"
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    done = submit(folder, small_data, *settings, "--stages", STAGES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NSP" not in done.stdout
    return RunDir(folder)


def test_samples_are_the_documents_and_nothing_is_lost(run) -> None:
    """One pass over a document is its text, whole sentences in each sample, as many as fit."""
    samples = load_verified(run.stage("samples_256").path, "train")
    special = samples.special
    text_tokens = json.loads((run.stage("samples_256").path / "manifest.json").read_text())["train"]["text_tokens"]
    seen = 0
    for listed in samples.shards:
        shard = read_listed(samples, listed)
        lengths = np.diff(shard.offsets)
        assert (shard.tokens[shard.offsets[:-1]] == special["cls"]).all()
        assert (shard.tokens[shard.offsets[1:] - 1] == special["sep"]).all()
        assert (np.isin(shard.tokens, [special["cls"], special["sep"]]).sum()) == 2 * len(lengths)
        assert (shard.b_start == lengths).all()
        assert not shard.is_random_next.any()
        seen += len(shard.tokens) - 2 * len(lengths)
    assert seen == text_tokens


def test_training_knows_no_next_sentence(run) -> None:
    stage = run.stage("phase1")
    lines = [line for line in stage.metrics() if "loss" in line]
    assert all(line["loss"] == line["mlm_loss"] for line in lines)
    assert not any("nsp" in key for line in stage.metrics() for key in line)
    result = (stage.done or {})["result"]
    assert not any("nsp" in key for key in result)
    folders = sorted(stage.path.glob("attempts/*/step-*"))
    first, last = (load_file(folder / "weights.safetensors") for folder in folders)
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    assert any("encoder" in name for name in moved)
    for name in {*moved, *load_file(folders[-1] / "optimizer.safetensors")}:
        assert "pooler" not in name
        assert "seq_relationship" not in name
    assert "NSP" not in (run.path / "report.html").read_text()
    done = call("status", run.path)
    assert done.returncode == 0


def test_transformers_reads_the_model_as_a_masked_language_model(run) -> None:
    """Its loss over a sample that is masked nowhere but at one place is the one that it gives there."""
    model = transformers.BertForMaskedLM.from_pretrained(run.model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.model)
    with torch.no_grad():
        logits = model(**tokenizer("the [MASK] of the city", return_tensors="pt")).logits
    assert torch.isfinite(logits).all()


def test_single_texts_are_not_taken_for_pairs(run, small_data, tmp_path) -> None:
    """Their NSP labels would all be the same."""
    (tmp_path / "vocab.txt").write_bytes((run.stage("vocab").path / "vocab.txt").read_bytes())
    (tmp_path / "ready").symlink_to(run.stage("samples_256").path)
    for path in small_data.iterdir():
        (tmp_path / path.name).symlink_to(path)
    settings = ('data.vocab="vocab.txt"', 'phase1.samples="ready"', "phase1.seq_len=256", 'phases=["phase1"]')
    words = [word for setting in settings for word in ("--set", setting)]
    done = submit(tmp_path / "run", tmp_path, *words, "--stages", "samples_256")
    one_line(done, 3, "holds single texts and no pairs")
