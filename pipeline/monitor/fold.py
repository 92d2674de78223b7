"""Readings of a GPU brought together in windows that grow with the age of the stage: a week stays as small as a day."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

PARTS = 32  # a window is this part of the age: T seconds make about 32 · (1 + ln(T / 32)) lines, a week 350
LEAST_S = 1.0  # shorter windows are single readings
COUNTERS = ("energy_j", "ecc_corrected", "ecc_uncorrected", "memory_total_mb")  # the last value is the one that counts


class Fold:
    """The open window of one GPU, which began to be watched ``age_s`` seconds after its stage began."""

    def __init__(self, age_s: float = 0.0) -> None:
        self._age_s, self._began = age_s, float("nan")
        self._open()

    def _open(self) -> None:
        self._count, self._opened = 0, 0.0
        self._last: dict[str, Any] = {}
        self._values: dict[str, tuple[int, float, float, float, float]] = {}  # number, sum, lowest, highest, last
        self._throttled: Counter[str] = Counter()
        self._xids: list[int] = []

    def add(self, time_s: float, reading: Mapping[str, Any]) -> dict[str, Any] | None:
        """Take what was read at a monotonic time; the whole window where this reading was its last."""
        if not self._began <= time_s:
            self._began = time_s
        self._opened = self._opened if self._count else time_s
        self._count += 1
        self._last = dict(reading)
        self._throttled.update(reading.get("throttle", ()))
        self._xids += reading.get("xid", ())
        for key, value in reading.items():
            if isinstance(value, int | float):
                number, total, low, high, _ = self._values.get(key, (0, 0.0, value, value, value))
                self._values[key] = (number + 1, total + value, min(low, value), max(high, value), value)
        window_s = (self._age_s + time_s - self._began) / PARTS
        return self.close() if window_s < LEAST_S or time_s - self._opened >= window_s else None

    def close(self) -> dict[str, Any] | None:
        """The open window; None if it is empty.

        A single reading stays what it is; of more there are ``samples``, means, the ``range`` (lowest and highest) of
        what varied, ``throttled`` (samples by reason), and all ``xid``.
        """
        if self._count < 2:
            single = self._last if self._count else None
            self._open()
            return single
        folded: dict[str, Any] = {"samples": self._count}
        ranges = {}
        for key, (number, total, low, high, last) in self._values.items():
            folded[key] = last if key in COUNTERS or low == high else round(total / number, 1)
            if key not in COUNTERS and low < high:
                ranges[key] = [low, high]
        more = {"throttled": dict(self._throttled), "xid": self._xids, "range": ranges}
        self._open()
        return {**folded, **{key: value for key, value in more.items() if value}}
