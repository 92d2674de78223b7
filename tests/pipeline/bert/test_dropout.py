"""The cheap dropout: right shares, right mean, decided by the seed alone, nothing drawn when it is off."""

import pytest
import torch

from pipeline.bert.dropout import dropout, keep_factors, keyed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.003])
def test_the_share_dropped_and_the_factor(p, dtype):
    torch.manual_seed(0)
    factors = keep_factors(1_000_001, p, dtype)
    assert factors.shape == (1_000_001,)
    assert factors.dtype == dtype
    kept = factors[factors != 0]
    assert 1 - len(kept) / len(factors) == pytest.approx(p, abs=5 * (p * (1 - p) / 1e6) ** 0.5 + 2**-17)
    assert kept.unique().tolist() == [pytest.approx(1 / (1 - p), rel=1e-4 if dtype == torch.float32 else 4e-3)]
    if dtype == torch.float32:
        assert factors.double().mean().item() == pytest.approx(1, abs=5 * (p / (1 - p) / 1e6) ** 0.5)


def test_decisions_are_independent_between_draws_and_neighbours():
    torch.manual_seed(0)
    first, second = (keep_factors(1 << 20, 0.5, torch.float32) > 0 for _ in range(2))
    for a, b in ((first, second), (first[1:], first[:-1]), (first[4:], first[:-4])):
        assert (a == b).float().mean().item() == pytest.approx(0.5, abs=0.003)


def test_the_seed_alone_decides():
    def draw(seed, threads):
        torch.manual_seed(seed)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        out = dropout(torch.ones(3, 50_001), 0.1)
        torch.set_num_threads(before)
        return out

    assert torch.equal(draw(1, 1), draw(1, 2))
    assert not torch.equal(draw(1, 1), draw(2, 1))


def test_nothing_is_drawn_when_off():
    values, state = torch.ones(5), torch.get_rng_state()
    assert dropout(values, 0.0) is values
    assert torch.equal(state, torch.get_rng_state())
    dropout(values, 0.5)
    assert not torch.equal(state, torch.get_rng_state())


def test_gradients_pass_through_the_same_factors():
    values = torch.ones(1000, requires_grad=True)
    out = dropout(values, 0.5)
    out.sum().backward()
    assert torch.equal(values.grad, out)


def test_a_key_seeds_as_torch_does_and_leaves_nothing_behind():
    keyed(1, "phase1", 2, 3)
    draws, seed = torch.rand(8), torch.initial_seed()
    torch.manual_seed(seed)
    assert torch.equal(torch.rand(8), draws)
    before = len(torch.cuda._queued_calls)
    keyed(1, "phase1", 2, 4)
    assert len(torch.cuda._queued_calls) == before
