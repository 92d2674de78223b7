"""The parts of the report on GPUs: what stood out, use over time, energy, and what held them back."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from pipeline.report.chart import Chart, Line, Look, Point, draw
from pipeline.report.facts import Facts
from pipeline.report.page import Html, note, section, table, tag
from pipeline.run.gpu_samples import Gpu, GpuSamples
from pipeline.run.incidents import incidents, short_host
from pipeline.words import duration, number, percent

MOST_LINES = 8  # GPUs with a line each; above, lowest, median and highest
CHARTS = {
    "utilization_pct": ("GPU utilisation", "%", 1.0),
    "memory_used_mb": ("GPU memory used", "GB", 1e-3),
    "power_w": ("GPU power", "W", 1.0),
    "temperature_c": ("GPU temperature", "°C", 1.0),
}
BAND: tuple[tuple[str, str, Callable[[Iterable[float]], float], Look], ...] = (
    ("highest", "highest and lowest", max, "thin"),
    ("median", "median", statistics.median, "main"),
    ("lowest", "", min, "thin"),
)
JOULES_PER_KWH = 3.6e6


def incident_section(facts: Facts) -> Html | None:
    """What stood out in the run, with the GPU of every slow rank; None when nothing did."""
    lines: list[Any] = list(incidents(facts.events))
    lines += [words for rank, host in slow_ranks(facts) if (words := beside_others(facts, rank, host))]
    lines += [words for gpu in (facts.gpus.gpus if facts.gpus else []) if (words := errors_of(gpu))]
    if not lines:
        return None
    hint = note("A node is left out with --exclude=NODE; the training is the same on any other.")
    return section("What stood out", tag("ul", *[tag("li", line) for line in lines]), hint)


def slow_ranks(facts: Facts) -> list[tuple[int, str]]:
    """(rank, host) of every slow rank on record."""
    events = [event for event in facts.events if event.get("event") == "slow_rank"]
    ranks = [(event["rank"], str(event.get("host"))) for event in events if isinstance(event.get("rank"), int)]
    return list(dict.fromkeys(ranks))


def beside_others(facts: Facts, rank: int, host: str) -> str:
    """The GPU of a rank beside the median of all; empty without samples of it."""
    samples = facts.gpus
    gpu = samples.of_rank(host, rank % facts.profile.ranks_per_node) if samples else None
    if samples is None or gpu is None:
        return ""
    parts = []
    for metric, what, unit in (
        ("sm_clock_mhz", "clock", " MHz"),
        ("temperature_c", "temperature", " °C"),
        ("power_w", "power", " W"),
        ("utilization_pct", "utilisation", " %"),
    ):
        own, means = gpu.mean(metric), [mean for g in samples.gpus if (mean := g.mean(metric)) is not None]
        if own is not None:
            parts.append(f"{what} {own:,.0f}{unit} (median of all {statistics.median(means):,.0f}{unit})")
    if gpu.throttled:
        reason, count = gpu.throttled.most_common(1)[0]
        parts.append(f"{reason} in {percent(count / gpu.samples)} of its samples")
    return f"Rank {rank} computes on {gpu.label}: {', '.join(parts)}." if parts else ""


def errors_of(gpu: Gpu) -> str:
    """Errors that a GPU's samples tell of; empty when there are none."""
    parts = [f"Xid {number(xid)} ({'once' if count == 1 else f'{number(count)} times'})"
             for xid, count in sorted(gpu.xids.items())]  # fmt: skip
    if gpu.uncorrected:
        parts.append(f"{number(round(gpu.uncorrected))} new uncorrectable memory errors")
    return f"{gpu.label}: {', '.join(parts)}." if parts else ""


def gpu_section(facts: Facts) -> Html:
    """Use, energy and throttling of the GPUs, or one sentence when there is nothing to show."""
    samples = facts.gpus
    if samples is None:
        return section("GPUs", note("No GPU was sampled: the run used none, or their driver library was not found."))
    names = Counter(gpu.name or "unknown GPU" for gpu in samples.gpus)
    nodes = len({gpu.node for gpu in samples.gpus})
    what = ", ".join(f"{count} × {name}" for name, count in names.most_common())
    summary = f"{what} on {nodes} node{'s' if nodes > 1 else ''}, sampled for {duration(samples.length_s)}."
    if samples.stride > 1:
        summary += f" Every {samples.stride}th sample was read."
    if samples.unread:
        summary += f" {number(samples.unread)} lines could not be read."
    hint = note("Attempts are laid end to end; the time between them is left out.")
    return section("GPUs", tag("p", summary), use_charts(facts, samples), hint, energy_table(facts, samples),
                   throttle_table(samples))  # fmt: skip


