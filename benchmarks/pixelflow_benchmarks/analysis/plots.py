"""The plots of a report, each an SVG element: rows of bars, rows of dots, lines, a roofline."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .svg import ABSENT, FAINT, INK, WRONG, Look, new_figure, to_svg
from .units import percent, quantity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

LETTER = 6.3
"""Width in pixels of an average letter at the plots' font size, in the widest of the usual fonts."""
STEP = 9
"""Pixels between two dots of a row."""
LOG_FROM = 20
"""Ratio of values above which bars become dots: a bar starts at zero, which a logarithmic axis does not have."""


@dataclass(frozen=True, slots=True)
class Value:
    """The median, 20th and 80th percentile of repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, spread: Mapping[str, float]) -> Value:
        """Return the value in a record."""
        return cls(spread["median"], spread["low"], spread["high"])

    @property
    def drawable(self) -> bool:
        """Whether it has a place on a logarithmic axis; a short time may be negative once overhead is subtracted."""
        return self.median > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """A row of :func:`bars`.

    Attributes:
        label: name of the row.
        look: how it is drawn.
        value: length of the bar; None if the result was wrong or absent.
        floor: the least possible value.
        note: text after the value, or instead of it.
        wrong: whether the note is a fault.
    """

    label: str
    look: Look
    value: Value | None = None
    floor: float | None = None
    note: str = ""
    wrong: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """Values by their place: a row of :func:`dots`, or x in :func:`lines`."""

    name: str
    look: Look
    values: Mapping[Any, Value]


def bars(rows: Sequence[Bar], unit: str, per: str) -> str:
    """Draw horizontal bars from zero with whiskers, floor and value; dots on a logarithmic axis for a wide range."""
    from matplotlib.ticker import MaxNLocator, MultipleLocator

    found = [row.value for row in rows if row.value is not None and row.value.drawable]
    floors = [row.floor for row in rows if row.floor and row.value is not None]
    largest = max([value.high for value in found] + floors, default=1.0)
    smallest = min([value.median for value in found], default=1.0)
    log = largest / smallest > LOG_FROM
    labels = [_folded(row.label) for row in rows]
    heights = [24 + 13 * label.count("\n") for label in labels]
    figure, axes, room = _row_axes(labels, heights, width=520, right=26)
    tops = [sum(heights[:i]) for i in range(len(rows) + 1)]
    said = [f"{quantity(row.value.median, unit)}{row.note}" if row.value else row.note for row in rows]
    letters = max((_width(text) for row, text in zip(rows, said, strict=True) if row.value), default=0)
    share = max(0.3, 1 - (LETTER * letters + 12) / room)
    if log:
        low = min([smallest, *(value.low for value in found if value.low > 0), *floors]) / 1.5
        axes.set_xscale("log")
        axes.set_xlim(low, low * (largest / low) ** (1 / share))
        _time_ticks(axes.xaxis, low, largest, unit, log)
    else:
        axes.set_xlim(0, largest / share)
        # Bytes are displayed in powers of two, so their ticks are too.
        step = 2 ** math.ceil(math.log2(largest / 3))
        axes.xaxis.set_major_locator(MultipleLocator(step) if unit == "B" else MaxNLocator(3 if room < 260 else 4))
        axes.xaxis.set_major_formatter(lambda value, place: _round(quantity(value, unit, 2)))
    start = axes.get_xlim()[0]
    for row, text, top, height in zip(rows, said, tops, heights, strict=False):
        y = top + height / 2
        if row.value is None or not row.value.drawable:
            color = WRONG if row.wrong else ABSENT
            axes.text(0.012, y, _cut(text, room), color=color, va="center", transform=axes.get_yaxis_transform())
            continue
        value = row.value
        error = [[max(0.0, value.median - max(value.low, start))], [max(0.0, value.high - value.median)]]
        if log:
            axes.plot(value.median, y, marker=row.look.marker, color=row.look.color, linestyle="none")
        else:
            axes.barh(y, value.median, height=14, color=row.look.color, alpha=0.85, linewidth=0)
        if value.low < value.high:
            axes.errorbar(value.median, y, xerr=error, color=INK, elinewidth=1.1, capsize=2.5, capthick=1.1, fmt="none")
        beside = max(value.high, row.floor or 0.0)
        axes.annotate(text, (beside, y), (6, 0), textcoords="offset points", va="center", fontsize=10.5)
        if row.floor:
            axes.vlines(row.floor, top, top + height, colors=INK, linestyles=(0, (4, 2)), linewidth=1.3)
    axes.set_xlabel(per)
    return to_svg(figure)


def dots(rows: Sequence[str], series: Sequence[Series], axis: str, share: bool = False) -> str:
    """Draw dots with whiskers, a row for each name, and a line at 1.

    Args:
        rows: names, which are the places of the series' values.
        series: drawn one below the other within a row.
        axis: label of the values' axis.
        share: whether the values are shares of the floor instead of ratios.
    """
    labels = [_folded(row) for row in rows]
    within = [[one for one in series if row in one.values and one.values[row].drawable] for row in rows]
    heights = [
        max(24 + 13 * label.count("\n"), 14 + STEP * len(here)) for label, here in zip(labels, within, strict=True)
    ]
    figure, axes, _ = _row_axes(labels, heights, width=520, right=22)
    found = [value for one in series for value in one.values.values() if value.drawable]
    low = min([value.low if value.low > 0 else value.median for value in found] + [1.0])
    high = max([value.high for value in found] + [1.0])
    if share:
        axes.set_xlim(0, high * 1.04)
        axes.xaxis.set_major_formatter(lambda value, place: percent(value).replace("0.0 %", "0 %"))
    elif high / low > LOG_FROM / 2:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.15, high * 1.15)
        _log_ticks(axes.xaxis, low, high, lambda value: f"{value:g}")
    else:
        axes.set_xlim(0, high * 1.08)
        axes.xaxis.set_major_formatter(lambda value, place: f"{value:g}")
    axes.axvline(1, color=INK, linewidth=1.3, linestyle=(0, (4, 2)))
    start = axes.get_xlim()[0]
    for place, (row, here) in enumerate(zip(rows, within, strict=True)):
        top, height = sum(heights[:place]), heights[place]
        if place:
            axes.axhline(top, color=FAINT, linewidth=0.8)
        for i, one in enumerate(here):
            value, y = one.values[row], top + height / 2 + STEP * (i - (len(here) - 1) / 2)
            axes.hlines(y, max(value.low, start), value.high, colors=one.look.color, linewidth=1.6)
            axes.plot(value.median, y, marker=one.look.marker, color=one.look.color, linestyle="none", clip_on=False)
    axes.set_xlabel(axis)
    return to_svg(figure)


def lines(
    series: Sequence[Series],
    across: str,
    unit: str,
    floor: Mapping[float, float] | None = None,
    log_x: bool = True,
    small: bool = False,
) -> str:
    """Draw lines through medians, with whiskers; the axis of values is logarithmic if they span a wide range.

    Args:
        series: values by their place on the horizontal axis.
        across: label of that axis.
        unit: unit of the values.
        floor: the least possible value by place, drawn dashed.
        log_x: whether the horizontal axis is logarithmic, for places that double from one to the next.
        small: whether the plot is small.
    """
    width, height = (330, 190) if small else (400, 280)
    figure = new_figure(width, height)
    axes = figure.add_axes((66 / width, 46 / height, 1 - 84 / width, 1 - 58 / height))
    places = sorted({place for one in series for place in one.values})
    found = [value for one in series for value in one.values.values() if value.drawable]
    low = min([value.median for value in found] + list((floor or {}).values()), default=1.0)
    high = max([value.high for value in found], default=1.0)
    if log_x and len(places) > 1:
        axes.set_xscale("log")
    _places(axes.xaxis, places, log_x)
    _time_ticks(axes.yaxis, low, high, unit, _set_y(axes, low, high))
    axes.grid(axis="y", alpha=0.7)
    for one in series:
        points = [(place, one.values[place]) for place in places if place in one.values and one.values[place].drawable]
        if not points:
            continue
        x, values = zip(*points, strict=True)
        medians = [value.median for value in values]
        axes.plot(x, medians, color=one.look.color, marker=one.look.marker, linewidth=1.5, clip_on=False)
        axes.vlines(x, [v.low if v.low > 0 else v.median for v in values], [v.high for v in values],
                    colors=one.look.color, linewidth=1.2)  # fmt: skip
    if floor:
        at = sorted(floor)
        axes.plot(at, [floor[place] for place in at], color=INK, linewidth=1.3, linestyle=(0, (4, 2)))
    axes.set_xlabel(across)
    return to_svg(figure)


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a roofline: arithmetic intensity in FLOP per byte, rate in FLOP/s."""

    name: str
    look: Look
    intensity: float
    rate: float


