"""The table of each suite, and a general table for suites that have none of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pixelflow_benchmarks.harness.results import Record, Run
from pixelflow_benchmarks.harness.tables import TextTable
from pixelflow_benchmarks.suites.blocks import block_table, operation_tables
from pixelflow_benchmarks.suites.coldstart.table import coldstart_table
from pixelflow_benchmarks.suites.curves import curves_table
from pixelflow_benchmarks.suites.distance import distance_table
from pixelflow_benchmarks.suites.images.table import image_table
from pixelflow_benchmarks.suites.kernels.table import kernel_table
from pixelflow_benchmarks.suites.memory.table import memory_table
from pixelflow_benchmarks.suites.stages.table import stage_table
from pixelflow_benchmarks.suites.training.table import training_table

from .units import percent, quantity, size

OF_SUITES: Mapping[str, Callable[[Run], TextTable]] = {
    "blocks": block_table,
    "coldstart": coldstart_table,
    "curves": curves_table,
    "distance": distance_table,
    "images": image_table,
    "kernels": kernel_table,
    "memory": memory_table,
    "stages": stage_table,
    "training": training_table,
}
"""Tables in pages and reports, by suite."""

_SHOWN = ("kind", "case", "variant", "right", "fault", "seconds", "per", "times", "floor_seconds")
"""Fields that the general table shows in its own columns or not at all; the floor is shown as a fraction."""


def table_of(run: Run) -> list[TextTable]:
    """Return the tables of a run that have rows: its suite's own tables, or the general one.

    The general table also replaces a suite's own if records lack fields that it needs, because an older version wrote
    them or because the run was cut short before its ceilings.
    """
    own = OF_SUITES.get(run.suite)
    try:
        found = [general_table(run)] if own is None else [own(run)]
        if run.suite == "blocks":
            found += operation_tables(run)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        general = general_table(run)
        found = [replace(general, title=f"{general.title} The suite's own table needs more than these records have.")]
    return [table for table in found if table.rows]


def general_table(run: Run) -> TextTable:
    """Tabulate each measurement's time, speed relative to opponents, share of the floor, and all other fields."""
    records = run.of_kind("measurement")
    opponents = list(dict.fromkeys(name for r in records for name in r.get("times", {})))
    others = {id(r): _others(r) for r in records}
    fields = list(dict.fromkeys(name for r in records for name in others[id(r)]))
    timed = any("seconds" in r for r in records)
    header = ["case", "variant", *(["time (low to high)", "per"] if timed else [])]
    header += [f"times {name}" for name in opponents] + [_heading(name) for name in fields]
    rows = []
    for r in records:
        row = [r["case"], r["variant"]]
        if not r["right"]:
            rows.append((*row, f"wrong: {r.get('fault', 'no reason given')}", *("" for _ in header[3:])))
            continue
        if timed:
            row += [_seconds(r["seconds"]), r.get("per", "")] if "seconds" in r else ["", ""]
        row += [_ratio(r["times"][name]) if name in r.get("times", {}) else "" for name in opponents]
        row += [_cell(name, others[id(r)][name]) if name in others[id(r)] else "" for name in fields]
        rows.append(tuple(row))
    if len(header) == 2 and any(len(row) > 2 for row in rows):
        header, rows = [*header, ""], [(*row, "")[:3] for row in rows]
    return TextTable(f"{run.suite}: what was measured.", tuple(header), tuple(rows))


def _others(record: Record) -> dict[str, Any]:
    """Return figures and words without a column of their own, each entry of a mapping by itself."""
    found: dict[str, Any] = {}
    for name, value in record.items():
        if name in _SHOWN:
            continue
        parts = {f"{name}, {key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
        found |= {key: part for key, part in parts.items() if isinstance(part, str | int | float)}
    return found


def _heading(field: str) -> str:
    named = {"fraction_of_floor": "floor reached", "peak_bytes": "peak memory", "joules": "energy"}
    return named.get(field, field.removesuffix("_seconds").removesuffix("_bytes").replace("_", " "))


def _cell(field: str, value: Any) -> str:
    if isinstance(value, bool | str):
        return value if isinstance(value, str) else "yes" if value else "no"
    if isinstance(value, int) and "bytes" not in field:
        return str(value)
    if "fraction" in field or field in ("mfu", "share") or field.startswith("shares"):
        return percent(value)
    if "bytes" in field and "per" not in field:
        return size(value)
    if field.endswith("seconds") or field.startswith("seconds"):
        return quantity(value, "s")
    if field == "joules":
        return quantity(value, "J")
    if field == "watts":
        return quantity(value, "W")
    if field == "flops":
        return quantity(value, "FLOP")
    return f"{value:,.0f}" if isinstance(value, float) and abs(value) >= 1000 else f"{value:.4g}"


def _seconds(spread: Mapping[str, float]) -> str:
    low, median, high = (quantity(spread[key], "s") for key in ("low", "median", "high"))
    return f"{median} ({low} to {high})"


def _ratio(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['low']:.2f} to {spread['high']:.2f})"
