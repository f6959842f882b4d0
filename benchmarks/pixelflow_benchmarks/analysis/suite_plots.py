"""Choose a run's plots: those for which its measurements have the fields, whatever the suite."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pixelflow_benchmarks.harness.results import Record, Run
from pixelflow_benchmarks.suites.kernels.case import STAGE_SIDES

from . import plots
from .plots import Bar, Point, Series, Value
from .svg import Look, looks
from .units import percent, quantity

TOKENS, BATCH = r"\bstage \d+", r"\bbatch \d+"
"""Parts of a case's name that give tokens and images; the name without one of them is what such cases share."""
MOST = 8
"""Above this number of cases, plots of a single number per variant are limited to the first family of cases."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot.

    Attributes:
        title: what it shows.
        svg: the plot.
        said: text alternative, for readers who cannot see the plot.
    """

    title: str
    svg: str
    said: str


@dataclass(frozen=True, slots=True)
class Figure:
    """Plots of one kind.

    Attributes:
        title: a few words.
        caption: how to read the plots.
        panels: the plots.
        legend: names and the look that they have in all plots.
        small: whether the plots are small.
    """

    title: str
    caption: str
    panels: tuple[Panel, ...]
    legend: Mapping[str, Look]
    small: bool = False


def figures_of(run: Run) -> Iterator[Figure]:
    """Yield the figures for which a run has data; to be used inside :func:`~.svg.drawing`."""
    records = run.of_kind("measurement")
    look = looks([r["variant"] for r in records], opponents_of(records))
    kernels = run.suite == "kernels"
    made = [
        *([_floors(records, look)] if kernels else [_times(run, records, look)]),
        _side_by_side(records, look, kernels),
        _roofline(run, records, look),
        _scaling(records, look, "tokens"),
        _scaling(records, look, "batch"),
        _bars_of(records, look, "joules", "J", "Energy", "By the board's own counter."),
        _bars_of(records, look, "peak_bytes", "B", "Peak memory", "One number for each variant."),
    ]
    if run.suite != "stages":  # first calls of a single stage are of no interest
        made.append(
            _bars_of(records, look, "first_seconds", "s", "The first call", "Compilation and capture included.")
        )
    yield from (figure for figure in made if figure is not None and figure.panels)


def over_runs(runs: Sequence[Run]) -> Figure | None:
    """Plot each case's median over runs, oldest first, if at least two have it; inside :func:`~.svg.drawing`."""
    names = list(dict.fromkeys(r["variant"] for run in reversed(runs) for r in run.of_kind("measurement")))
    opponents = [name for run in reversed(runs) for name in opponents_of(run.of_kind("measurement"))]
    look = looks(names, opponents)
    found: dict[str, dict[str, dict[float, Value]]] = {}
    for number, run in enumerate(runs, start=1):
        for r in run.of_kind("measurement"):
            if "seconds" in r:
                found.setdefault(r["case"], {}).setdefault(r["variant"], {})[number] = Value.of(r["seconds"])
    panels, shown = [], set()
    for case in _by_case([r for run in reversed(runs) for r in run.of_kind("measurement") if r["case"] in found]):
        series = [Series(name=n, look=look[n], values=v) for n, v in found[case].items() if len(v) > 1]
        if series:
            shown |= {one.name for one in series}
            svg = plots.lines(series, "run", "s", log_x=False, small=True)
            panels.append(Panel(case, svg, f"{case}: median over {len(runs)} runs"))
    caption = (
        "Median over the runs of the table below, oldest first; vertical whiskers from the 20th to the 80th percentile."
    )
    legend = {name: one for name, one in look.items() if name in shown}
    return Figure("Over runs", caption, tuple(panels), legend, small=True) if panels else None


def opponents_of(records: Sequence[Record]) -> list[str]:
    """Return the opponents that measurements are compared with."""
    return list(dict.fromkeys(name for r in records for name in r.get("times", {})))


def coordinates(record: Record) -> dict[str, float]:
    """Return tokens of an image and images of a batch, from the record's fields or from the name of a kernel's case."""
    found = {axis: record[axis] for axis in ("tokens", "batch") if isinstance(record.get(axis), int | float)}
    named = re.search(r"/stage(\d)-b(\d+)$", record["case"])
    if named and int(named[1]) < len(STAGE_SIDES):
        found = {"tokens": STAGE_SIDES[int(named[1])] ** 2, "batch": int(named[2]), **found}
    return found


