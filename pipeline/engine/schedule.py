"""Learning-rate schedules as pure functions of the optimizer step: no state, nothing to checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable

# Each decay maps (p, w) to the factor of the base rate once warm-up is over: p is the step as a share of all
# steps, w the warm-up share, w <= p <= 1.
DECAYS: dict[str, Callable[[float, float], float]] = {
    # NVIDIA's polynomial of degree 0.5 counts from the first step, not from the end of warm-up: the rate
    # drops by sqrt(1 - w) at the hand-over, and the last step is exactly 0.
    "poly": lambda p, w: math.sqrt(1 - p),
    "linear": lambda p, w: (1 - p) / (1 - w),
    "cosine": lambda p, w: (1 + math.cos(math.pi * (p - w) / (1 - w))) / 2,
    # Warm-up, stable, decay (Hägele et al. 2024): the last fifth of the steps falls as 1 - sqrt.
    "wsd": lambda p, w: 1 - math.sqrt(max(0.0, p - max(w, 0.8)) / (1 - max(w, 0.8))),
    "constant": lambda p, w: 1.0,
}


def learning_rate(name: str, *, base: float, warmup: float, steps: int, step: int) -> float:
    """Learning rate of one optimizer step by one of `DECAYS`.

    ``step`` is the number of finished optimizer steps + 1, ``steps`` the length of the phase, ``warmup`` the
    share of it (0 <= warmup <= 1) over which the rate rises linearly to ``base``. Steps beyond ``steps`` keep
    the rate of the last one.
    """
    progress = min(step / steps, 1.0)
    if progress < warmup or warmup == 1:  # with 1 nothing is left in which the rate could fall
        return base * progress / warmup
    return base * DECAYS[name](progress, warmup)
