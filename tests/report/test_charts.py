"""Charts against what a reader would read off them, and ticks against their definition."""

import math
import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.report.charts import (
    HEAT_EDGES,
    Band,
    Bar,
    Series,
    bars,
    heat_level,
    heat_map,
    line_chart,
    nice_ticks,
    spread,
    tick_labels,
)

reasonable = st.floats(-1e12, 1e12).filter(lambda v: v == 0 or abs(v) > 1e-9)


def draw(series: list[Series], **more: object) -> ET.Element:
    words = {"id": "i", "title": "t", "description": "d", "x_title": "x", "y_title": "y", "x_range": (0.0, 100.0)}
    return ET.fromstring(line_chart(series, **(words | more)))  # type: ignore[arg-type]


def read_off(svg: ET.Element, axis: str) -> tuple[float, float, float, float]:
    """Two ticks' values and pixels: what a reader holds a ruler to."""
    found = []
    for text in svg.iterfind(f".//text[@class='{axis}-tick']"):
        assert text.text is not None
        pixel = float(text.attrib[axis]) - (4 if axis == "y" else 0)  # labels sit 4 px below their line
        scale = {"k": 1e3, "M": 1e6}.get(text.text[-1], 1.0)
        found.append((float(re.sub(r"[^\d.-]", "", text.text)) * scale, pixel))
    (v0, p0), (v1, p1) = found[0], found[-1]
    return v0, p0, v1, p1


@given(reasonable, reasonable)
def test_ticks_are_round_evenly_spaced_and_cover_the_range(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    ticks = nice_ticks(low, high)
    step = ticks[1] - ticks[0]
    slack = 1e-6 * max(abs(low), abs(high), step)
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert all(math.isclose(d - c, step, rel_tol=1e-6) for c, d in pairwise(ticks))
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert any(math.isclose(mantissa, round_number, rel_tol=1e-6) for round_number in (1, 2, 2.5, 5))


@given(reasonable, reasonable)
def test_tick_labels_differ_and_tell_the_ticks_value(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    if high - low < 1e-6 * max(abs(low), abs(high), 1e-3):
        return
    ticks = nice_ticks(low, high)
    labels = tick_labels(ticks)
    assert len(set(labels)) == len(labels)
    for tick, label in zip(ticks, labels, strict=True):
        scale = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(label[-1], 1.0)
        told = float(re.sub(r"[^\d.-]", "", label)) * scale
        assert math.isclose(told, tick, rel_tol=1e-4, abs_tol=(ticks[1] - ticks[0]) / 50)


@given(
    st.lists(st.floats(0.5, 9.0), min_size=2, max_size=30),
    st.sampled_from([340, 520]),
)
def test_a_line_read_off_with_the_axes_gives_its_data_back(y: list[float], width: int) -> None:
    x = [100 * i / (len(y) - 1) for i in range(len(y))]
    svg = draw([Series(x=x, y=y, name="loss")], width=width)
    line = svg.find(".//polyline")
    assert line is not None
    points = [tuple(map(float, p.split(","))) for p in line.attrib["points"].split()]
    x0, px0, x1, px1 = read_off(svg, "x")
    y0, py0, y1, py1 = read_off(svg, "y")
    for (px, py), wanted_x, wanted_y in zip(points, x, y, strict=True):
        assert x0 + (px - px0) / (px1 - px0) * (x1 - x0) == pytest.approx(wanted_x, abs=0.1)
        assert y0 + (py - py0) / (py1 - py0) * (y1 - y0) == pytest.approx(wanted_y, abs=0.01 * (y1 - y0))


def test_values_that_are_not_finite_leave_a_gap() -> None:
    svg = draw([Series(x=[0, 1, 2, 3, 4, 5], y=[1, 2, math.nan, 3, math.inf, 5])])
    pieces = [len(line.attrib["points"].split()) for line in svg.iterfind(".//polyline")]
    assert pieces == [2]
    assert len(list(svg.iterfind(".//circle"))) == 2  # the two lone points are still seen


@pytest.mark.parametrize(
    "series",
    [
        [],
        [Series(x=[], y=[], name="nothing")],
        [Series(x=[50], y=[1.0], name="one")],
        [Series(x=[0, 100], y=[math.nan, math.nan], name="nan")],
        [Series(x=[0, 100], y=[2.0, 2.0], name="flat")],
        [Series(x=[0, 100], y=[0.0, 0.0], name="zero")],
    ],
)
def test_charts_of_little_or_nothing_are_still_charts(series: list[Series]) -> None:
    svg = draw(series, from_zero=True, bands=[Band(0, 100, "Stage 1")], marks=[(3, "resumed")])
    assert len(list(svg.iterfind(".//line[@class='grid']"))) >= 2
    assert "nan" not in ET.tostring(svg, encoding="unicode").replace(">nan<", "").lower()
    draw(series, x_range=(0.0, 0.0))


@given(st.lists(st.floats(0, 200), max_size=8))
def test_end_labels_never_overlap_and_keep_their_order(wanted: list[float]) -> None:
    places = spread(wanted, 15, 0, 200)
    ordered = sorted(range(len(wanted)), key=lambda i: wanted[i])
    assert all(places[b] - places[a] >= 15 - 1e-9 for a, b in pairwise(ordered))
    assert all(-1e-9 <= place <= 200 + 1e-9 for place in places)


def test_heat_levels_mirror_each_other_and_a_tenth_is_balanced() -> None:
    assert heat_level(1.0) == heat_level(1.09) == heat_level(0.92) == 4
    assert (heat_level(0.0), heat_level(9.0)) == (0, 8)
    assert all(e * f == pytest.approx(1, abs=0.005) for e, f in zip(HEAT_EDGES, reversed(HEAT_EDGES), strict=True))


@given(st.lists(st.lists(st.floats(0, 4) | st.just(math.nan), min_size=7, max_size=7), min_size=1, max_size=5))
def test_merged_runs_of_a_heat_map_paint_every_cell_with_its_level(rows: list[list[float]]) -> None:
    svg = ET.fromstring(heat_map(rows, id="i", title="t", description="d"))
    painted = {}
    for path in svg.iterfind(".//path"):
        for x, y, run in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", path.attrib["d"]):
            for column in range(int(x), int(x) + int(run)):
                assert (int(y), column) not in painted
                painted[int(y), column] = int(path.attrib["class"].removeprefix("h"))
    brute = {(r, c): heat_level(v) for r, row in enumerate(rows) for c, v in enumerate(row) if not math.isnan(v)}
    assert painted == brute


def test_bars_are_as_long_as_their_values() -> None:
    items = [Bar("a", 1.0, "1.0", ours=True), Bar("b", 2.5, "2.5"), Bar("<c>", math.nan, "?")]
    svg = ET.fromstring(bars(items, id="i", title="t", description="d"))
    lengths = [float(rect.attrib["width"]) for rect in svg.iterfind(".//rect")]
    assert lengths[1] / lengths[0] == pytest.approx(2.5, rel=1e-2)
    assert lengths[2] == 0
    ET.fromstring(bars([], id="i", title="t", description="d"))
    ET.fromstring(heat_map([], id="i", title="t", description="d"))
