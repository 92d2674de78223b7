"""Checkpoint arithmetic: a table worked out by hand, and ten thousand simulated trainings."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.run.interruptions import advise, chance_of_none, daly_s, expected_restarts, mean_time_between_s, young_s

# By node count: for each rate (failures per 1,000 node-days) the mean time between failures in hours, the interval in
# seconds and the percentage lost with a stall of 0.5 s; and the last two for rate 6.5 with a stall of 8 s.
RATES = (2.34, 6.5, 16.0)
TABLE = {
    32: ((320, 1074, 0.09), (115, 644, 0.16), (47, 410, 0.24), (2573, 0.62)),
    64: ((160, 759, 0.13), (58, 455, 0.22), (23, 290, 0.34), (1818, 0.88)),
    128: ((80, 537, 0.19), (29, 322, 0.31), (12, 205, 0.49), (1284, 1.25)),
    256: ((40, 379, 0.26), (14, 228, 0.44), (5.9, 145, 0.69), (906, 1.76)),
    512: ((20, 268, 0.37), (7.2, 161, 0.62), (2.9, 102, 0.98), (639, 2.50)),
    1024: ((10, 190, 0.53), (3.6, 114, 0.88), (1.5, 72, 1.38), (450, 3.54)),
}


@pytest.mark.parametrize("nodes", TABLE)
def test_the_table_of_rates_and_nodes(nodes):
    *columns, (slow_s, slow_lost) = TABLE[nodes]
    for rate, (hours, interval_s, lost) in zip(RATES, columns, strict=True):
        found = advise(rate, nodes, save_s=0.5, restart_s=0)
        assert found.between_s / 3600 == pytest.approx(hours, rel=0.04)
        assert found.interval_s == pytest.approx(interval_s, abs=0.6)
        assert 100 * found.lost == pytest.approx(lost, abs=0.006)
    found = advise(6.5, nodes, save_s=8, restart_s=0)
    assert (round(found.interval_s), round(100 * found.lost, 2)) == pytest.approx((slow_s, slow_lost), abs=0.51)
    assert 100 * found.lost == pytest.approx(slow_lost, abs=0.006)


@pytest.mark.parametrize(("nodes", "percent"), [(32, 0.04), (128, 0.17), (512, 0.69), (1024, 1.39)])
def test_what_restarts_of_three_minutes_cost(nodes, percent):
    found = advise(6.5, nodes, save_s=0.5, restart_s=180)
    assert 100 * found.restart_lost == pytest.approx(percent, abs=0.006)
    assert found.lost - advise(6.5, nodes, save_s=0.5, restart_s=0).lost == pytest.approx(found.restart_lost)


@pytest.mark.parametrize(("hours", "interval_s", "lost"), [(2, 84, 1.19), (6, 143, 0.70), (24, 267, 0.37)])
def test_preemption_adds_to_the_failures(hours, interval_s, lost):
    found = advise(6.5, 32, save_s=0.5, restart_s=0, preempt_s=hours * 3600)
    assert found.interval_s == pytest.approx(interval_s, abs=0.6)
    assert 100 * found.lost == pytest.approx(lost, abs=0.006)


def test_daly_refines_young_and_stays_sane():
    assert young_s(0.5, 415_385) == pytest.approx(644.5, abs=0.1)
    assert daly_s(1e-6, 1e6) == pytest.approx(young_s(1e-6, 1e6), rel=1e-6)
    assert daly_s(100, 50) == 50  # saving takes longer than the job lives: Daly's other branch
    assert daly_s(8, 12_981) == pytest.approx(450.4, abs=0.1)


def test_a_short_training_on_32_nodes_hardly_ever_meets_a_failure():
    found = advise(6.5, 32, save_s=0.5, restart_s=180)
    assert 1 - chance_of_none(found, 1.2) == pytest.approx(0.0104, abs=0.0001)
    assert expected_restarts(found, 1.2) == pytest.approx(1.2 / 115.38 * (1 + found.lost), rel=1e-3)
    nothing = advise(0.0, 32, save_s=0.5, restart_s=180)
    assert (nothing.lost, chance_of_none(nothing, 9), expected_restarts(nothing, 9)) == (0, 1, 0)
    assert math.isinf(mean_time_between_s(0.0, 32))


def simulated(between_s: float, interval_s: float, save_s: float, restart_s: float, runs: int) -> tuple[float, float]:
    """Wall time over useful time, and restarts a run, of trainings that save after every interval and can be struck
    at any moment of work and of saving; a restart goes on at the last finished save. One array element is one run."""
    random = np.random.default_rng(0)
    intervals = int(20 * between_s / interval_s)
    saved, wall_s, restarts = np.zeros(runs, np.int64), np.zeros(runs), 0
    at_work = np.arange(runs)
    while len(at_work):
        until_struck = random.exponential(between_s, len(at_work))
        left = intervals - saved[at_work]
        made = np.minimum(left, (until_struck / (interval_s + save_s)).astype(np.int64))
        struck = made < left
        wall_s[at_work] += np.where(struck, until_struck + restart_s, left * (interval_s + save_s))
        saved[at_work] += made
        restarts += int(struck.sum())
        at_work = at_work[struck]
    return float(wall_s.mean()) / (intervals * interval_s), restarts / runs


@pytest.mark.parametrize(
    ("rate", "nodes", "save_s", "preempt_h"),
    [(6.5, 32, 0.5, math.inf), (6.5, 1024, 0.5, math.inf), (6.5, 32, 0.5, 6), (16.0, 512, 0.5, math.inf)],
)
def test_ten_thousand_simulated_trainings_agree(rate, nodes, save_s, preempt_h):
    found = advise(rate, nodes, save_s=save_s, restart_s=60, preempt_s=preempt_h * 3600)
    ratio, restarts = simulated(found.between_s, found.interval_s, save_s, 60, 10_000)
    assert ratio - 1 == pytest.approx(found.lost, rel=0.05)
    useful_h = int(20 * found.between_s / found.interval_s) * found.interval_s / 3600
    assert restarts == pytest.approx(expected_restarts(found, useful_h), rel=0.05)


@pytest.mark.parametrize("factor", [0.4, 2.5])
def test_no_other_interval_loses_less(factor):
    found = advise(6.5, 512, save_s=0.5, restart_s=0)
    best, _ = simulated(found.between_s, found.interval_s, 0.5, 0, 4000)
    other, _ = simulated(found.between_s, factor * found.interval_s, 0.5, 0, 4000)
    assert other > best
