"""A week of GPU samples stays small, and keeps its means, extremes, counters and events."""

from __future__ import annotations

import json
import math
import random
from typing import Any

from pipeline.monitor.fold import Fold
from pipeline.run.gpu_samples import Gpu

WEEK_S = 7 * 86_400
LABELS = {
    "job": "123456",
    "stage": "phase1",
    "attempt": 1,
    "node": "node001",
    "uuid": "GPU-" + "0" * 36,
    "name": "H100",
}


def reading(second: int) -> dict[str, Any]:
    draw = random.Random(second)
    figures = {
        name: draw.randrange(100) for name in ("utilization_pct", "memory_used_mb", "temperature_c", "sm_clock_mhz")
    }
    return {
        **{**figures, "power_w": draw.uniform(100, 700), "energy_j": 350.5 * second, "memory_total_mb": 81920},
        **{"memory_clock_mhz": 1593 + second % 2, "throttle": ["power"] if second % 4 == 0 else []},
        **{"ecc_corrected": 0, "ecc_uncorrected": second // 400_000, "xid": [79] if second == 5_000 else []},
    }


def test_a_week_of_256_gpus_is_100_mb() -> None:
    fold, size, every = Fold(), 0, 40  # every 40th second, for the test's sake
    for second in range(0, WEEK_S, every):
        if (window := fold.add(float(second), reading(second))) is not None:
            size += len(json.dumps({"time": 1.795e9 + second, **LABELS, "gpu": 7, **window}))
    assert size * 256 < 100e6


def test_a_restart_goes_on_with_long_windows() -> None:
    fold = Fold(age_s=WEEK_S)
    assert not any(fold.add(float(second), reading(second)) for second in range(3600))
    assert fold.close() is not None
    assert fold.close() is None


def test_folded_samples_mean_what_single_ones_mean() -> None:
    fold, single, folded = Fold(), Gpu("n", 0), Gpu("n", 0)
    head = {"stage": "phase1", "attempt": 1}
    for second in range(20_000):
        sample = reading(second)
        single.add({**head, "time": float(second), **sample}, "phase1", 0)
        if (window := fold.add(float(second), sample)) is not None:
            folded.add({**head, "time": float(second), **window}, "phase1", 0)
    if (window := fold.close()) is not None:
        folded.add({**head, "time": 19_999.0, **window}, "phase1", 0)
    assert folded.samples == single.samples == 20_000
    assert folded.highest == single.highest
    assert folded.throttled == single.throttled == {"power": 5000}
    assert folded.xids == single.xids == {79: 1}
    assert folded.energy_j == single.energy_j
    assert folded.uncorrected == single.uncorrected
    for metric in ("utilization_pct", "power_w", "sm_clock_mhz"):
        assert math.isclose(folded.mean(metric) or 0, single.mean(metric) or 1, rel_tol=1e-3)
