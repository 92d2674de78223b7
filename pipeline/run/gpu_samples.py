"""The GPU samples of a run (``gpu/NODE.jsonl``) brought down to what a page can show.

Read line by line: up to version 0.1, whose attempts had each a folder of their own for them, a day of 256 GPUs was
gigabytes; some runs have a folder for each stage. Above ``MOST_BYTES`` only every k-th line is read.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.publish import open_plain
from pipeline.run.files import lines_of, parsed
from pipeline.run.incidents import short_host
from pipeline.run.rundir import RunDir, StageDir
from pipeline.words import is_number

Line = dict[str, Any]
Files = Sequence[tuple[Path, Line]]
METRICS = ("utilization_pct", "memory_used_mb", "power_w", "temperature_c", "sm_clock_mhz")
MOST_BINS = 240  # points of time that a chart shows
MOST_BYTES = 50_000_000
STRIDES = (1, 11, 101, 1009, 10007)  # primes, so that the GPUs of a node, which take turns, are all met
MOST_FILE_BYTES = 1 << 32
PAUSE_S = 60.0  # power between two samples further apart is not counted where the energy counter is missing


@dataclass(frozen=True)
class Span:
    """One attempt that was sampled. Spans are laid end to end: ``offset`` is where this one begins, in seconds."""

    stage: str
    attempt: int
    began: float
    ended: float
    offset: float


@dataclass
class Gpu:
    """What one GPU's samples come to, over all spans; ``energy_j`` by stage."""

    node: str
    index: int
    name: str = ""
    samples: int = 0
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(METRICS, 0.0))
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(METRICS, 0))
    highest: dict[str, float] = field(default_factory=dict)
    bins: dict[str, dict[int, tuple[float, int]]] = field(default_factory=lambda: {metric: {} for metric in METRICS})
    energy_j: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    throttled: Counter[str] = field(default_factory=Counter)
    xids: Counter[int] = field(default_factory=Counter)
    uncorrected: float = 0.0
    last: dict[str, Line] = field(default_factory=dict)  # by stage: several may be at work at a time
    pause_s: float = PAUSE_S

    @property
    def label(self) -> str:
        return f"{self.node} GPU {self.index}"

    def mean(self, metric: str) -> float | None:
        return self.sums[metric] / self.counts[metric] if self.counts[metric] else None

    def series(self, metric: str) -> dict[int, float]:
        """Mean of the metric by bin."""
        return {index: total / count for index, (total, count) in sorted(self.bins[metric].items())}

    def add(self, line: dict[str, Any], stage: str, bin_: int) -> None:
        """Take one sample, in order of time within its attempt."""
        count, ranges = line.get("samples", 1), line.get("range")
        count = count if isinstance(count, int) and 0 < count < MOST_BYTES else 1
        ranges = ranges if isinstance(ranges, dict) else {}
        self.samples += count
        self.name = str(line.get("name", self.name))
        for metric in METRICS:
            value = line.get(metric)
            if is_number(value):
                self.sums[metric] += value * count
                self.counts[metric] += count
                high = [n for n in (value, self.highest.get(metric), *_list(ranges.get(metric))) if is_number(n)]
                self.highest[metric] = max(high)
                total, number = self.bins[metric].get(bin_, (0.0, 0))
                self.bins[metric][bin_] = (total + value * count, number + count)
        self._add_energy(line, stage)
        self.throttled.update(str(reason) for reason in _list(line.get("throttle")))
        throttled = line.get("throttled")
        if isinstance(throttled, dict):
            self.throttled.update({str(why): often for why, often in throttled.items() if isinstance(often, int)})
        self.xids.update(number for number in _list(line.get("xid")) if isinstance(number, int))
        now, before = line.get("ecc_uncorrected"), self.last.get(stage, {}).get("ecc_uncorrected")
        if is_number(now) and is_number(before):
            self.uncorrected += max(0, now - before)
        self.last[stage] = line

    def _add_energy(self, line: dict[str, Any], stage: str) -> None:
        """From the counter, which begins anew with the driver, else from power and time."""
        last = self.last.get(stage)
        if last is None or last["attempt"] != line["attempt"]:
            return
        passed = line["time"] - last["time"]
        self.seconds[stage] += max(0.0, passed)
        now, before = line.get("energy_j"), last.get("energy_j")
        if is_number(now) and is_number(before):
            self.energy_j[stage] += max(0.0, now - before)
        elif is_number(line.get("power_w")) and 0 < passed <= max(self.pause_s, 2 * line.get("samples", 1)):
            self.energy_j[stage] += line["power_w"] * passed