def plain(case: str) -> str:
    """Return a case's name, a kernel's in the form that other suites use: ``rope2d.rotate, stage 3, batch 16``."""
    return re.sub(r"/stage(\d+)-b(\d+)$", r", stage \1, batch \2", case)


def family(case: str, pattern: str) -> str:
    """Return a case's name without the part that gives tokens or batch."""
    parts = (part.strip() for part in re.sub(pattern, "", plain(case)).split(", "))
    return ", ".join(part for part in parts if part)


def _times(run: Run, records: Sequence[Record], look: Mapping[str, Look]) -> Figure:
    absent = run.of_kind("absent")
    panels = []
    for case, group in _by_case(records).items():
        rows = [_bar(r, look, _beside_floor(r)) for r in group]
        names = {r["variant"] for r in group}
        # A variant absent from every case is listed above the plots; here it would be a row in each of them.
        gone = dict.fromkeys(r["variant"] for r in absent if r.get("case") == case)
        rows += [Bar(label=n, look=Look("", "o"), note="absent") for n in gone if n not in names]
        if any("seconds" in r for r in group):
            per = f"time per {group[0].get('per', 'run')}"
            panels.append(Panel(case, plots.bars(rows, "s", per), _said(case, group)))
    caption = (
        "Median of each variant; whiskers from the 20th to the 80th percentile. Dashed: the floor, what products and "
        "bytes take at the ceilings measured in the same run; in brackets the share of it that was reached."
        if any(r.get("floor_seconds") for r in records)
        else "Median of each variant; whiskers from the 20th to the 80th percentile."
    )
    return Figure("Time against the floor" if "Dashed" in caption else "Time", caption, tuple(panels), {})


def _floors(records: Sequence[Record], look: Mapping[str, Look]) -> Figure:
    """Plot the share of the floor of many short kernels, all those of one shape in one plot."""
    right = [r for r in records if "seconds" in r and "fraction_of_floor" in r]
    panels = []
    for shape, group in _grouped(right, _shape).items():
        series = _series(group, look, _kernel, _share)
        rows = list(dict.fromkeys(_kernel(r) for r in group))
        best = max(group, key=lambda r: r["fraction_of_floor"])
        said = f"{shape}: the largest share of the floor is {percent(best['fraction_of_floor'])}, " + _name(best)
        panels.append(Panel(shape, plots.dots(rows, series, "share of the floor reached", share=True), said))
    caption = (
        "The floor, the dashed line at 100 %, is the larger of what the products take at the rate of a large product, "
        "and the least bytes at the rate of a copy. Whiskers from the 20th to the 80th percentile of the time."
    )
    return Figure("Share of the floor", caption, tuple(panels), _legend(right, look))


def _side_by_side(records: Sequence[Record], look: Mapping[str, Look], kernels: bool) -> Figure:
    """Plot the speed relative to each opponent."""
    panels: list[Panel] = []
    legend: dict[str, Look] = {}
    opponents = opponents_of(records)
    for opponent in opponents:
        compared = [r for r in records if opponent in r.get("times", {}) and r["variant"] != opponent]
        found, named = _kernel_ratios(compared, look, opponent) if kernels else _case_ratios(compared, opponent)
        beside = f", beside {opponent}" if len(opponents) > 1 else ""
        panels += [replace(panel, title=panel.title + beside) for panel in found]
        legend |= named
    caption = (
        "Speed over that of an opponent, which is the dashed line; right of it is faster. Ratios of the times of one "
        "turn: their median, with whiskers from the 20th to the 80th percentile."
    )
    return Figure("Side by side", caption, tuple(panels), legend)


def _kernel_ratios(
    compared: Sequence[Record], look: Mapping[str, Look], opponent: str
) -> tuple[list[Panel], dict[str, Look]]:
    """Return a plot for each shape, with a row for each kernel and a dot for each variant."""
    panels = []
    for shape, group in _grouped(compared, _shape).items():
        rows = list(dict.fromkeys(_kernel(r) for r in group))
        series = _series(group, look, _kernel, lambda r: Value.of(r["times"][opponent]))
        svg = plots.dots(rows, series, f"speed over that of {opponent}")
        panels.append(Panel(shape, svg, _best(shape, group, opponent)))
    return panels, _legend(compared, look)


