"""Held-out loss and accuracies during pretraining, and the unigram cross-entropy they are compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from pipeline.bert.heads import correct
from pipeline.bert.packing import Batch
from pipeline.config import Precision
from pipeline.engine.feed import on_device
from pipeline.engine.precision import autocast_for
from pipeline.engine.ranks import Ranks
from pipeline.engine.task import MicroBatch
from pipeline.pretrain.data import MaskedSamples, PretrainingData

UNIGRAM_TOKENS = 20_000_000  # training tokens counted for the unigram line


@dataclass(frozen=True)
class Evaluation:
    """Held-out figures in nats per masked token and in shares of 1.

    ``eval_mask_gain`` is how far the loss lies below the word counts' at the positions that show [MASK] alone, with
    its standard error: a tenth of all masked positions keep their word, and a model that does nothing but copy
    these looks as if it knew something. Both are None where no position shows [MASK].
    """

    eval_mlm_loss: float
    eval_mlm_accuracy: float
    eval_nsp_accuracy: float
    eval_mask_gain: float | None
    eval_mask_gain_se: float | None


def heldout(data: PretrainingData, samples: int, micro_batch: int) -> list[MaskedSamples]:
    """The first ``samples`` held-out samples of a fixed order, masked once, in micro-batches."""
    count = min(samples, data.order.total)
    return [data.read(np.arange(start, min(start + micro_batch, count))) for start in range(0, count, micro_batch)]


def evaluate(
    model: nn.Module,
    micro_batches: Sequence[MicroBatch],
    shares: WordShares,
    precision: Precision,
    ranks: Ranks,
) -> Evaluation:
    """Evaluate ``micro_batches``, shared among the ranks; every rank returns the same figures."""
    sums = torch.zeros(8, dtype=torch.float64, device=ranks.device)
    model.eval()
    with torch.inference_mode(), autocast_for(precision, ranks.device):
        for micro_batch in micro_batches[ranks.rank :: ranks.world_size]:
            ranks.alive("working")
            inputs = on_device(micro_batch, ranks.device)
            labels, nsp = inputs["labels"], inputs["nsp"]
            mlm_logits, nsp_logits = model(Batch.of(inputs), inputs["masked"])
            losses = functional.cross_entropy(mlm_logits.float(), labels.long(), reduction="none").double()
            # What the word counts lose at the same positions; only those that show [MASK] count.
            of_counts = torch.from_numpy(-shares.log[micro_batch.arrays["labels"]]).to(ranks.device)
            hidden = inputs["tokens"].view(-1)[inputs["masked"]] == shares.mask_id
            gains = torch.where(hidden, of_counts - losses, 0.0)
            counts = (sums.new_tensor(len(labels)), sums.new_tensor(len(nsp)))
            right = (correct(mlm_logits, labels).double(), correct(nsp_logits, nsp).double())
            sums += torch.stack([losses.sum(), *right, *counts, gains.sum(), gains.square().sum(), hidden.sum()])
    model.train()
    mlm_sum, mlm_correct, nsp_correct, tokens, pairs, gain, squares, shown = ranks.sum(sums).tolist()
    mean = gain / shown if shown else None
    error = None if mean is None or shown < 2 else math.sqrt(max(0.0, squares / shown - mean**2) / (shown - 1))
    return Evaluation(mlm_sum / tokens, mlm_correct / tokens, nsp_correct / pairs, mean, error)


@dataclass(frozen=True)
class WordShares:
    """``log [V]``: logarithms of the training tokens' shares, one added to each count; and the id of [MASK].

    They are all that a model without context can know.
    """

    log: NDArray[np.float64]
    mask_id: int

    @classmethod
    def of(cls, train: PretrainingData) -> WordShares:
        """Counted over the first tokens of the training shards."""
        counts = np.ones(train.manifest.vocab_size, np.float64)
        left = UNIGRAM_TOKENS
        for shard in train.shards:
            part = shard.tokens[:left]
            counts += np.bincount(part, minlength=len(counts))
            left -= len(part)
            if left <= 0:
                break
        special = train.manifest.special
        counts[[special["cls"], special["sep"]]] = 0  # never a target
        return cls(np.log(np.maximum(counts, 1.0) / counts.sum()), special["mask"])

    def loss(self, labels: NDArray[np.integer]) -> float:
        """Cross-entropy in nats of held-out masked tokens under these shares, the unigram loss."""
        return float(-self.log[labels].mean())
