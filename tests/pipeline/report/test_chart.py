"""Charts: whatever the data, every coordinate lies inside the picture, and what is left out is said."""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.report.chart import FONT, Chart, Line, axis, draw, strips, thin, tick_label

ANY = st.floats(allow_nan=True, allow_infinity=True)
FINITE = st.floats(min_value=-1e100, max_value=1e100)
STRIP = st.lists(st.floats(min_value=-1e6, max_value=1e6), min_size=2, max_size=9)
SIZES = [(460, 250), (940, 340)]


def parsed(chart: Chart, size: tuple[int, int] = SIZES[0]) -> ElementTree.Element:
    return ElementTree.fromstring(draw(chart, key="k", width=size[0], height=size[1]))


@given(st.lists(STRIP, min_size=1, max_size=4))
def test_every_seed_of_a_strip_lies_inside_and_in_order(rows):
    svg = ElementTree.fromstring(strips("t", [(str(n), row) for n, row in enumerate(rows)], "%", key="k"))
    width, height = map(float, svg.attrib["viewBox"].split()[2:])
    assert all(-1 <= x <= width + 1 and -1 <= y <= height + 1 for x, y in places(svg))
    dots = [element for element in svg.iter() if element.tag == "circle"]
    for number, row in enumerate(rows):
        own = [float(dot.attrib["cx"]) for dot in dots[: len(row)]]
        del dots[: len(row)]
        assert [own[i] for i in sorted(range(len(row)), key=row.__getitem__)] == sorted(own), number


def places(svg: ElementTree.Element) -> list[tuple[float, float]]:
    """Every point that is drawn, and both ends of every text as wide as an average font makes it."""
    found = []
    for element in svg.iter():
        if "d" in element.attrib:
            numbers = [float(n) for n in re.findall(r"-?\d[\d.e+-]*|nan|inf", element.attrib["d"])]
            found += list(zip(numbers[::2], numbers[1::2], strict=True))
        if element.tag == "circle":
            found.append((float(element.attrib["cx"]), float(element.attrib["cy"])))
        if element.tag == "text":
            x, y = float(element.attrib["x"]), float(element.attrib["y"])
            wide = 0.52 * FONT * len(element.text or "")
            before = {"middle": 0.5, "end": 1.0}.get(element.attrib.get("text-anchor", ""), 0.0)
            found += [(x - before * wide, y - 0.7 * FONT), (x + (1 - before) * wide, y)]
    return found


@settings(deadline=None, max_examples=300)
@given(
    ys=st.lists(st.tuples(st.integers(0, 10**7), ANY), max_size=60),
    second=st.lists(st.tuples(ANY, ANY), max_size=8),
    level=st.lists(FINITE, max_size=1),
    marks=st.lists(ANY, max_size=5),
    from_zero=st.booleans(),
    size=st.sampled_from(SIZES),
)
@example(ys=[(1, 1e308)], second=[], level=[], marks=[], from_zero=False, size=SIZES[0])
@example(ys=[(1, 1e16), (2, 1e16 + 4)], second=[], level=[], marks=[], from_zero=False, size=SIZES[0])
@example(ys=[(0, 5e-324), (0, 0.0)], second=[], level=[5e-324], marks=[0.0], from_zero=True, size=SIZES[0])
@example(ys=[(1, 6.5), (2, 6.5)], second=[], level=[6.5], marks=[math.inf], from_zero=False, size=SIZES[0])
def test_everything_is_drawn_inside_the_picture(ys, second, level, marks, from_zero, size):
    lines = [
        Line("training MLM loss", sorted(ys), "thin"),
        Line("held-out MLM loss 5.121", sorted(second, key=str), "main", dots=True),
        Line("unigram loss 6.553", [(0.0, value) for value in level], "level"),
    ]
    svg = parsed(Chart("t", "step", "nats", lines, [(x, "attempt 2") for x in marks], from_zero), size)
    assert svg.attrib["viewBox"] == f"0 0 {size[0]} {size[1]}"
    for x, y in places(svg):
        assert 0 <= x <= size[0]
        assert 0 <= y <= size[1]


@settings(deadline=None, max_examples=300)
@example(values=[4.736842631578947e99], widen=False, ticks=2)  # no multiple of the first step lies inside
@given(values=st.lists(FINITE, min_size=1, max_size=20), widen=st.booleans(), ticks=st.integers(2, 10))
def test_ticks_are_round_numbers_inside_the_axis(values, widen, ticks):
    found = axis(values, ticks=ticks, widen=widen)
    assert found.low <= min(values)
    assert found.high >= max(values)
    mantissa = float(f"{found.step:.6e}".partition("e")[0])
    assert mantissa in (1, 2, 5)
    assert 1 <= len(found.ticks) <= ticks + 3
    margin = 1e-5 * found.step + 1e-12 * max(abs(found.low), abs(found.high))
    assert all(found.low - margin <= tick <= found.high + margin for tick in found.ticks)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([4.87, 9.03], ["4", "5", "6", "7", "8", "9", "10"]),
        ([0.0, 0.0093], ["0", "0.002", "0.004", "0.006", "0.008", "0.010"]),
        ([0.0, 7038.0], ["0", "2,000", "4,000", "6,000", "8,000"]),
        ([0.0, 138294.0], ["0", "50k", "100k", "150k"]),
        ([0.0, 5.4e6], ["0", "2M", "4M", "6M"]),
        ([0.0, 0.0], ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ([0.0, 2.1e-5], ["0", "5e-6", "1e-5", "1.5e-5", "2e-5", "2.5e-5"]),
        ([6.5511, 6.5519], ["6.5510", "6.5512", "6.5514", "6.5516", "6.5518", "6.5520"]),
    ],
)
def test_tick_labels_have_the_digits_that_their_step_needs(values, expected):
    found = axis(values, ticks=5, widen=True)
    assert [tick_label(tick, found.step, max(map(abs, found.ticks))) for tick in found.ticks] == expected