def _case_ratios(compared: Sequence[Record], opponent: str) -> tuple[list[Panel], dict[str, Look]]:
    """Return plots with a row for each variant; cases that differ only in stage, or only in batch, share a plot."""
    cases = sorted({r["case"] for r in compared}, key=_natural)
    pattern = next((p for p in (TOKENS, BATCH) if len({family(case, p) for case in cases}) < len(cases)), None)
    parts = {case: _rest(case, pattern) if pattern else "" for case in cases}
    legend = looks(list(parts.values()))
    panels = []
    for name, group in _grouped(compared, lambda r: family(r["case"], pattern or "$^")).items():
        rows = list(dict.fromkeys(r["variant"] for r in group))
        found: dict[str, dict[str, Value]] = {}
        for r in sorted(group, key=lambda r: _natural(r["case"])):
            found.setdefault(parts[r["case"]], {})[r["variant"]] = Value.of(r["times"][opponent])
        series = [Series(name=part, look=legend[part], values=values) for part, values in found.items()]
        svg = plots.dots(rows, series, f"speed over that of {opponent}")
        panels.append(Panel(name or "all cases", svg, _best(name, group, opponent)))
    return panels, legend if pattern else {}


def _roofline(run: Run, records: Sequence[Record], look: Mapping[str, Look]) -> Figure | None:
    placed = [r for r in records if "seconds" in r and r.get("flops") and r.get("bytes") and _median(r) > 0]
    ceilings = next(iter(run.of_kind("ceilings")), None)
    if ceilings is None or not placed:
        return None
    rates = ceilings["bytes_per_second"], ceilings["flops_per_second"]
    panels = []
    for name, group in _grouped(placed, lambda r: family(r["case"], TOKENS)).items():
        points = [
            Point(_rest(r["case"], TOKENS), look[r["variant"]], r["flops"] / r["bytes"], r["flops"] / _median(r))
            for r in sorted(group, key=lambda r: _natural(r["case"]))
        ]
        best = max(group, key=lambda r: r["flops"] / _median(r))
        said = f"{name}: the highest rate is {quantity(best['flops'] / _median(best), 'FLOP/s')}, {_name(best)}"
        panels.append(Panel(name, plots.roofline(points, *rates), said))
    left_out = sum("seconds" in r and not r.get("flops") for r in records)
    caption = (
        "Floating-point operations a second over operations a byte. Dashed: the measured ceilings, "
        f"{quantity(rates[0], 'B/s')} of a copy and {quantity(rates[1], 'FLOP/s')} of a large product. "
        "Operations and bytes are what the case needs at least, the same for all variants."
    )
    if left_out:
        caption += f" {left_out} measurements without matrix products have no place here."
    return Figure("Roofline", caption, tuple(panels), _legend(placed, look))


def _scaling(records: Sequence[Record], look: Mapping[str, Look], axis: str) -> Figure:
    """Plot time over tokens or over batch; cases that are otherwise equal share a plot."""
    pattern, across = (TOKENS, "tokens of an image") if axis == "tokens" else (BATCH, "images in a batch")
    placed = [r for r in records if "seconds" in r and axis in coordinates(r)]
    panels, shown = [], []
    for name, group in _grouped(placed, lambda r: family(r["case"], pattern)).items():
        if len({coordinates(r)[axis] for r in group}) < 2:
            continue
        series = _series(group, look, lambda r: coordinates(r)[axis], lambda r: Value.of(r["seconds"]))
        series = [one for one in series if len(one.values) > 1]
        floor = {coordinates(r)[axis]: r["floor_seconds"] for r in group if r.get("floor_seconds")}
        if not series:
            continue
        names = ", ".join(one.name for one in series)
        per = group[0].get("per", "run")
        said = f"{name}: time per {per} over {across} for {names}"
        panels.append(Panel(f"{name or 'all cases'}: time per {per}", plots.lines(series, across, "s", floor), said))
        shown += [r for r in group if any(r["variant"] == one.name for one in series)]
    caption = (
        f"Time over {across}, both logarithmic where they span much; vertical whiskers from the 20th to the 80th "
        "percentile. Dashed: the floor."
    )
    return Figure(f"Scaling over {axis}", caption, tuple(panels), _legend(shown, look))


