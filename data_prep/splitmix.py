"""SplitMix64 as a counter-based generator: random bits that are a function of a key and a counter."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Keys = NDArray[np.uint64]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(values: Keys) -> Keys:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): 64-bit integers to 64 well-mixed bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def key(*parts: int) -> Keys:
    """One 64-bit key, ``[1]``, out of any integers, in their order."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        state = mix(state + GOLDEN + np.array([part % (1 << 64)], np.uint64))
    return state


def derived(keys: Keys, numbers: Ints | Keys) -> Keys:
    """The key of each number under a key: what ``key(..., number)`` is, for arrays."""
    return mix(keys + GOLDEN + numbers.astype(np.uint64))


def bits(keys: Keys, counters: Ints | Keys) -> Keys:
    """64 random bits for each (key, counter): the output number ``counter`` of the stream that ``key`` seeds."""
    return mix(keys + (counters.astype(np.uint64) + np.uint64(1)) * GOLDEN)


def below(raw: Keys, bound: Ints | int) -> Ints:
    """Random bits to uniform integers ``0 <= x < bound`` (bounds under 2**32)."""
    return ((raw >> np.uint64(32)) * np.asarray(bound).astype(np.uint64) >> np.uint64(32)).astype(np.int64)


def uniform(raw: Keys) -> NDArray[np.float64]:
    """Random bits to uniform numbers ``0 <= x < 1``."""
    return np.asarray((raw >> np.uint64(11)) * 2.0**-53, np.float64)