@dataclass(frozen=True)
class GpuSamples:
    """All samples of a run; ``unread`` lines were damaged, and only every ``stride``-th line was read."""

    spans: list[Span]
    gpus: list[Gpu]
    bins: int
    unread: int
    stride: int

    @property
    def length_s(self) -> float:
        return sum(span.ended - span.began for span in self.spans)

    def of_rank(self, host: str, local_rank: int) -> Gpu | None:
        """The GPU of a node's n-th rank."""
        there = [gpu for gpu in self.gpus if gpu.node == short_host(host)]
        return there[local_rank] if local_rank < len(there) else None


def read(run: RunDir, stages: Collection[str], most_bytes: int = MOST_BYTES) -> GpuSamples | None:
    """The samples of the run's stages, in order; None when there are none."""
    files = [each for stage in stages for each in _older(run.stage(stage).path, stage)]
    files += [(path, {}) for path in sorted(run.path.glob("gpu/*.jsonl"))]
    begun = {stage: begun_at(run.stage(stage)) for stage in stages}
    size = sum(path.stat().st_size for path, _ in files if path.exists())
    stride = next((step for step in STRIDES if size / step <= most_bytes), STRIDES[-1])
    spans = _spans(files, begun, stride)
    return _folded(files, begun, spans, stride) if spans else None


def begun_at(stage: StageDir) -> float | None:
    """Unix time of a stage's first attempt; None where that is not (yet) on record."""
    times = [attempt.owner.get("time") for attempt in stage.attempts[:1]]
    return times[0] if times and is_number(times[0]) else None


def _older(stage: Path, name: str) -> list[tuple[Path, Line]]:
    """Files of a stage alone, or of one attempt, with what their place says of every line."""
    numbered = (path for path in sorted(stage.glob("attempts/*/gpu/*.jsonl")) if path.parts[-3].isdecimal())
    files = [(path, {"stage": name, "attempt": int(path.parts[-3])}) for path in numbered]
    return [*files, *((path, {"stage": name}) for path in sorted(stage.glob("gpu/*.jsonl")))]


def _spans(files: Files, begun: Mapping[str, float | None], stride: int) -> dict[tuple[str, int], Span]:
    """Each attempt that was sampled, by stage and number, laid behind the one before it."""
    ends: dict[str, dict[int, tuple[float, float]]] = {stage: {} for stage in begun}
    for line in filter(None, _lines(files, begun, stride)):
        began, ended = ends[line["stage"]].get(line["attempt"], (line["time"], line["time"]))
        ends[line["stage"]][line["attempt"]] = min(began, line["time"]), max(ended, line["time"])
    spans: dict[tuple[str, int], Span] = {}
    offset = 0.0
    for stage, attempts in ends.items():
        for attempt, (began, ended) in sorted(attempts.items()):
            spans[stage, attempt] = Span(stage, attempt, began, ended, offset)
            offset += ended - began
    return spans


def _folded(
    files: Files, begun: Mapping[str, float | None], spans: dict[tuple[str, int], Span], stride: int
) -> GpuSamples:
    """Every ``stride``-th line of the files, folded into the GPUs that they tell of."""
    length = sum(span.ended - span.began for span in spans.values())
    bins = max(1, min(MOST_BINS, int(length / stride)))
    gpus: dict[tuple[str, int], Gpu] = {}
    unread = 0
    for line in _lines(files, begun, stride):
        if line is None:
            unread += 1
            continue
        span = spans.get((line["stage"], line["attempt"]))
        if span is None:  # written since
            continue
        key = (short_host(line["node"]), line["gpu"])
        gpu = gpus.setdefault(key, Gpu(*key, pause_s=max(PAUSE_S, 2.0 * stride)))
        at = span.offset + min(max(line["time"], span.began), span.ended) - span.began
        gpu.add(line, line["stage"], min(int(at / (length or 1) * bins), bins - 1))
    return GpuSamples([*spans.values()], [gpus[key] for key in sorted(gpus)], bins, unread, stride)


def _lines(files: Files, begun: Mapping[str, float | None], stride: int) -> Iterator[Line | None]:
    """The objects of every ``stride``-th line of the stages, with stage, attempt, time and GPU; None: a damaged one.

    Each file begins elsewhere: those of nodes at the same work are alike line by line. ``begun`` tells lines of a stage
    from those of one that was moved aside, whose attempts have the same numbers.
    """
    for number, (path, told) in enumerate(files):
        try:
            with open_plain(path, MOST_FILE_BYTES) as file:
                for raw in itertools.islice(lines_of(file), number % stride, None, stride):
                    line = {"node": path.stem, **(parsed(raw) or {}), **told}
                    whole = is_number(line.get("time")) and type(line.get("gpu")) is type(line.get("attempt")) is int
                    if not whole or not isinstance(line.get("stage"), str):
                        yield None
                    elif line["stage"] in begun and line.get("begun", begun[line["stage"]]) == begun[line["stage"]]:
                        yield line
        except OSError:
            yield None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
