"""The generator is SplitMix64 (published outputs), and its integers and fractions are uniform."""

from __future__ import annotations

import numpy as np

from data_prep.splitmix import below, bits, derived, key, uniform


def test_published_outputs() -> None:
    """The stream of seed 1234567, as printed with Vigna's reference implementation."""
    seed = np.full(5, 1234567, np.uint64)
    assert bits(seed, np.arange(5)).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_keys_depend_on_every_part_and_their_order() -> None:
    keys = [key(*parts)[0] for parts in ((), (0,), (1,), (0, 0), (1, 2), (2, 1), (2**64 - 1,), (2**63,))]
    assert len(set(keys)) == len(keys)
    assert derived(key(4), np.array([7, 8])).tolist() == [key(4, 7)[0], key(4, 8)[0]]


def test_uniform() -> None:
    raw = bits(key(5), np.arange(140000))
    counts = np.bincount(below(raw, 7), minlength=7)
    assert (((counts - 20000) ** 2) / 20000).sum() < 25  # chi-square with 6 degrees of freedom
    assert below(raw, np.full(140000, 1)).max() == 0
    fractions = uniform(raw)
    assert 0 <= fractions.min() < fractions.max() < 1
    assert abs(fractions.mean() - 0.5) < 0.004
    assert abs(np.corrcoef(fractions[1:], fractions[:-1])[0, 1]) < 0.01
