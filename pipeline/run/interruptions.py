"""How often to save: the arithmetic of interruptions, checkpoints and lost time. Pure; no file is read."""

from __future__ import annotations

import math
from dataclasses import dataclass

DAY_S = 86_400.0


def mean_time_between_s(rate: float, nodes: int, preempt_s: float = math.inf) -> float:
    """Mean time between interruptions in seconds.

    ``rate`` is failures per 1,000 node-days; ``preempt_s`` the mean time between preemptions of the whole job.
    Both are taken as independent and memoryless, so their frequencies add up.
    """
    frequency = rate * nodes / (1000 * DAY_S) + 1 / preempt_s
    return 1 / frequency if frequency > 0 else math.inf


def young_s(save_s: float, between_s: float) -> float:
    """The checkpoint interval of Young, "A first order approximation to the optimum checkpoint interval", CACM 1974."""
    return math.sqrt(2 * save_s * between_s)


def daly_s(save_s: float, between_s: float) -> float:
    """The checkpoint interval of Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps",
    Future Generation Computer Systems 22, 2006: seconds of work between two saves."""
    if save_s >= 2 * between_s:
        return between_s
    ratio = save_s / (2 * between_s)
    return young_s(save_s, between_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_s


@dataclass(frozen=True)
class Advice:
    """What a node count means: ``lost`` is the share of time that goes into saving, doing again and restarting."""

    between_s: float
    interval_s: float
    lost: float
    restart_lost: float  # the part of ``lost`` that restarts cost, whatever the interval


def advise(rate: float, nodes: int, *, save_s: float, restart_s: float, preempt_s: float = math.inf) -> Advice:
    """The interval that loses least, and what is still lost.

    ``save_s`` is how long the step loop stands still for a checkpoint, ``restart_s`` the time from an interruption to
    the first new step without the wait in the queue. An interruption comes, on average, in the middle of an interval
    (first order in interval ÷ time between interruptions). Infinite times where nothing ever interrupts.
    """
    between_s = mean_time_between_s(rate, nodes, preempt_s)
    if math.isinf(between_s):
        return Advice(between_s, math.inf, 0.0, 0.0)
    interval_s = daly_s(save_s, between_s)
    restart_lost = restart_s / between_s
    lost = save_s / interval_s + (interval_s + save_s) / (2 * between_s) + restart_lost
    return Advice(between_s, interval_s, lost, restart_lost)


def expected_restarts(advice: Advice, hours: float) -> float:
    """How often a training of ``hours`` without interruption is expected to be interrupted, lost time included."""
    if math.isinf(advice.between_s):
        return 0.0
    return hours * 3600 * (1 + advice.lost) / advice.between_s


def chance_of_none(advice: Advice, hours: float) -> float:
    """The chance that a training of ``hours`` is never interrupted."""
    return math.exp(-hours * 3600 / advice.between_s)
