"""`bench train` measures what it says: rows for every combination, beside transformers, on several real processes."""

from __future__ import annotations

import json
import math

import pytest
import torch

from pipeline.bench.gpu_subject import invent
from pipeline.bench.train import our_step, their_step
from pipeline.bench.turns import FIGURES
from pipeline.bert.config import BertConfig, shape_of
from pipeline.config import load_recipe
from support.running import call

CPU = torch.device("cpu")
QUICK = ("--recipe", "tiny", "--phase", "phase1", "--steps", "2", "--warmup", "1", "--threads", "1")


@pytest.mark.slow
def test_every_row_has_its_keys_and_a_ratio_that_is_one_of_its_rows():
    done = call("bench", "train", *QUICK, "--precision", "bf16,fp32", "--micro-batch", "bf16=4,fp32=2", "--gpus", "1,2",
                "--accumulation", "2", "--beside", "transformers", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["environment"]["torch"] == torch.__version__
    assert figures["model"] == shape_of(load_recipe("tiny").model)
    rows = {(row["variant"], row["precision"], row["gpus"]): row for row in figures["rows"]}
    assert len(rows) == 8
    for (_, precision, gpus), row in rows.items():
        assert {"variant", "phase", *FIGURES} <= set(row)
        assert (row["micro_batch"], row["accumulation"], row["seq_len"]) == ({"bf16": 4, "fp32": 2}[precision], 2, 32)
        assert row["tokens_per_s"] <= row["padded_tokens_per_s"]
        other = rows["transformers", precision, gpus]["sequences_per_s"]
        assert row["ratio_vs_transformers"] == pytest.approx(row["sequences_per_s"] / other, rel=0.01, abs=0.001)


@pytest.mark.slow
def test_both_train_the_same_samples_from_loss_of_chance_on_down():
    """What is timed learns: after steps on the same samples, both know them better than chance."""
    recipe = load_recipe("tiny")
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                        max_position_embeddings=32, hidden_dropout_prob=0.0,
                        attention_probs_dropout_prob=0.0)  # fmt: skip
    samples = [invent(8, 32, 64, seed) for seed in range(2)]
    ours = our_step(recipe, config, "fp32", samples, 2, CPU)
    theirs = their_step(config, "fp32", samples, 2, CPU)
    for step in (ours, theirs):
        losses = [step(number, 3e-3) for number in range(60)]
        assert losses[0] == pytest.approx(math.log(64) + math.log(2), rel=0.1)
        assert losses[-1] < losses[0] - 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["--precision", "tf32"], 7, "precision = tf32 needs a CUDA device"),
        (["--phase", "phase9"], 2, "--phase phase9: recipe tiny has phase1, phase2, phase3"),
        (["--micro-batch", "fp16=8"], 2, "give a number, or one for each precision"),
        (["--batch-per-gpu", "9", "--micro-batch", "2"], 2, "no multiple of the micro-batch 2"),
        (["--lengths", "/nowhere"], 3, "/nowhere/manifest.json is missing"),
    ],
)
def test_what_cannot_be_measured_is_said_first(words, code, line):
    done = call("bench", "train", "--recipe", "tiny", "--steps", "1", *words)
    assert (done.returncode, done.stdout) == (code, "")
    assert line in done.stderr
