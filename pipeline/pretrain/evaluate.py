"""Held-out loss and accuracies during pretraining, and the unigram cross-entropy they are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.bert.heads import correct, pretraining_loss_sums
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
    """Held-out figures in nats per masked token and in shares of 1."""

    eval_mlm_loss: float
    eval_mlm_accuracy: float
    eval_nsp_accuracy: float


def heldout(data: PretrainingData, samples: int, micro_batch: int) -> list[MaskedSamples]:
    """The first ``samples`` held-out samples of a fixed order, masked once, in micro-batches."""
    count = min(samples, data.order.total)
    return [data.read(np.arange(start, min(start + micro_batch, count))) for start in range(0, count, micro_batch)]


def evaluate(model: nn.Module, micro_batches: Sequence[MicroBatch], precision: Precision, ranks: Ranks) -> Evaluation:
    """Evaluate ``micro_batches``, shared among the ranks; every rank returns the same figures."""
    sums = torch.zeros(5, dtype=torch.float64, device=ranks.device)
    model.eval()
    with torch.inference_mode(), autocast_for(precision, ranks.device):
        for micro_batch in micro_batches[ranks.rank :: ranks.world_size]:
            ranks.alive("working")
            inputs = on_device(micro_batch, ranks.device)
            labels, nsp = inputs["labels"], inputs["nsp"]
            mlm_logits, nsp_logits = model(Batch.of(inputs), inputs["masked"])
            mlm_sum, _ = pretraining_loss_sums(mlm_logits, labels, nsp_logits, nsp)
            mlm_correct, nsp_correct = correct(mlm_logits, labels), correct(nsp_logits, nsp)
            counts = (sums.new_tensor(len(labels)), sums.new_tensor(len(nsp)))
            sums += torch.stack([mlm_sum.double(), mlm_correct.double(), nsp_correct.double(), *counts])
    model.train()
    mlm_sum, mlm_correct, nsp_correct, tokens, pairs = ranks.sum(sums).tolist()
    return Evaluation(mlm_sum / tokens, mlm_correct / tokens, nsp_correct / pairs)


def unigram_loss(train: PretrainingData, labels: NDArray[np.integer]) -> float:
    """Cross-entropy in nats of held-out masked tokens ``labels`` under the training tokens' shares (one added each).

    What a model that knows word counts but no context reaches.
    """
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
    log_share = np.log(np.maximum(counts, 1.0) / counts.sum())
    return float(-log_share[labels].mean())
