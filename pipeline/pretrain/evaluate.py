"""Held-out loss and accuracies during pretraining, and the unigram cross-entropy they are compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from pipeline.bert.heads import BertForPreTraining, pretraining_loss_sums
from pipeline.bert.packing import pack
from pipeline.node.distributed import Group
from pipeline.node.heartbeat import Where
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


def evaluate(
    model: BertForPreTraining,
    batches: list[MaskedSamples],
    *,
    rank: int,
    world_size: int,
    group: Group,
    autocast: torch.autocast,
    alive: Callable[[Where], None] = lambda where: None,
) -> Evaluation:
    """Evaluate ``batches``, shared among the ranks; every rank returns the same figures. ``alive`` is told of it."""
    device = next(model.parameters()).device
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    model.eval()
    with torch.inference_mode(), autocast:
        for found in batches[rank::world_size]:
            alive("working")
            batch = pack(found.tokens, found.lengths, found.b_start, model.config.max_position_embeddings).to(device)
            slots = batch.row_position(torch.from_numpy(found.positions).to(device))
            labels, nsp = (torch.from_numpy(values).to(device) for values in (found.labels, found.nsp))
            mlm_logits, nsp_logits = model(batch, slots)
            mlm_sum, _, mlm_correct, nsp_correct = pretraining_loss_sums(mlm_logits, labels, nsp_logits, nsp)
            sums += torch.stack(
                [
                    mlm_sum.double(),
                    mlm_correct.double(),
                    nsp_correct.double(),
                    sums.new_tensor(len(labels)),
                    sums.new_tensor(len(nsp)),
                ]
            )
    model.train()
    if group is not None:
        alive("waiting")
        dist.all_reduce(sums, group=group)
        alive("working")
    mlm_sum, mlm_correct, nsp_correct, tokens, pairs = sums.tolist()
    return Evaluation(mlm_sum / tokens, mlm_correct / tokens, nsp_correct / pairs)


def unigram_loss(train: PretrainingData, batches: list[MaskedSamples]) -> float:
    """Cross-entropy in nats of the held-out masked tokens under the training tokens' frequencies (plus one each).

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
    labels = np.concatenate([found.labels for found in batches])
    return float(-log_share[labels].mean())
