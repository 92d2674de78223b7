"""How fast this machine trains a recipe, found out in seconds: for whoever is about to begin."""

from __future__ import annotations

from dataclasses import replace

import torch

from pipeline.bench.gpu_subject import Subject, best, invent, seconds_of
from pipeline.config import Recipe
from pipeline.launch.estimate import Rates, config_of

SAMPLES = 8  # at most, of a micro-batch that is timed
SPEND_S = 0.5  # on each phase, or one micro-batch


def rates(recipe: Recipe, base: Rates, threads: int) -> Rates:
    """Those of one process: forward and backward of a micro-batch of each phase, on its GPU or ``threads`` threads."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(threads)
    config, rates = config_of(recipe), {}
    for name, phase in recipe.phases.items():
        samples = invent(min(SAMPLES, phase.micro_batch or SAMPLES), phase.seq_len, config.vocab_size, seed=1)
        subject = Subject(device, config, best(device, precision=recipe.train.precision, compiled=False), [samples])
        took_s = seconds_of(lambda number: subject.accumulate([0], number), device, SPEND_S, group=1)  # noqa: B023
        rates[name] = len(samples.lengths) / took_s
    return replace(base, sequences_per_s=rates, source="a micro-batch of each phase timed on this machine", extra_s={})