def _bars_of(
    records: Sequence[Record], look: Mapping[str, Look], field: str, unit: str, title: str, caption: str
) -> Figure:
    """Plot a field without a spread by variant; if there are many cases, those of the first family only."""
    groups = _by_case([r for r in records if r["right"] and field in r])
    if len(groups) > MOST:
        first = family(next(r["case"] for r in records if r["right"] and field in r), TOKENS)
        caption += f" Of {len(groups)} cases only {first}; the others are in the table."
        groups = {case: group for case, group in groups.items() if family(case, TOKENS) == first}
    per = {"joules": "energy per {}", "peak_bytes": "bytes at the peak", "first_seconds": "time of the whole call"}[
        field
    ]
    panels = []
    for case, group in groups.items():
        rows = [
            Bar(label=r["variant"], look=look[r["variant"]], value=Value(r[field], r[field], r[field])) for r in group
        ]
        least = min(group, key=lambda r: r[field])
        said = f"{case}: the least is {quantity(least[field], unit)}, {least['variant']}"
        panels.append(Panel(case, plots.bars(rows, unit, per.format(group[0].get("per", "run"))), said))
    return Figure(title, caption, tuple(panels), {})


def _bar(r: Record, look: Mapping[str, Look], note: str) -> Bar:
    if not r["right"]:
        return Bar(label=r["variant"], look=look[r["variant"]], note="wrong: no time", wrong=True)
    if "seconds" not in r:
        return Bar(label=r["variant"], look=look[r["variant"]], note="not timed")
    value = Value.of(r["seconds"])
    return Bar(label=r["variant"], look=look[r["variant"]], value=value, floor=r.get("floor_seconds"), note=note)


def _beside_floor(r: Record) -> str:
    return f" ({percent(r['fraction_of_floor'])})" if r.get("floor_seconds") and "fraction_of_floor" in r else ""


def _series(
    records: Sequence[Record],
    look: Mapping[str, Look],
    place: Callable[[Record], object],
    value: Callable[[Record], Value],
) -> list[Series]:
    """Return a series for each variant."""
    found: dict[str, dict[object, Value]] = {}
    for r in records:
        found.setdefault(r["variant"], {})[place(r)] = value(r)
    return [Series(name=name, look=look[name], values=values) for name, values in found.items()]


def _share(r: Record) -> Value:
    """Return the share of the floor; the shortest time has the largest share."""
    floor, times, share = r["floor_seconds"], r["seconds"], r["fraction_of_floor"]
    low, high = (floor / times[key] if times[key] > 0 else share for key in ("high", "low"))
    return Value(share, low, high)


def _kernel(r: Record) -> str:
    return str(r["case"].partition("/")[0])


def _shape(r: Record) -> str:
    return plain(r["case"]).partition(", ")[2] or "one shape"


def _said(case: str, group: Sequence[Record]) -> str:
    timed = [r for r in group if "seconds" in r]
    fastest = min(timed, key=_median)
    text = f"{case}: the fastest of {len(timed)} is {fastest['variant']} with {quantity(_median(fastest), 's')}"
    floor = fastest.get("floor_seconds")
    return text + (f", the floor is {quantity(floor, 's')}" if floor else "")


def _best(name: str, group: Sequence[Record], opponent: str) -> str:
    best = max(group, key=lambda r: r["times"][opponent]["median"])
    return f"{name}: at most {best['times'][opponent]['median']:.2f} times the speed of {opponent}, {_name(best)}"


def _name(r: Record) -> str:
    return f"by {r['variant']} in {r['case']}"


def _median(r: Record) -> float:
    return float(r["seconds"]["median"])


def _by_case(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Group by case in the order of measurement; cases that differ only in stage are sorted by stage."""
    groups = _grouped(records, lambda r: str(r["case"]))
    families = list(dict.fromkeys(family(case, TOKENS) for case in groups))
    return {
        case: groups[case] for case in sorted(groups, key=lambda c: (families.index(family(c, TOKENS)), _natural(c)))
    }


def _grouped(records: Sequence[Record], key: Callable[[Record], str]) -> dict[str, list[Record]]:
    """Group records in the order of measurement, in which the most important come first."""
    found: dict[str, list[Record]] = {}
    for r in records:
        found.setdefault(key(r), []).append(r)
    return found


def _natural(text: str) -> list[tuple[int, str]]:
    """Return a sort key that orders numbers in a name by value."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text) if part]


def _rest(case: str, pattern: str) -> str:
    """Return the part that :func:`family` removes: ``stage 3``, ``batch 16``."""
    found = re.search(pattern, plain(case))
    return found[0] if found else plain(case)


def _legend(records: Sequence[Record], look: Mapping[str, Look]) -> dict[str, Look]:
    names = {r["variant"] for r in records}
    return {name: look[name] for name in look if name in names}