def use_charts(facts: Facts, samples: GpuSamples) -> Html:
    """One chart for each figure, over the time sampled."""
    unit_s, unit = (3600.0, "hours") if samples.length_s > 7200 else (60.0, "minutes")
    marks = [(span.offset / unit_s, span.stage + (f" ({span.attempt})" if span.attempt > 1 else ""))
             for span in samples.spans]  # fmt: skip
    flagged = {gpu.label for rank, host in slow_ranks(facts) if samples
               and (gpu := samples.of_rank(host, rank % facts.profile.ranks_per_node))}  # fmt: skip
    flagged |= {f"{short_host(event.get('node'))} GPU {event.get('gpu')}" for event in facts.events
                if event.get("event") == "gpu_health"}  # fmt: skip
    bin_x = samples.length_s / samples.bins / unit_s
    figures = []
    for metric, (title, y_label, scale) in CHARTS.items():
        series = {
            gpu.label: [((at + 0.5) * bin_x, scale * value) for at, value in gpu.series(metric).items()]
            for gpu in samples.gpus
        }
        lines = few_lines(series, flagged) if len(series) <= MOST_LINES else band(series, flagged)
        lines = [replace(line, gap=4 * bin_x) for line in lines if line.points]
        chart = Chart(title, unit, y_label, lines, marks, from_zero=True, until=samples.length_s / unit_s)
        figures.append(tag("figure", tag("figcaption", title), draw(chart, key=f"gpu-{metric.replace('_', '-')}")))
    return tag("div", *figures, class_="charts")


def few_lines(series: Mapping[str, list[Point]], flagged: set[str]) -> list[Line]:
    """A line for each GPU; those that stood out by their name and in the second colour, drawn last."""
    plain = [label for label in series if label not in flagged]
    lines = [
        Line(label, series[label], "fine", legend=("" if index else "each GPU" if len(series) > 1 else label))
        for index, label in enumerate(plain)
    ]
    return lines + [Line(label, series[label], "second", legend=label) for label in series if label in flagged]


def band(series: Mapping[str, list[Point]], flagged: set[str]) -> list[Line]:
    """Lowest, median and highest of all GPUs, and those that stood out."""
    at: dict[float, list[float]] = {}
    for points in series.values():
        for x, y in points:
            at.setdefault(x, []).append(y)
    lines = [
        Line(f"{name} of {len(series)} GPUs", [(x, of(at[x])) for x in sorted(at)], look, legend=legend)
        for name, legend, of, look in BAND
    ]
    stood_out = [label for label in series if label in flagged][:3]
    return lines + [Line(label, series[label], "second", legend=label) for label in stood_out]


def energy_table(facts: Facts, samples: GpuSamples) -> Html:
    """Energy by stage, also per million samples for the phases, done again or not."""
    rows = []
    for stage in dict.fromkeys(span.stage for span in samples.spans):
        sampled = [gpu for gpu in samples.gpus if gpu.seconds.get(stage)]
        kwh = sum(gpu.energy_j.get(stage, 0.0) for gpu in sampled) / JOULES_PER_KWH
        seconds = sum(gpu.seconds[stage] for gpu in sampled)
        trained = next((p.reached * p.config.global_batch for p in facts.phases if p.name == stage), 0.0)
        mean_w = JOULES_PER_KWH * kwh / seconds if seconds else None
        rows.append(
            (
                tag("code", stage),
                number(len(sampled)),
                number(seconds / 3600, 3),
                number(kwh, 3),
                number(kwh / trained * 1e6, 3) if trained else "–",
                number(mean_w, 3) if mean_w is not None else "–",
            )
        )
    head = ("Stage", "GPUs", "GPU-hours", "kWh", "kWh per million samples", "Mean power, W")
    remark = note("Energy of the GPUs alone, from their counters, steps done again included.")
    return tag("div", table(head, rows, numeric=range(1, 6)), remark)


def throttle_table(samples: GpuSamples) -> Html:
    """Why clocks were held down, how often, and which GPU most."""
    total = sum(gpu.samples for gpu in samples.gpus)
    reasons: Counter[str] = Counter()
    for gpu in samples.gpus:
        reasons.update(gpu.throttled)
    rows = []
    for reason, count in reasons.most_common():
        hit = [gpu for gpu in samples.gpus if gpu.throttled[reason]]
        most = max(hit, key=lambda gpu: gpu.throttled[reason] / gpu.samples)
        worst = f"{most.label} ({percent(most.throttled[reason] / most.samples)})"
        rows.append((reason, percent(count / total), f"{len(hit)} of {len(samples.gpus)}", worst))
    if not rows:
        return note("No clock was held down.")
    return table(("Clocks held down by", "Of all samples", "GPUs", "Most on"), rows, numeric=(1, 2))
