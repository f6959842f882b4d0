"""Records of ``bench coldstart`` as a table."""

from __future__ import annotations

from pixelflow_benchmarks.harness.results import Record, Run
from pixelflow_benchmarks.harness.tables import TextTable, interval

from .measure import TOTAL


def coldstart_table(run: Run) -> TextTable:
    """A row per variant: the whole wait with its spread, and the median of each phase; then a row per command."""
    by: dict[str, dict[str, Record]] = {}
    for record in run.of_kind("measurement"):
        by.setdefault(record["variant"], {})[record["case"]] = record
    engines = {name: cases for name, cases in by.items() if TOTAL in cases}
    phases = list(dict.fromkeys(case for cases in engines.values() for case in cases if case != TOTAL))
    rows = []
    for name, cases in engines.items():
        total = cases[TOTAL]
        if not total["right"]:
            rows.append((name, "wrong: no time", total["fault"], *[""] * (len(phases) - 1)))
            continue
        medians = (f"{cases[phase]['seconds']['median']:.2f}" if phase in cases else "" for phase in phases)
        rows.append((name, interval(total["seconds"], 1, 2), *medians))
    alone = [(case, record) for name, cases in by.items() if name not in engines for case, record in cases.items()]
    rows += [(case, interval(record["seconds"], 1, 2), *[""] * len(phases)) for case, record in alone]
    head = run.environment
    where = head.get("gpu") or f"{head['processor']}, {head['threads']} threads, load {head['load']:.1f}"
    title = (
        f"Cold starts, {head['shape']}, {head['dtype']}, {head['steps']} steps a stage; {where}; torch {head['torch']}."
        " Seconds of a new process; files are in the page cache."
    )
    return TextTable(title, ("variant", TOTAL, *phases), tuple(rows))
