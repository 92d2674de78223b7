"""Held-out figures tell knowing from copying, and their control tells order from company."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from faults import training
from pipeline.bert.packing import Batch, layout
from pipeline.engine.feed import on_device
from pipeline.engine.ranks import Ranks
from pipeline.engine.task import MicroBatch
from pipeline.pretrain.data import MaskedSamples, PretrainingData
from pipeline.pretrain.evaluate import WordShares, baselines, evaluate, heldout, marked, ratio_and_error, shuffled
from pipeline.report.learnt import context_in_words, worth_in_words

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


SPECIAL = {"cls": 2, "sep": 3}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[MaskedSamples, MicroBatch, WordShares]:
    folder: Path = training.make_samples(tmp_path_factory.mktemp("samples") / "samples", rows=400)
    train = PretrainingData(folder, "train", training.PHASE, training.TRAIN)
    test = PretrainingData(folder, "test", training.PHASE, dataclasses.replace(training.TRAIN, masking="static"))
    shares = WordShares.of(train)
    (masked,) = heldout(test, 400, 400)
    arrays = layout(masked.tokens, masked.lengths, masked.b_start, training.SEQ_LEN)
    labels, nsp = masked.labels.astype(np.int32), masked.nsp.astype(np.int32)
    arrays = {**arrays, "masked": arrays["slot"][masked.positions], "labels": labels, "nsp": nsp}
    micro_batch = MicroBatch(masked.ids, arrays, (), {"seq_len": training.SEQ_LEN})
    return masked, marked(micro_batch, masked, shares.mask_id), shares


def test_a_model_without_context_lies_below_the_unigram_loss_and_gains_nothing_at_mask(parts) -> None:
    masked, micro_batch, shares = parts
    figures = evaluate(WithoutContext(shares), [micro_batch], shares, "fp32", ALONE)
    without = baselines([masked], shares)
    assert figures["eval_mlm_loss"] < without["unigram_loss"] - 0.1  # what looked like context
    assert figures["eval_mlm_loss"] >= without["context_free_loss"] - 0.02
    assert figures["eval_mask_gain"] == pytest.approx(0.0, abs=1e-3)
    assert figures["eval_mask_loss"] == pytest.approx(without["unigram_mask_loss"], abs=1e-3)
    assert figures["eval_kept_loss"] < without["unigram_kept_loss"] - 1 < without["unigram_kept_loss"]
    assert figures["eval_random_loss"] > without["unigram_random_loss"]
    assert (figures["eval_kept_accuracy"], figures["eval_random_accuracy"]) == (1.0, 0.0)
    assert figures["eval_nsp_accuracy"] == pytest.approx(1 - masked.nsp.mean())  # always says 0


def test_knowing_hidden_words_is_seen_at_mask_with_its_error(parts) -> None:
    _, micro_batch, shares = parts
    labels = torch.from_numpy(micro_batch.arrays["labels"]).long()
    figures = evaluate(WithoutContext(shares, labels), [micro_batch], shares, "fp32", ALONE)
    assert figures["eval_mask_gain"] > 1.0
    assert 0 < figures["eval_mask_gain_se"] < 0.1


def test_no_model_without_context_does_better_than_the_context_free_loss() -> None:
    """Counting is the best that one can do without context: its entropy is what the formula says."""
    dice, words, draws = np.random.default_rng(0), 12, 400_000
    shares = WordShares(np.log(dice.dirichlet(np.full(words, 0.5))), mask_id=words)
    labels = dice.choice(words, draws, p=np.exp(shares.log))
    fate = dice.random(draws)
    seen = np.where(fate < 0.8, words, np.where(fate < 0.9, labels, dice.integers(0, words, draws)))
    together = np.zeros((words + 1, words))
    np.add.at(together, (seen, labels), 1)
    least = -(together * np.log(np.maximum(together, 1) / together.sum(1, keepdims=True))).sum() / draws
    hidden = seen == words
    visible = shares.context_free_losses(labels[~hidden], seen[~hidden]).sum()
    assert (visible - shares.log[labels[hidden]].sum()) / draws == pytest.approx(least, abs=2e-3)


def test_every_error_is_that_of_drawing_the_samples_again(parts) -> None:
    """Total loss, accuracy at [MASK] and NSP: the spread over bootstrapped samples, one sample a micro-batch."""
    masked, micro_batch, shares = parts
    model = WithoutContext(shares)
    figures = evaluate(model, [micro_batch], shares, "fp32", ALONE)
    seen, sample = masked.tokens[masked.positions], micro_batch.arrays["sample"]
    inputs = on_device(micro_batch, ALONE.device)
    logits, _ = model(Batch.of(inputs), inputs["masked"])
    losses = functional.cross_entropy(logits, inputs["labels"].long(), reduction="none").numpy()
    samples = len(masked.lengths)
    weights = np.random.default_rng(2).multinomial(samples, np.full(samples, 1 / samples), 2000)
    each = weights[:, sample]
    assert figures["eval_mlm_loss_se"] == pytest.approx(((each * losses).sum(1) / each.sum(1)).std(), rel=0.15)
    right = (1 - masked.nsp) @ weights.T / samples
    assert figures["eval_nsp_accuracy_se"] == pytest.approx(right.std(), rel=0.1)
    hidden = each * (seen == shares.mask_id)
    common = (hidden * (masked.labels == shares.log.argmax())).sum(1) / hidden.sum(1)
    assert figures["eval_mask_accuracy_se"] == pytest.approx(common.std(), rel=0.25)


def test_the_error_of_a_gain_is_that_of_whole_samples() -> None:
    """Against drawing the samples again and again; words of a sample share their luck."""
    dice = np.random.default_rng(1)
    words = dice.integers(1, 9, 500)
    gain = words * (1.0 + dice.normal(size=500))
    mean, error = ratio_and_error(
        words.sum(), gain.sum(), (gain**2).sum(), (gain * words).sum(), (words**2).sum(), len(words)
    )
    again = [gain[c].sum() / words[c].sum() for c in dice.integers(0, 500, (2000, 500))]
    assert mean == pytest.approx(gain.sum() / words.sum())
    assert error == pytest.approx(np.std(again), rel=0.1)


def test_shuffling_keeps_words_and_predicted_places(parts) -> None:
    masked, _, _ = parts
    other = shuffled(masked, SPECIAL)
    fixed = np.isin(masked.tokens, list(SPECIAL.values()))
    fixed[masked.positions] = True
    assert (other.tokens[fixed] == masked.tokens[fixed]).all()
    ends = np.cumsum(masked.lengths)[:-1]
    for before, after in zip(np.split(masked.tokens, ends), np.split(other.tokens, ends), strict=True):
        assert sorted(before) == sorted(after)
    assert (other.tokens != masked.tokens)[~fixed].mean() > 0.7
    assert (shuffled(masked, SPECIAL).tokens == other.tokens).all()


@pytest.mark.parametrize(
    ("gain", "error", "control", "words"),
    [
        (2.0, 0.03, 0.4, "uses context"),
        (2.0, 0.03, 1.6, "hardly their order"),
        (0.05, 0.03, 0.0, "no more than chance."),
        (-0.2, 0.03, None, "it is 0.20 ± 0.03 nats worse than word counts."),
        (2.0, 0.03, None, "comes at the end"),
        (None, None, None, "not measured"),
    ],
)
def test_the_verdict_needs_the_gain_and_its_control(gain, error, control, words) -> None:
    figures = {"eval_mask_gain": gain, "eval_mask_gain_se": error, "shuffled_mask_gain": control}
    assert words in context_in_words(figures)


@pytest.mark.parametrize(("without", "words"), [(70.7, "no difference that shows"), (60.0, "adds 10.5 ± 1.5 points")])
def test_pretraining_is_worth_what_it_adds_beyond_its_error(without, words) -> None:
    scores = {"dataset": "d", "ranked_by": "accuracy", "examples": 2113, "scores": {"accuracy": 70.5}}
    assert words in worth_in_words(scores, {"scores": {"accuracy": without}})
    assert "not measured" in worth_in_words(scores, {})
