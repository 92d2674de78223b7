"""`bench finetune` times the engine's own steps, and transformers' that compute the same on the same samples."""

from __future__ import annotations

import argparse
import dataclasses
import json

import numpy as np
import pytest
import torch

from pipeline.bench.finetune import prepare
from pipeline.bench.inputs import texts_of, write_task
from pipeline.bench.turns import FIGURES
from pipeline.bert.config import shape_of
from pipeline.config import load_recipe
from pipeline.engine.ranks import Ranks
from pipeline.finetune.glue import TASKS
from pipeline.finetune.options import defaults
from pipeline.finetune.squad import read_squad
from pipeline.finetune.table import read_table
from support.running import call

ONE = Ranks(0, 1, None, torch.device("cpu"))
SMALL = ("model.hidden_dropout_prob=0.0", "model.attention_probs_dropout_prob=0.0", "model.hidden_size=32",
         "model.num_attention_heads=2", "model.intermediate_size=64", "data.vocab_size=400")  # fmt: skip


def work(task: str, mode: str, lengths: str, seq_len: int = 32, **options: object):
    """What one process times, both variants."""
    given = {"task": task, "text": None, "model": None, "warmup": 1, "steps": 30, "beside": "transformers", **options}
    config = defaults(task, dataset="", max_query_length=8)
    asked = {"mode": mode, "lengths": lengths, "precision": "fp32", "gpus": 1, "micro_batch": 4, "accumulation": 2}
    recipe = load_recipe("tiny", SMALL)
    return prepare(recipe, dataclasses.replace(config, max_seq_len=seq_len), argparse.Namespace(**given), asked, ONE)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["squad", "mrpc", "sst2"])
@pytest.mark.parametrize("lengths", ["full", "invented"])
def test_both_train_the_same_model_on_the_same_samples(task: str, lengths: str):
    seq_len = 32 if lengths == "full" else 64
    exact = not (task == "squad" and lengths == "invented")  # theirs has a loss of what stands behind a sample's end
    with work(task, "train", lengths, seq_len) as made:
        ours, theirs = (made.steps[name] for name in ("ours", "transformers"))
        first, other = ours(0, 1e-3), theirs(0, 1e-3)
        assert first == pytest.approx(float(other), rel=1e-5 if exact else 0.2)
        for number in range(1, 31):
            last, other = ours(number, 1e-3), theirs(number, 1e-3)
        assert last < first - 0.03
        assert last == pytest.approx(
            float(other), rel=0.1 if exact else 0.2
        )  # two optimizers: epsilon, and what decays
        tokens = [made.holds(number)[0] for number in range(8)]
        assert made.sequences == 8
        assert (tokens == [8 * seq_len] * 8) == (lengths == "full")
        assert max(tokens) <= 8 * seq_len


@pytest.mark.slow
@pytest.mark.parametrize("task", ["squad", "mrpc", "sst2"])
def test_both_answer_the_same(task: str):
    with work(task, "eval", "full") as made:
        ours, theirs = (made.steps[name](0, 0.0) for name in ("ours", "transformers"))
        assert len(ours) == len(theirs) == made.sequences == 16
        assert np.mean([a == b for a, b in zip(ours, theirs, strict=True)]) >= (0.8 if task == "squad" else 1)
        assert made.holds(0)[0] == 16 * 32


def test_texts_of_a_file_are_taken_from_all_over_it_and_again(tmp_path):
    (tmp_path / "pairs.tsv").write_text("Quality\t#1 String\t#2 String\n1\ta\tb\n0\tc\td\n")
    texts = texts_of(tmp_path / "pairs.tsv", "mrpc", 4)
    assert texts == [("a", "b"), ("a", "b"), ("c", "d"), ("c", "d")]
    write_task(tmp_path / "made.jsonl", "mrpc", texts)
    assert read_table(tmp_path / "made.jsonl", TASKS["mrpc"]).texts == (["a", "a", "c", "c"], ["b", "b", "d", "d"])
    write_task(tmp_path / "made.json", "squad", [("who?", " \tBob did. So."), ("what?", "That."), ("why?", " ")])
    made = read_squad(tmp_path / "made.json")
    assert made.contexts == [" \tBob did. So.", "That.", " "]
    assert [question.answers for question in made.questions] == [(("Bob", 2),), (("That.", 0),), (("", 0),)]
    assert texts_of(tmp_path / "made.json", "squad", 1) == [("who?", " \tBob did. So.")]


@pytest.mark.slow
def test_the_command_has_a_row_for_each_combination():
    done = call("bench", "finetune", "squad", "--recipe", "tiny", "--seq-len", "32", "--steps", "2", "--warmup", "1",
                "--threads", "1", "--precision", "bf16,fp32", "--micro-batch", "bf16=4,fp32=2", "--gpus", "1,2",
                "--beside", "transformers", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["environment"]["torch"] == torch.__version__
    assert figures["model"] == shape_of(load_recipe("tiny").model)
    rows = {(row["variant"], row["mode"], row["precision"], row["gpus"]): row for row in figures["rows"]}
    assert len(rows) == 16
    for (_, mode, precision, gpus), row in rows.items():
        assert {"task", "lengths", "recipe", *FIGURES} <= set(row)
        size = {"bf16": 4, "fp32": 2}[precision]
        assert (row["task"], row["lengths"], row["recipe"], row["seq_len"]) == ("squad", "full", "tiny", 32)
        assert (row["micro_batch"], row["accumulation"]) == (size, 1 if mode == "train" else None)
        assert (row["sequences"], row["mean_tokens"]) == (size * gpus * (1 if mode == "train" else 4), 32)
        other = rows["transformers", mode, precision, gpus]["sequences_per_s"]
        assert row["ratio_vs_transformers"] == pytest.approx(row["sequences_per_s"] / other, rel=0.01, abs=0.001)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code", "lines"),
    [
        (["--mode", "test", "--lengths", "real", "--text", "x", "--seq-len", "9000", "--micro-batch", "0"], 2,
         ["--mode test: choose from train, eval", "--lengths real: --text x has lengths of its own; give one of them",
          "--text x: needs the vocabulary of a --model FOLDER", "--seq-len 9000: 16 to 512, the positions of the model",
          "'0': give a number, or one for each precision, as tf32=128,fp16=256"]),
        (["--lengths", "real"], 2, ["--lengths real: choose from full, invented"]),
        (["--precision", "tf32"], 7, ["precision = tf32 needs a CUDA device; use fp32 or bf16 on a CPU"]),
        (["--model", "/nowhere"], 4, ["/nowhere/config.json cannot be read: No such file or directory"]),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_said_first(words: list[str], code: int, lines: list[str]):
    done = call("bench", "finetune", "mrpc", "--recipe", "tiny", *words)
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (code, "", lines)
