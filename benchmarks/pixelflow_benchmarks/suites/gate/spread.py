"""How much the gate's ratios vary over several runs of the same code, where they should not vary at all."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from pixelflow_benchmarks.harness.tables import TextTable


def spread_table(runs: Sequence[dict[str, Any]]) -> TextTable:
    """A row per variant.

    Args:
        runs: for each run, the ``load`` of the machine and, by variant, the spread of how many times faster than the
            reference it was.
    """
    rows = []
    for variant in (key for key in runs[0] if key not in ("load", "faults")):
        medians = [run[variant]["median"] for run in runs]
        middle = statistics.median(medians)
        rows.append(
            (
                variant,
                f"{middle:.3f}",
                f"{min(medians):.3f} to {max(medians):.3f}",
                f"{100 * max(abs(median / middle - 1) for median in medians):.1f} %",
                f"{min(run[variant]['high'] for run in runs):.3f}",
            )
        )
    loads = [run["load"] for run in runs]
    title = f"{len(runs)} runs of the same code, load {min(loads):.1f} to {max(loads):.1f}."
    header = ("variant", "median of medians", "medians", "furthest from it", "lowest upper end of a spread")
    return TextTable(title, header, tuple(rows))
