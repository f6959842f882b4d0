"""Plots of a report: places on the page against the figures, and what their axes say."""

from __future__ import annotations

import re

import pytest

from pixelflow_benchmarks.analysis import plots
from pixelflow_benchmarks.analysis.plots import Bar, Point, Series, Value
from pixelflow_benchmarks.analysis.suite_plots import figures_of
from pixelflow_benchmarks.analysis.svg import Look, drawing, looks, numbered
from pixelflow_benchmarks.analysis.units import percent, quantity
from support.results import measurement, run_of


def marks(svg: str, color: str) -> list[list[tuple[float, float]]]:
    """Corners of all paths of one fill."""
    found = re.findall(r'<path d="([^"]*)"[^>]*fill: ' + color, svg)
    return [[(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path)] for path in found]


def texts(svg: str) -> list[tuple[str, float, str]]:
    """Text, x and anchor."""
    found = re.findall(r'<text style="([^"]*)" x="([\d.-]+)"[^>]*>([^<]*)<', svg)
    return [(said, float(x), re.findall(r"text-anchor: (\w+)", style + "; text-anchor: start")[0])
            for style, x, said in found]  # fmt: skip


LOOK = Look("#2f81c9", "o")


def bars_of(*medians: float, floor: float | None = None) -> str:
    with drawing():
        rows = [Bar(label=f"v{m:g}", look=LOOK, value=Value(m, m, m), floor=floor) for m in medians]
        rows.append(Bar(label="bad", look=LOOK, note="wrong: no time", wrong=True))
        return plots.bars(rows, "s", "time")


def test_bars_begin_at_zero_and_the_floor_is_where_it_belongs() -> None:
    svg = bars_of(1.0, 3.0, floor=2.0)
    short, long = marks(svg, LOOK.color)
    left = min(x for x, _ in short)
    assert left == min(x for x, _ in long) == float(re.findall(r'<rect x="([\d.]+)"', svg)[0]), "where the axes begin"
    widths = [max(x for x, _ in bar) - left for bar in (short, long)]
    assert widths[1] / widths[0] == pytest.approx(3, rel=1e-3)
    floors = re.findall(r'd="M ([\d.]+) [\d.]+\s*L ([\d.]+) [\d.]+\s*"[^>]*stroke-dasharray', svg)
    assert len(floors) == 2, "not for the wrong one"
    assert [(float(a) - left) / widths[0] for a, _ in floors] == pytest.approx([2, 2], rel=1e-3)
    assert "var(--wrong)" in svg
    assert "currentColor" in svg
    assert "#010203" not in svg


def test_who_is_absent_everywhere_takes_no_row_in_every_plot() -> None:
    """A list above the plots has them. Who is absent in one case, for want of memory, has a row there."""
    cases = [measurement(case, name, 1.0) for case in ("stage 0", "stage 1") for name in ("reference", "ours")]
    gone = [{"kind": "absent", "variant": "flash", "reason": "not installed"},
            {"kind": "absent", "variant": "large", "reason": "not enough memory", "case": "stage 1"}]  # fmt: skip
    with drawing():
        panels = {panel.title: panel.svg for panel in next(figures_of(run_of("stages", *cases, *gone))).panels}
    assert panels.keys() == {"stage 0", "stage 1"}
    assert not any(">flash<" in svg for svg in panels.values())
    assert [title for title, svg in panels.items() if ">large<" in svg] == ["stage 1"]


def test_what_spans_decades_is_dots() -> None:
    assert len(marks(bars_of(1.0, 10.0), LOOK.color)) == 2
    assert not marks(bars_of(1.0, 100.0), LOOK.color)


