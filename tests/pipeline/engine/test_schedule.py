"""Learning-rate curves against the reference's values and against their own definition."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine.schedule import DECAYS, learning_rate

GOLDEN = json.loads((Path(__file__).parent / "golden" / "learning_rate.json").read_text())


@pytest.mark.parametrize("phase", GOLDEN, ids=lambda phase: f"phase{phase['phase']}")
def test_poly_equals_the_reference(phase):
    for step, expected in phase["values"].items():
        rate = learning_rate(
            "poly",
            base=phase["base"],
            warmup=phase["warmup_proportion"],
            steps=phase["max_steps"],
            step=int(step),
        )
        assert rate == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_poly_drops_at_the_hand_over_and_ends_at_zero():
    def rate(step):
        return learning_rate("poly", base=6e-3, warmup=0.2843, steps=7038, step=step)

    assert rate(2001) / rate(2000) == pytest.approx(math.sqrt(1 - 0.2843), rel=1e-3)
    assert rate(7038) == 0.0
    assert rate(9000) == 0.0
    half = learning_rate("poly", base=1.0, warmup=0.5, steps=2, step=1)
    assert half == math.sqrt(0.5)  # the step at p = w already decays


def test_wsd_is_that_of_transformers():
    steps, optimizer = 200, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = transformers.get_wsd_schedule(optimizer, 20, 40, num_training_steps=steps, decay_type="1-sqrt").lr_lambdas
    for step in range(1, steps + 1):
        assert learning_rate("wsd", base=1.0, warmup=0.1, steps=steps, step=step) == pytest.approx(
            theirs[0](step), abs=1e-9
        )


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_linear_and_cosine_join_without_a_jump_and_end_at_zero(name):
    rates = [learning_rate(name, base=1.0, warmup=0.1, steps=1000, step=s) for s in range(1, 1001)]
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) < 0.0101
    assert max(rates) == rates[99] == 1.0
    assert rates[-1] == pytest.approx(0, abs=1e-15)
    assert rates[549] == pytest.approx(0.5)


def test_constant_keeps_the_base_rate_after_warm_up():
    rates = [learning_rate("constant", base=2.0, warmup=0.5, steps=4, step=s) for s in range(1, 5)]
    assert rates == [1.0, 2.0, 2.0, 2.0]


@given(
    name=st.sampled_from(sorted(DECAYS)),
    base=st.floats(1e-6, 1),
    warmup=st.floats(0, 0.999),
    steps=st.integers(1, 10_000),
    share=st.floats(0, 1),
)
def test_rate_stays_between_zero_and_base(name, base, warmup, steps, share):
    step = max(1, round(share * steps))
    rate = learning_rate(name, base=base, warmup=warmup, steps=steps, step=step)
    assert 0 <= rate <= base * (1 + 1e-12)


@pytest.mark.parametrize("name", DECAYS)
def test_a_warmup_of_all_steps_rises_to_the_base_rate(name):
    """The recipe's bounds allow it: it must not be refused once the data are made."""
    rates = [learning_rate(name, base=2.0, warmup=1.0, steps=4, step=s) for s in range(1, 5)]
    assert rates == [0.5, 1.0, 1.5, 2.0]
