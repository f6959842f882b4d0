"""Tables of the records of ``pixelflow eval digits``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from pixelflow_benchmarks.harness.results import Record
from pixelflow_benchmarks.harness.tables import TextTable


def quality_table(records: Sequence[Record]) -> TextTable:
    """Tabulate an evaluation: real digits and noise, then each setting with mean and half the range over repeats.

    ``nearest`` holds two distances to the nearest training digit: the median and the 1 % quantile.
    """
    environment, judge, *scored = records
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in scored:
        groups[str(record.get("name", record["kind"]))].append(record)
    distances = f"{judge['held_out_nearest']:.2f} / {judge['held_out_nearest_low']:.2f}"
    rows: list[tuple[str, ...]] = [
        ("held-out digits", f"{100 * judge['held_out_accuracy_svm']:.1f} %", "", "", distances, "", "", "")
    ]
    for name, group in groups.items():
        # The real digits are the training set itself, to which distances would be zero.
        newness = (
            ["", "", ""]
            if name == "real"
            else [
                " / ".join(spread([r[key] for r in group], 2) for key in ("nearest", "nearest_low")),
                spread([r["novelty"] for r in group], 2),
                spread([r["copies"] for r in group], 2),
            ]
        )
        rows.append(
            (
                {"real": "training digits", "noise": "uniform noise"}.get(name, name),
                spread([100 * r["agreement"] for r in group], 1) + " %",
                spread([r["frechet"] for r in group], 2),
                spread([r["frechet_scan"] for r in group], 1),
                *newness,
                str(group[0].get("evaluations", "")),
            )
        )
    generated = [r for r in scored if r["kind"] == "generated"]
    title = (
        f"{judge['train']} training digits, {judge['held_out']} held out; {generated[0]['count']} digits a set, "
        f"{1 + max(r['repeat'] for r in generated)} sets (mean ± half the range); torch {environment['torch']}."
    )
    header = ("digits", "agreement", "Fréchet", "Fréchet, scans", "nearest", "novelty", "copies", "evaluations")
    return TextTable(title, header, tuple(rows))


def again_table(*evaluations: Sequence[Record]) -> TextTable:
    """Tabulate evaluations of other weights (the recipe with another seed; the short recipe): their last setting."""
    names = ("`digits`, seed 1", "`digits-two-minutes`")
    tables = [quality_table(records) for records in evaluations]
    rows = [(name, *table.rows[-1][1:7]) for name, table in zip(names, tables, strict=True)]
    return TextTable(tables[0].title, ("weights", *tables[0].header[1:7]), tuple(rows))


def spread(values: list[float], digits: int) -> str:
    """Format the mean and, for several values, half the range."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.{digits}f}"
