"""Logits of all samples of a file, computed by the ranks together."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.bert.heads import Model
from pipeline.bert.packing import Batch, arrangement, pack
from pipeline.config import FinetuneConfig
from pipeline.engine.precision import autocast_for
from pipeline.engine.ranks import Ranks
from pipeline.errors import NumericalError
from pipeline.finetune.problems import Logits, Problem
from pipeline.finetune.samples import Samples


def predict(model: Model, problem: Problem, samples: Samples, config: FinetuneConfig, ranks: Ranks) -> list[Logits]:
    """Logits of every sample, in their order: ``[tokens, 2]`` or ``[labels]`` each, fp32, the same on every rank.

    Samples of like length are computed together. Which ones follows from the file alone and not from the ranks, which
    take turns. NumericalError when a logit is not finite.
    """
    widths = problem.widths(samples)  # logits of each sample
    ends = np.cumsum(widths)
    logits = np.zeros(int(widths.sum()), np.float32)
    by_length = np.argsort(-samples.lengths, kind="stable")
    micro_batches = [by_length[i : i + config.micro_batch] for i in range(0, len(samples), config.micro_batch)]
    model.eval()
    with torch.inference_mode():
        for members in micro_batches[ranks.rank :: ranks.world_size]:
            ranks.alive("working")
            with autocast_for(config.precision, ranks.device):
                outputs = model(packed(samples.take(members), ranks.device, config.max_seq_len))
            rows = problem.rows(outputs).float().cpu().numpy()
            for row, member in zip(rows, members.tolist(), strict=True):
                logits[ends[member] - widths[member] : ends[member]] = row.reshape(-1)[: widths[member]]
    # Each place is filled by one rank and zero on the others: their sum is exact.
    logits = ranks.sum(torch.from_numpy(logits).to(ranks.device)).cpu().numpy()
    if not np.isfinite(logits).all():
        member = int(np.searchsorted(ends, np.flatnonzero(~np.isfinite(logits))[0], side="right"))
        raise NumericalError(f"prediction of sample {member} is not finite; try --precision fp32")
    return [problem.shaped(part) for part in np.split(logits, ends[:-1])]


def packed(samples: Samples, device: torch.device, max_seq_len: int) -> Batch:
    """The samples as a batch on ``device``, as it likes to predict from samples of at most ``max_seq_len`` tokens."""
    arranged = arrangement(device.type, max_seq_len, predicting=True)
    return pack(samples.tokens, samples.lengths, samples.b_start, max_seq_len, arranged).to(device)