@settings(deadline=None)
@given(values=st.lists(st.floats(0.01, 100), min_size=2, max_size=9, unique=True), exponent=st.integers(-9, 9))
def test_no_two_ticks_have_the_same_label(values, exponent):
    found = axis([value * 10.0**exponent for value in values], ticks=5, widen=True)
    labels = [tick_label(tick, found.step, max(map(abs, found.ticks))) for tick in found.ticks]
    assert len(set(labels)) == len(labels), labels


def test_values_that_are_not_finite_are_left_out_and_counted():
    svg = parsed(Chart("t", "step", "nats", [Line("loss", [(1, 2.0), (2, math.nan), (3, math.inf), (4, 3.0)])]))
    texts = [element.text or "" for element in svg.iter()]
    assert "2 values are not finite and not drawn" in texts
    path = [e.attrib["d"] for e in svg.iter("path") if e.attrib["class"] == "main"][-1]
    assert path.count("L") == 1


@pytest.mark.parametrize("points", [[], [(1.0, math.nan)]])
def test_a_chart_without_values_says_so(points):
    texts = [element.text or "" for element in parsed(Chart("t", "step", "", [Line("loss", points)])).iter()]
    assert any(text.startswith("no values") for text in texts)


def test_thinning_keeps_peaks_and_ends():
    points = [(float(x), math.sin(x / 50)) for x in range(20_000)]
    points[7777], points[12345] = (7777.0, 9.0), (12345.0, -9.0)
    kept = thin(points, 0.0, 19_999.0, 200)
    assert len(kept) <= 4 * 201
    assert {points[0], points[7777], points[12345], points[-1]} <= set(kept)
    assert kept == sorted(kept)


def test_a_long_training_stays_small():
    points = [(float(x), math.sin(x)) for x in range(200_000)]
    assert len(draw(Chart("t", "step", "", [Line("loss", points, "thin")]), key="k", width=940)) < 40_000


def test_the_picture_is_described_in_words():
    lines = [Line("held-out loss", [(25, 8.25), (400, 5.125)], dots=True), Line("unigram", [(0, 6.5)], "level")]
    svg = parsed(Chart("Loss", "step", "nats", lines))
    title, description = svg.attrib["aria-labelledby"].split()
    by_id = {element.attrib.get("id"): element.text for element in svg.iter()}
    assert by_id[title] == "Loss"
    assert "from 8.25 at 25 to 5.125 at 400" in (by_id[description] or "")
    assert "unigram: 6.5" in (by_id[description] or "")


def test_a_level_crosses_the_whole_plot_at_its_value():
    svg = parsed(Chart("t", "step", "", [Line("loss", [(0, 4.0), (10, 8.0)]), Line("unigram", [(3, 6.0)], "level")]))
    line = [e.attrib["d"] for e in svg.iter("path") if e.attrib["class"] == "main"][-1]
    level = [e.attrib["d"] for e in svg.iter("path") if e.attrib["class"] == "level"][-1]
    (x1, y1), (x2, y2) = [tuple(map(float, pair.split())) for pair in line[1:].split("L")]
    (a1, b1), (a2, b2) = [tuple(map(float, pair.split())) for pair in level[1:].split("L")]
    assert (a1, a2) == (x1, x2)
    assert b1 == b2 == pytest.approx((y1 + y2) / 2, abs=0.11)


def test_labels_of_attempts_never_overlap():
    marks = [(float(x), f"attempt {x}") for x in range(100, 140)]
    svg = parsed(Chart("t", "step", "", [Line("loss", [(0, 1.0), (400, 2.0)])], marks))
    spans = sorted(
        (float(e.attrib["x"]) - 3.2 * len(e.text or ""), float(e.attrib["x"]) + 3.2 * len(e.text or ""))
        for e in svg.iter("text")
        if (e.text or "").startswith("attempt")
    )
    assert spans
    assert all(first[1] < second[0] for first, second in itertools.pairwise(spans))
    assert len([e for e in svg.iter("path") if e.attrib["class"] == "mark"]) == 40


def test_names_are_escaped():
    svg = draw(Chart("<b>&", "step", "", [Line('"<script>', [(1, 1.0)])]), key="k")
    assert "<script>" not in svg
    assert "<b>" not in svg


def test_charts_beside_each_other_share_their_axis():
    short = Line("loss", [(0, 1.0), (10, 2.0)])
    ends = [
        [e.attrib["d"] for e in parsed(Chart("t", "step", "", [short], until=until)).iter("path")][-1].split("L")[-1]
        for until in (5.0, 20.0)
    ]
    assert float(ends[0].split()[0]) == 460 - 22
    assert float(ends[1].split()[0]) < 300
