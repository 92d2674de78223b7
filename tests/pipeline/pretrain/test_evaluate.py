"""Held-out figures tell knowing from copying: a model that cannot see context gains nothing at [MASK]."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from faults import training
from pipeline.bert.packing import Batch, layout
from pipeline.engine.ranks import Ranks
from pipeline.engine.task import MicroBatch
from pipeline.pretrain.data import PretrainingData
from pipeline.pretrain.evaluate import WordShares, evaluate, heldout

ALONE = Ranks(0, 1, None, torch.device("cpu"))


class WithoutContext(nn.Module):
    """Says the word counts where it sees [MASK], and the word itself where it sees one (right nine times in ten)."""

    def __init__(self, shares: WordShares, knows: Tensor | None = None) -> None:
        super().__init__()
        self.shares, self.knows = shares, knows

    def forward(self, batch: Batch, masked: Tensor) -> tuple[Tensor, Tensor]:
        seen = batch.tokens.view(-1)[masked].long()
        logits = torch.from_numpy(self.shares.log).float().expand(len(masked), -1).clone()
        visible = seen != self.shares.mask_id
        logits[visible, seen[visible]] += 4.0
        if self.knows is not None:  # one that knows the hidden words
            logits[torch.arange(len(masked)), self.knows] += 2.0
        return logits, torch.zeros(len(batch.first), 2)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[MicroBatch], WordShares]:
    folder: Path = training.make_samples(tmp_path_factory.mktemp("samples") / "samples", rows=400)
    train = PretrainingData(folder, "train", training.PHASE, training.TRAIN)
    static = dataclasses.replace(training.TRAIN, masking="static")
    test = PretrainingData(folder, "test", training.PHASE, static)
    batches = []
    for masked in heldout(test, 400, 400):
        arrays = layout(masked.tokens, masked.lengths, masked.b_start, training.SEQ_LEN)
        places = arrays["slot"][masked.positions]
        labels, nsp = masked.labels.astype(np.int32), masked.nsp.astype(np.int32)
        arrays = {**arrays, "masked": places, "labels": labels, "nsp": nsp}
        batches.append(MicroBatch(masked.ids, arrays, (), {"seq_len": training.SEQ_LEN}))
    return batches, WordShares.of(train)


def test_a_model_without_context_lies_below_the_unigram_loss_and_gains_nothing_at_mask(parts) -> None:
    batches, shares = parts
    figures = evaluate(WithoutContext(shares), batches, shares, "fp32", ALONE)
    unigram = shares.loss(batches[0].arrays["labels"])
    assert figures.eval_mlm_loss < unigram - 0.1  # what looked like context
    assert figures.eval_mask_gain == pytest.approx(0.0, abs=1e-3)


def test_knowing_hidden_words_is_seen_at_mask_with_its_error(parts) -> None:
    batches, shares = parts
    labels = torch.from_numpy(batches[0].arrays["labels"]).long()
    figures = evaluate(WithoutContext(shares, labels), batches, shares, "fp32", ALONE)
    assert figures.eval_mask_gain is not None
    assert figures.eval_mask_gain_se is not None
    assert figures.eval_mask_gain > 1.0
    assert 0 < figures.eval_mask_gain_se < 0.1
