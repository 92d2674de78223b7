"""What a model costs by arithmetic, against the model itself and torch's own count."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.bench.gpu_subject import LARGE, TINY, Levers, Samples, Subject
from pipeline.bert.config import BertConfig
from pipeline.bert.costs import parameters, training_flops
from pipeline.bert.heads import BertForPreTraining


@pytest.mark.parametrize("config", [TINY, LARGE, BertConfig(vocab_size=64, type_vocab_size=3)])
def test_parameters_are_those_of_the_model(config):
    with torch.device("meta"):
        model = BertForPreTraining(config)
    assert parameters(config) == sum(p.numel() for p in model.parameters())


def test_training_flops_are_those_that_torch_counts():
    """Full samples: then nothing is computed that is not counted. The embedding's gradient is no product."""
    count, length = 4, 32
    dice = np.random.default_rng(1)
    places = np.concatenate([np.arange(1, 6) + length * row for row in range(count)])
    samples = Samples(
        length, dice.integers(10, 500, count * length), np.full(count, length), np.full(count, 9),
        dice.integers(0, 2, count), places, dice.integers(10, 500, len(places)),
    )  # fmt: skip
    subject = Subject(torch.device("cpu"), TINY, Levers("padded", compiled=False, precision="fp32"), [samples])
    with FlopCounterMode(display=False) as counter:
        subject.accumulate([0])
    wanted = training_flops(TINY, [length] * count, len(places))
    assert counter.get_total_flops() == pytest.approx(wanted, rel=0.01)