def test_no_text_is_outside_of_its_plot() -> None:
    long = "a name.of many-parts that goes on and on and on" * 5
    wide = Value(1234.5, 1000.0, 2000.0)
    with drawing():
        rows = [Bar(label=long, look=LOOK, value=wide, note=" (100 %)", floor=1.0),
                Bar(label="漢字" * 30, look=LOOK, note=long, wrong=True)]  # fmt: skip
        points = [Point(f"stage {n}", LOOK, 1 + n / 10, 1e12) for n in range(8)]
        series = [Series(name="a", look=LOOK, values={"x": wide, long: wide})]
        many = [Series(name="a", look=LOOK, values={n: Value(n * 1e-5, n * 1e-5, n * 1e-5) for n in range(1, 40)})]
        svgs = [
            plots.bars(rows, "s", "time"),
            plots.dots(["x", long], series, "speed"),
            plots.roofline(points, 1e12, 1e14),
            plots.lines(many, "run", "s", log_x=False, small=True),
            plots.lines(many, "tokens", "s", {1: 1e-6}),
        ]
    for svg in svgs:
        width = float(re.findall(r'width="([\d.]+)"', svg)[0])
        for said, x, anchor in texts(svg):
            room = 6.0 * len(said)
            left = x - {"start": 0, "middle": room / 2, "end": room}[anchor]
            assert left > -4, said
            assert left + room < width + 4, said


def test_names_above_a_roofline_do_not_overlap() -> None:
    with drawing():
        svg = plots.roofline([Point(f"stage {n}", LOOK, 100 + n, 1e13) for n in range(4)], 1e12, 1e14)
    heights = re.findall(r'y="([\d.]+)"[^>]*>stage \d<', svg)
    assert len(set(heights)) == 4


def test_a_point_at_the_ceiling_lies_on_the_roof() -> None:
    with drawing():
        svg = plots.roofline([Point("a", LOOK, 1000.0, 1e14), Point("a", LOOK, 10.0, 1e13)], 1e12, 1e14)
    (roof,) = re.findall(r'd="M ([^"]*)"[^>]*stroke-dasharray', svg)
    corners = [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", roof)]
    points = [
        (float(x), float(y))
        for x, y in re.findall(r'<use href="#[^"]*" x="([\d.]+)" y="([\d.]+)" style="fill: #2f81c9', svg)
    ]
    compute, memory = points
    assert compute[1] == pytest.approx(corners[1][1], abs=0.1) == pytest.approx(corners[2][1], abs=0.1)
    slope = (corners[1][1] - corners[0][1]) / (corners[1][0] - corners[0][0])
    assert memory[1] == pytest.approx(corners[0][1] + slope * (memory[0] - corners[0][0]), abs=0.5)


def test_plots_of_one_page_do_not_share_names() -> None:
    svg = '<g id="axes_1"><path id="m1"/><use href="#m1"/><text> id="m1" </text></g>'
    assert numbered(svg, 3) == '<g><path id="p3-m1"/><use href="#p3-m1"/><text> id="m1" </text></g>'


def test_looks_tell_names_apart() -> None:
    names = ["reference", *(f"v{n}" for n in range(20)), "reference"]
    found = looks(names, ["reference"])
    assert len(set(found.values())) == 21
    assert next(iter(found)) == "reference"


@pytest.mark.parametrize(
    ("value", "unit", "said"),
    [
        (0.0242, "s", "24.2 ms"),
        (9.996e-4, "s", "1.00 ms"),
        (1234.0, "s", "1234 s"),
        (0, "s", "0 s"),
        (2.5e-10, "s", "0.250 ns"),
        (-1e-9, "s", "-1.00 ns"),
        (4.12e14, "FLOP/s", "412 TFLOP/s"),
        (1e18, "B/s", "1000 PB/s"),
        (3 * 2**30, "B", "3.00 GiB"),
    ],
)
def test_quantities(value: float, unit: str, said: str) -> None:
    assert quantity(value, unit) == said


def test_percent() -> None:
    assert [percent(x) for x in (0.69, 0.0123, 1.5, 0)] == ["69 %", "1.2 %", "150 %", "0.0 %"]