def roofline(points: Sequence[Point], bytes_per_second: float, flops_per_second: float) -> str:
    """Draw points below the device's ceilings, with a name above each intensity."""
    ridge = flops_per_second / bytes_per_second
    places = sorted({(point.intensity, point.name) for point in points})
    left, right = min(places[0][0], ridge) / 2, max(places[-1][0], ridge) * 2
    width, height = 520, 340
    figure = new_figure(width, height)
    axes = figure.add_axes((82 / width, 48 / height, 1 - 100 / width, 1 - 58 / height))
    axes.set_xscale("log")
    axes.set_yscale("log")
    lowest = min([point.rate for point in points] + [left * bytes_per_second])
    axes.set_xlim(left, right)
    axes.set_ylim(lowest / 2, flops_per_second * 6)
    _log_ticks(axes.xaxis, left, right, lambda value: f"{value:g}")
    _log_ticks(axes.yaxis, lowest / 2, flops_per_second * 2, lambda value: quantity(value, "FLOP/s", 1))
    axes.grid(alpha=0.6)
    axes.plot([left, ridge, right], [left * bytes_per_second, flops_per_second, flops_per_second], color=INK,
              linewidth=1.5, linestyle=(0, (4, 2)))  # fmt: skip
    # Names go onto as many lines above the roof as are needed to keep them apart.
    ends: list[float] = []
    for intensity, name in places:
        x = (width - 100) * math.log(intensity / left) / math.log(right / left)
        half = LETTER * _width(name) / 2 + 4
        level = next((i for i, end in enumerate(ends) if x - half > end), len(ends))
        ends[level : level + 1] = [x + half]
        axes.axvline(intensity, color=FAINT, linewidth=0.8)
        axes.annotate(name, (intensity, 1), (0, -6 - 14 * level), xycoords=axes.get_xaxis_transform(),
                      textcoords="offset points", ha="center", va="top", fontsize=10.5)  # fmt: skip
    for point in points:
        axes.plot(point.intensity, point.rate, marker=point.look.marker, color=point.look.color, linestyle="none")
    axes.set_xlabel("arithmetic intensity, FLOP per byte")
    return to_svg(figure)


