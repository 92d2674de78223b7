"""The GPU samples of a run (``attempts/NNNN/gpu/NODE.jsonl``) brought down to what a page can show.

Read line by line: up to version 0.1 a day of 256 GPUs was gigabytes. Above ``MOST_BYTES`` only every k-th line is read.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.run.files import lines_of, open_plain, parsed
from pipeline.run.incidents import short_host
from pipeline.run.rundir import RunDir
from pipeline.words import is_number

METRICS = ("utilization_pct", "memory_used_mb", "power_w", "temperature_c", "sm_clock_mhz")
MOST_BINS = 240  # points of time that a chart shows
MOST_BYTES = 50_000_000
STRIDES = (1, 11, 101, 1009, 10007)  # primes, so that the GPUs of a node, which take turns, are all met
END_BYTES = 65536
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
    last: dict[str, Any] = field(default_factory=dict)
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
        now, before = line.get("ecc_uncorrected"), self.last.get("ecc_uncorrected")
        if is_number(now) and is_number(before):
            self.uncorrected += max(0, now - before)
        self.last = line

    def _add_energy(self, line: dict[str, Any], stage: str) -> None:
        """From the counter, which begins anew with the driver, else from power and time."""
        last = self.last
        if not last or (last["stage"], last["attempt"]) != (line["stage"], line["attempt"]):
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


def read(run: RunDir, stages: Iterable[str], most_bytes: int = MOST_BYTES) -> GpuSamples | None:
    """The samples of the run's stages, in order; None when there are none."""
    files = _sampled(run, stages)
    size = sum(path.stat().st_size for _, paths in files for path in paths)
    stride = next((step for step in STRIDES if size / step <= most_bytes), STRIDES[-1])
    return _folded(files, stride) if files else None


def _sampled(run: RunDir, stages: Iterable[str]) -> list[tuple[Span, list[Path]]]:
    """Each attempt that was sampled, laid behind the one before it, with its files."""
    files: list[tuple[Span, list[Path]]] = []
    offset = 0.0
    for stage in stages:
        for attempt in run.stage(stage).attempts:
            paths = sorted((attempt.path / "gpu").glob("*.jsonl"))
            ends = [time for path in paths for time in _ends(path)]
            if ends:
                files.append((Span(stage, attempt.number, min(ends), max(ends), offset), paths))
                offset += max(ends) - min(ends)
    return files


def _folded(files: list[tuple[Span, list[Path]]], stride: int) -> GpuSamples | None:
    """Every ``stride``-th line of the files, folded into the GPUs that they tell of."""
    spans = [span for span, _ in files]
    length = spans[-1].offset + spans[-1].ended - spans[-1].began
    bins = max(1, min(MOST_BINS, int(length / stride)))
    gpus: dict[tuple[str, int], Gpu] = {}
    unread = 0
    for span, line, node in ((span, line, path.stem) for span, paths in files for path in paths
                             for line in _lines(path, stride)):  # fmt: skip
        if line is None or not is_number(line.get("time")) or not isinstance(line.get("gpu"), int):
            unread += 1
            continue
        at = span.offset + min(max(line["time"], span.began), span.ended) - span.began
        key = (short_host(line.get("node", node)), line["gpu"])
        line |= {"stage": span.stage, "attempt": span.attempt}
        gpu = gpus.setdefault(key, Gpu(*key, pause_s=max(PAUSE_S, 2.0 * stride)))
        gpu.add(line, span.stage, min(int(at / (length or 1) * bins), bins - 1))
    return GpuSamples(spans, [gpus[key] for key in sorted(gpus)], bins, unread, stride) if gpus else None


def _lines(path: Path, stride: int) -> Iterator[dict[str, Any] | None]:
    """The objects of every ``stride``-th line, None for a damaged one."""
    try:
        with open_plain(path, MOST_FILE_BYTES) as file:
            yield from map(parsed, itertools.islice(lines_of(file), 0, None, stride))
    except OSError:
        yield None


def _ends(path: Path) -> list[float]:
    """The times of a file's first and last samples; empty when it has none."""
    try:
        with open_plain(path, MOST_FILE_BYTES) as file:
            first = file.read(END_BYTES).splitlines()
            file.seek(max(0, path.stat().st_size - END_BYTES))
            last = file.read().splitlines()
    except OSError:
        return []
    ends = []
    for lines in (first, reversed(last)):
        times = ((parsed(raw) or {}).get("time") for raw in lines)
        ends += [next((float(time) for time in times if is_number(time)), None)]
    return [time for time in ends if time is not None]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
