"""What a step computes: the loss of one big batch as transformers computes it, and the same bits from whole commands
on any number of ranks. How the bits fare through kills is in tests/faults/histories.py.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from faults import training
from faults.outcome import STEPS
from faults.starts import SAMPLES, Start, begun, in_lanes
from pipeline.pretrain.data import PretrainingData
from pipeline.run.rundir import RunDir
from support.running import call, digests, submit

pytestmark = [pytest.mark.slow]

GLOBAL_BATCH = 9
EVERY_STEP = {
    "steps": STEPS,
    "global_batch": GLOBAL_BATCH,
    "checkpoint_every": 1,
    "keep_checkpoints": STEPS,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "reduction": "fast",
}
# (loss_mean, micro_batch, ranks): one big batch; the last micro-batch shorter; a rank without any micro-batch
CASES = (
    ("global", 9, 1),
    ("global", 2, 2),
    ("global", 4, 3),
    ("global", 1, 4),
    ("global", 4, 5),
    ("micro", 9, 1),
    ("micro", 2, 2),
    ("micro", 4, 3),
)


# ---------------------------------------------------------------- losses beside transformers


def trained(case: tuple[str, int, int], folder: Path) -> None:
    """A training of which every step is kept, in a warm process."""
    loss_mean, micro_batch, world = case
    run = begun(folder / "run", **EVERY_STEP, loss_mean=loss_mean, micro_batch=micro_batch)
    start = Start(run, world)
    assert start.wait(120)
    assert set(start.codes.values()) == {0}, (run.path / "ranks.log").read_text()


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, int], RunDir]:
    folder = tmp_path_factory.mktemp("exactness")
    in_lanes(trained, CASES, folder, 300)
    return {case: RunDir(folder / str(number) / "run") for number, case in enumerate(CASES)}


def padded(data: PretrainingData, positions: Any) -> dict[str, torch.Tensor]:
    """The samples as anybody would write them down: one padded row each, -100 where nothing is to be predicted."""
    found = data.read(positions)
    shape = (len(positions), training.SEQ_LEN)
    batch = {name: np.zeros(shape, np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    labels = np.full(len(found.tokens), -100)
    labels[found.positions] = found.labels
    batch["labels"] = np.full(shape, -100)
    ends = found.lengths.cumsum()
    for row, (end, length, b_start) in enumerate(zip(ends, found.lengths, found.b_start, strict=True)):
        batch["input_ids"][row, :length] = found.tokens[end - length : end]
        batch["attention_mask"][row, :length] = 1
        batch["token_type_ids"][row, b_start:length] = 1
        batch["labels"][row, :length] = labels[end - length : end]
    tensors = {name: torch.from_numpy(values) for name, values in batch.items()}
    return {**tensors, "next_sentence_label": torch.from_numpy(found.nsp)}


def oracle(run: RunDir, step: int) -> transformers.BertForPreTraining:
    """transformers' model in float64 with the weights after ``step``."""
    model = training.MODEL
    config = transformers.BertConfig(
        vocab_size=training.VOCAB,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        intermediate_size=model.intermediate_size,
        max_position_embeddings=model.max_position_embeddings,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    theirs = transformers.BertForPreTraining(config)
    weights = load_file(run.stage(training.STAGE).path / f"attempts/0001/step-{step:08d}/weights.safetensors")
    left_out = theirs.load_state_dict(weights, strict=False)
    assert not left_out.unexpected_keys
    assert all("decoder" in key for key in left_out.missing_keys)  # tied to the embeddings
    theirs.tie_weights()
    theirs.bert.embeddings.word_embeddings.padding_idx = None  # [PAD] among the random tokens is a token like others
    return theirs.double().train()


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_a_step_has_the_loss_and_gradient_that_transformers_computes(trainings, case):
    """``global``: transformers' own loss of the whole batch at once; ``micro``: the mean over micro-batches."""
    loss_mean, micro_batch, _ = case
    run = trainings[case]
    train = training.changed(training.TRAIN, {"masking": "dynamic"})
    phase = training.changed(training.PHASE, {"global_batch": GLOBAL_BATCH})
    data = PretrainingData(run.stage(SAMPLES).path, "train", phase, train)
    differs = 0.0
    for line in run.stage(training.STAGE).metrics():
        step = line["step"]
        if "loss" not in line or step == 1:
            continue
        theirs = oracle(run, step - 1)
        first = (step - 1) * GLOBAL_BATCH
        size = GLOBAL_BATCH if loss_mean == "global" else micro_batch
        cuts = [*range(first, first + GLOBAL_BATCH, size), first + GLOBAL_BATCH]
        parts = [np.arange(*pair) for pair in itertools.pairwise(cuts)]
        loss = torch.stack([theirs(**padded(data, positions)).loss for positions in parts]).mean()
        loss.backward()
        norm = torch.stack([parameter.grad.norm() for parameter in theirs.parameters()]).norm()
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-6), step
        assert line["mlm_loss"] + line["nsp_loss"] == pytest.approx(line["loss"], rel=1e-12), step
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-5), step
        whole = theirs(**padded(data, np.arange(first, first + GLOBAL_BATCH))).loss.item()
        differs = max(differs, abs(loss.item() / whole - 1))
    if loss_mean == "micro" and micro_batch < GLOBAL_BATCH:
        assert differs > 1e-3  # the two means are not the same thing


# ---------------------------------------------------------------- whole commands


def test_the_threads_of_the_environment_change_no_bit(tmp_path):
    """The profile alone says with how many threads a rank computes."""
    found = set()
    for threads in "1", "8":
        run = begun(tmp_path / threads / "run", **EVERY_STEP | {"steps": 4}, hidden_size=48)
        environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        done = call("worker", run.path, training.STAGE, env=environment)
        assert done.returncode == 0, done.stderr
        found.add(digests(run.path)[training.STAGE, 4])
    assert len(found) == 1, found


def test_any_number_of_ranks_gives_the_same_bits(small_run, small_data, tmp_path):
    """``train.reduction = "tree"`` with dropout: 3 micro-batches a step on 1, 2 and 5 ranks."""
    found = {}
    for ranks in (1, 2, 5):
        run = tmp_path / str(ranks)
        shutil.copytree(small_run, run, symlinks=True, ignore=shutil.ignore_patterns("phase*", "export", "old"))
        words = ("--stages", "phase1", "--processes", ranks, "--set", "train.reduction=tree")
        done = submit(run, small_data, *words)
        assert done.returncode == 0, done.stdout + done.stderr
        settings = json.loads((run / "run.json").read_text())["recipe"]
        assert settings["model"]["hidden_dropout_prob"] > 0
        found[ranks] = digests(run)["phase1", 24]
    assert len(set(found.values())) == 1, found