def _row_axes(
    labels: Sequence[str], heights: Sequence[float], width: float, right: float
) -> tuple[Figure, Axes, float]:
    """Return a figure, its axes with a labelled row for each label from the top, and their width; y is in pixels."""
    letters = max(_width(line) for label in labels for line in label.split("\n"))
    left, below, total = min(LETTER * letters + 14, width / 2), 42, sum(heights)
    height = total + below + 4
    figure = new_figure(width, height)
    room = width - left - right
    axes = figure.add_axes((left / width, below / height, room / width, total / height))
    axes.set_ylim(total, 0)
    middles = [sum(heights[:i]) + heights[i] / 2 for i in range(len(heights))]
    axes.set_yticks(middles, labels)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.7)
    return figure, axes, room


def _set_y(axes: Axes, low: float, high: float) -> bool:
    """Set limits around the values; return whether the axis is logarithmic."""
    if high / low > 5:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.3, high * 1.3)
        return True
    around = max(0.15 * (high - low), 0.03 * high)
    axes.set_ylim(max(0.0, low - around), high + around)
    return False


def _time_ticks(axis: Axis, low: float, high: float, unit: str, log: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    if log:
        _log_ticks(axis, low, high, lambda value: quantity(value, unit, 1))
        return
    axis.set_major_locator(MaxNLocator(4))
    axis.set_major_formatter(lambda value, place: _round(quantity(value, unit)))


def _log_ticks(axis: Axis, low: float, high: float, said: Callable[[float], str]) -> None:
    """Set ticks at powers of ten, over few decades also between; labels are of rounded values, without float noise."""
    from matplotlib.ticker import LogLocator, NullLocator

    decades = math.log10(high / low)
    axis.set_major_locator(
        LogLocator(subs=(1, 2, 5) if decades < 1.5 else (1, 3) if decades < 2.5 else (1,), numticks=8)
    )
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, place: said(float(f"{value:.3g}")))


def _round(text: str) -> str:
    """Return a quantity without trailing zeros."""
    number, _, unit = text.partition(" ")
    number = number.rstrip("0").rstrip(".") if "." in number else number
    return "0" if number == "0" else f"{number} {unit}"


def _places(axis: Axis, places: Sequence[float], log: bool) -> None:
    """Set ticks at the places that have values; on a linear axis (of runs) no more than fit."""
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    axis.set_minor_locator(NullLocator())
    if not log and len(places) > 10:
        axis.set_major_locator(MaxNLocator(8, integer=True))
    else:
        axis.set_major_locator(FixedLocator(list(places)))
    axis.set_major_formatter(lambda value, place: f"{value:g}")


def _width(text: str) -> float:
    """Return the text's width in letters; wide East Asian characters count twice."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def _folded(text: str, letters: int = 30, most: int = 3) -> str:
    """Fold a text into at most ``most`` lines, at blanks and dots where possible; the rest is cut off."""
    found, line = [], ""
    for word in re.findall(r"[^\s.]*\.|\S+?(?=\.)|\s+|[^\s.]+", text):
        if line and _width(line + word.rstrip()) > letters:
            found.append(line.strip())
            line = ""
        line += word
        while _width(line.strip()) > letters:
            found.append(line.strip()[:letters])
            line = line.strip()[letters:]
    found.append(line.strip())
    found = [line for line in found if line] or [""]
    return "\n".join(found if len(found) <= most else [*found[: most - 1], found[most - 1][: letters - 1] + "…"])


def _cut(text: str, room: float) -> str:
    letters = max(4, int(room / LETTER) - 2)
    return text if len(text) <= letters else text[: letters - 1] + "…"
