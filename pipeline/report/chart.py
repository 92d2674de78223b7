"""Line charts as inline SVG: axes with 1-2-5 ticks, a legend above the plot, thousands of points thinned out."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.report.page import Html, svg, tag

Point = tuple[float, float]
Look = Literal["main", "fine", "thin", "second", "third", "fourth", "fifth", "level"]

FONT = 12.0  # pixels; texts are placed by an estimate of their width, there being no font to measure
WIDEST = 0.6 * FONT  # of one character
LARGEST = 1e100  # values beyond are not drawn: differences of them would overflow
MOST_DOTS = 80  # a line with more points is drawn without dots

STYLE = """
svg { display: block; width: 100%; height: auto; font: 12px var(--font); }
svg text { fill: var(--quiet); font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .axis { stroke: var(--quiet); stroke-width: 1; }
svg .mark { stroke: var(--quiet); stroke-width: 1; stroke-dasharray: 1 3; }
svg .key { fill: var(--ink); }
svg path { fill: none; stroke-linejoin: round; stroke-linecap: round; }
svg .main { stroke: var(--main); stroke-width: 2.2; }
svg .fine { stroke: var(--main); stroke-width: 1.3; }
svg .thin { stroke: var(--thin); stroke-width: 1.1; }
svg .second { stroke: var(--second); stroke-width: 2.2; }
svg .third { stroke: var(--good); stroke-width: 2.2; }
svg .fourth { stroke: var(--busy); stroke-width: 2.2; }
svg .fifth { stroke: var(--bad); stroke-width: 2.2; }
svg .level { stroke: var(--level); stroke-width: 1.6; stroke-dasharray: 7 5; stroke-linecap: butt; }
svg circle { fill: var(--page); stroke-width: 1.8; }
"""


@dataclass(frozen=True)
class Line:
    """``points`` (x, y), x not descending; ``dots`` marks each of them. A level of one point is drawn over all x.

    ``legend`` stands in the legend instead of ``name``; the empty text leaves the line out of it. The line breaks
    where x jumps by more than ``gap``.
    """

    name: str
    points: Sequence[Point]
    look: Look = "main"
    dots: bool = False
    legend: str | None = None
    gap: float = math.inf


@dataclass(frozen=True)
class Chart:
    """Lines over a common x from 0 on. ``marks``: x and label of vertical ticks. ``from_zero``: y begins at 0, too.

    ``until``: x goes on at least to here, so that charts beside each other share their axis.
    """

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    marks: Sequence[tuple[float, str]] = ()
    from_zero: bool = False
    until: float = 0.0


@dataclass(frozen=True)
class Axis:
    """A range of values with the ticks that fall into it."""

    low: float
    high: float
    ticks: tuple[float, ...]
    step: float

    def place(self, value: float) -> float:
        """Where the value lies, 0 to 1."""
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))


def axis(values: Sequence[float], *, ticks: int, widen: bool) -> Axis:
    """An axis over ``values`` with about ``ticks`` round ticks; ``widen`` extends it to the next ticks outside.

    The step is 1, 2 or 5 times a power of ten (Heckbert, "Nice Numbers for Graph Labels", Graphics Gems, 1990).
    """
    low, high = min(values), max(values)
    largest = max(abs(low), abs(high))
    if high - low <= 1e-9 * largest or high - low < 1e-90:
        pad = 0.05 * largest if largest > 1e-80 else 1.0
        low, high = low - pad if low else 0.0, high + pad
    raw = (high - low) / ticks
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(nice * power for nice in (1, 2, 5, 10, 20) if nice * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    if first > last:  # a short axis between two ticks: the next finer step has one inside
        step = next(nice * power for nice in (10, 5, 2, 1, 0.5) if nice * power < step * 0.999)
        first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    if widen:
        first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
        low, high = min(low, first * step), max(high, last * step)
    return Axis(low, high, tuple(number * step for number in range(first, last + 1)), step)


def tick_label(value: float, step: float, largest: float) -> str:
    """A tick's value with exactly the digits that its step needs."""
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if abs(value) < step / 1e3:
        return "0"
    if largest >= 1e12 or decimals > 4:
        digits = max(0, math.floor(math.log10(abs(value)) + 1e-9) + decimals) if step < 1 else 3
        mantissa, _, exponent = f"{value:.{min(digits, 12)}e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    for unit, scale, least in (("M", 1e6, 1e6), ("k", 1e3, 1e4)):
        if largest >= least and step >= scale / 10:
            return f"{value / scale:,.{0 if step >= scale else 1}f}{unit}"
    return f"{value:,.{decimals}f}"


def thin(points: Sequence[Point], low: float, high: float, buckets: int) -> list[Point]:
    """At most four points (first, lowest, highest, last) of every bucket of x: peaks and edges stay."""
    if len(points) <= 4 * buckets:
        return list(points)
    kept: list[Point] = []
    groups: dict[int, list[int]] = {}
    for index, (x, _) in enumerate(points):
        groups.setdefault(int((x - low) / (high - low) * buckets), []).append(index)
    for members in groups.values():
        lowest = min(members, key=lambda index: points[index][1])
        highest = max(members, key=lambda index: points[index][1])
        kept += [points[index] for index in sorted({members[0], lowest, highest, members[-1]})]
    return kept


def drawable(point: Point) -> bool:
    return all(abs(value) <= LARGEST for value in point)


def draw(chart: Chart, *, key: str, width: int = 460, height: int = 250) -> Html:
    """The chart as ``<svg>`` with a title and a description; ``key`` makes its ids unique in the page.

    Values that are not finite are left out, and the chart says how many.
    """
    lines = [replace(line, points=[p for p in line.points if drawable(p)]) for line in chart.lines]
    dropped = sum(len(line.points) for line in chart.lines) - sum(len(line.points) for line in lines)
    lines = [line for line in lines if line.points]
    missing = f"{dropped} value{'s are' if dropped > 1 else ' is'} not finite and not drawn" if dropped else ""
    if lines:
        body = _plot(chart, lines, missing, width, height)
    else:
        why = f"no values{': ' + missing if missing else ''}"
        body = tag("text", why, x=width / 2, y=height / 2, text_anchor="middle")
    return svg(key, chart.title, describe(lines, missing), body, width=width, height=height)


def strips(
    title: str, rows: Sequence[tuple[str, Sequence[float]]], x_label: str, *, key: str, width: int = 460
) -> Html:
    """A line of dots for each row, with its mean and the standard deviation (n - 1) to both sides, as ``<svg>``."""
    rows = [(name, [value for value in values if abs(value) <= LARGEST]) for name, values in rows]
    rows = [(name, values) for name, values in rows if len(values) > 1]
    x = axis([value for _, values in rows for value in values] or [0.0, 1.0], ticks=5, widen=True)
    height = 46 * len(rows) + 44
    labels = [tick_label(tick, x.step, max(map(abs, x.ticks))) for tick in x.ticks]
    side = max(8.0, WIDEST * max(map(len, labels)) / 2)
    frame = _Frame(side, width - side, 0.0, height - 44.0, x, x)
    pieces, words = [], []
    for tick, label in zip(x.ticks, labels, strict=True):
        at = frame.across(tick)
        pieces.append(_segment("grid", at, 0, at, frame.bottom))
        pieces.append(tag("text", label, x=at, y=round(frame.bottom + 16, 1), text_anchor="middle"))
    pieces.append(tag("text", x_label, x=width / 2, y=height - 8, text_anchor="middle"))
    for number, (name, values) in enumerate(rows):
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        y = 46 * number + 32
        words.append(f"{name}: {len(values)} seeds, mean {mean:.4g}, deviation {deviation:.3g}, from {min(values):.4g} "
                    f"to {max(values):.4g}.")  # fmt: skip
        pieces.append(tag("text", name, class_="key", x=8, y=y - 16))
        pieces.append(_segment("level", frame.across(mean - deviation), y, frame.across(mean + deviation), y))
        pieces.append(_segment("main", frame.across(mean), y - 9, frame.across(mean), y + 9))
        pieces += [tag("circle", tag("title", f"{value:.4g}"), class_="second", cx=frame.across(value), cy=y, r=3.2)
                   for value in values]  # fmt: skip
    return svg(key, title, " ".join(words), *pieces, width=width, height=height)


def describe(lines: Sequence[Line], missing: str) -> str:
    """The chart in words, for those who cannot see it."""
    words = [
        f"{line.name}: {line.points[0][1]:.4g}."
        if line.look == "level"
        else f"{line.name}: from {line.points[0][1]:.4g} at {line.points[0][0]:.6g} to {line.points[-1][1]:.4g} "
        f"at {line.points[-1][0]:.6g}, lowest {min(y for _, y in line.points):.4g}, "
        f"highest {max(y for _, y in line.points):.4g}."
        for line in lines
    ]
    return " ".join([*words, *([missing + "."] if missing else [])])


@dataclass(frozen=True)
class _Frame:
    """The plot's edges in pixels and its axes."""

    left: float
    right: float
    top: float
    bottom: float
    x: Axis
    y: Axis

    def across(self, value: float) -> float:
        return round(self.left + (self.right - self.left) * self.x.place(value), 1)

    def up(self, value: float) -> float:
        return round(self.bottom - (self.bottom - self.top) * self.y.place(value), 1)


def _plot(chart: Chart, lines: Sequence[Line], missing: str, width: int, height: int) -> Html:
    entries, legend_bottom = _legend(lines, width)
    marks = [(x, label) for x, label in chart.marks if drawable((x, 0.0))]
    xs = [x for line in lines if line.look != "level" for x, _ in line.points] or [0.0, 1.0]
    x = axis([0.0, chart.until, *xs, *(mark for mark, _ in marks)], ticks=max(2, width // 90), widen=False)
    if chart.x_label == "step" and x.step < 1:  # there is no half step
        x = replace(x, ticks=tuple(map(float, range(math.ceil(x.low), math.floor(x.high) + 1))), step=1.0)
    ys = [y for line in lines for _, y in line.points]
    y = axis([*ys, *([0.0] if chart.from_zero else [])], ticks=5, widen=True)
    labels = [tick_label(tick, y.step, max(map(abs, y.ticks))) for tick in y.ticks]
    left = min(width / 3, 10 + WIDEST * max(map(len, labels)))
    top = legend_bottom + FONT + 26
    bottom = height - 2.9 * FONT - (FONT + 4 if missing else 0)
    frame = _Frame(left, width - 22.0, top, bottom, x, y)
    pieces = [*entries, tag("text", chart.y_label, x=0, y=round(top - 13, 1))]
    for tick, label in zip(y.ticks, labels, strict=True):
        at = frame.up(tick)
        pieces.append(_segment("grid", frame.left, at, frame.right, at))
        pieces.append(tag("text", label, x=round(frame.left - 6, 1), y=round(at + 4, 1), text_anchor="end"))
    pieces.append(_segment("axis", frame.left, bottom, frame.right, bottom))
    for tick in x.ticks:
        at, label = frame.across(tick), tick_label(tick, x.step, max(map(abs, x.ticks)))
        pieces.append(_segment("axis", at, bottom, at, bottom + 4))
        pieces.append(tag("text", label, x=at, y=round(bottom + 17, 1), text_anchor="middle"))
    middle = round((frame.left + frame.right) / 2, 1)
    pieces.append(tag("text", chart.x_label, x=middle, y=round(bottom + 31, 1), text_anchor="middle"))
    pieces += _marks(frame, marks)
    pieces += [piece for line in lines for piece in _line(frame, line)]
    if missing:
        pieces.append(tag("text", missing, x=0, y=height - 4))
    return Html("".join(pieces))


def _legend(lines: Sequence[Line], width: int) -> tuple[list[Html], float]:
    """One entry a line, from left to right and wrapped, above everything else; and where it ends."""
    pieces, x, y = [], 0.0, FONT
    for line in lines:
        name = line.name if line.legend is None else line.legend
        if not name:
            continue
        needed = 30 + WIDEST * len(name) + 14
        if x and x + needed > width:
            x, y = 0.0, y + FONT + 6
        pieces.append(_segment(line.look, x + 1, y - 4, x + 23, y - 4))
        if line.dots:
            pieces.append(tag("circle", class_=line.look, cx=x + 12, cy=y - 4, r=2.8))
        pieces.append(tag("text", name, class_="key", x=round(x + 30, 1), y=y))
        x += needed
    return pieces, y


def _marks(frame: _Frame, marks: Sequence[tuple[float, str]]) -> list[Html]:
    """Vertical ticks with labels above the plot; a label that would touch the one before is left out."""
    pieces, free_from = [], frame.left + 40
    for x, label in sorted(marks):
        at, half = frame.across(x), WIDEST * len(label) / 2
        line = _segment("mark", at, frame.top - 9, at, frame.bottom)
        pieces.append(tag("g", tag("title", f"{label}: {x:,.0f}"), line))
        if at - half >= free_from and at + half <= frame.right + 22:
            pieces.append(tag("text", label, x=at, y=round(frame.top - 13, 1), text_anchor="middle"))
            free_from = at + half + 6
    return pieces


def _line(frame: _Frame, line: Line) -> list[Html]:
    if line.look == "level" and len(line.points) == 1:
        at = frame.up(line.points[-1][1])
        return [_segment("level", frame.left, at, frame.right, at)]
    kept = thin(line.points, frame.x.low, frame.x.high, int(frame.right - frame.left) // 2)
    spots = [(frame.across(x), frame.up(y)) for x, y in kept]
    after = [False, *(b[0] - a[0] <= line.gap for a, b in itertools.pairwise(kept))]
    path = "".join(f"{'L' if joined else 'M'}{x:g} {y:g}" for joined, (x, y) in zip(after, spots, strict=True))
    hover = tag("title", line.name) if line.legend is not None else None
    pieces = [tag("path", hover, d=path, class_=line.look)]
    if len(spots) == 1 or (line.dots and len(spots) <= MOST_DOTS):
        for (x, y), (at, value) in zip(spots, kept, strict=True):
            title = tag("title", f"{at:,.6g}: {value:.4g}")
            pieces.append(tag("circle", title, class_=line.look, cx=x, cy=y, r=2.8))
    return pieces


def _segment(look: str, x1: float, y1: float, x2: float, y2: float) -> Html:
    return tag("path", d=f"M{x1:.6g} {y1:.6g}L{x2:.6g} {y2:.6g}", class_=look)
