"""Records of ``bench training`` as tables."""

from __future__ import annotations

from collections.abc import Iterator

from pixelflow_benchmarks.harness.results import Run
from pixelflow_benchmarks.harness.tables import TextTable, interval

from .opponents import PUBLIC
from .phases import OTHER, PHASES
from .problem import REFERENCE


def training_tables(run: Run) -> Iterator[TextTable]:
    """How fast each variant trains, then where its step's time goes."""
    rows = []
    for r in run.of_kind("measurement"):
        if not r["right"]:
            rows.append((r["case"], r["variant"], "wrong: no time", r["fault"], "", "", "", "", ""))
            continue
        beside = (interval(r["times"][o], 1, 2) if o in r["times"] else "" for o in (REFERENCE, PUBLIC))
        rows.append(
            (
                r["case"],
                r["variant"],
                interval(r["seconds"], 1000, 1),
                f"{r['images_per_second']:.1f}",
                f"{r['tokens_per_second']:.0f}",
                f"{100 * r['mfu']:.1f} %",
                *beside,
                f"{r['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in r else "",
            )
        )
    header = (
        "case",
        "variant",
        "ms a step",
        "images/s",
        "tokens/s",
        "MFU",
        "times faster than reference",
        "than published",
        "peak GiB",
    )
    head = run.environment
    where = head.get("gpu") or f"{head['processor']}, {head['threads']} threads, load {head['load']:.1f}"
    title = (
        f"Steps of training, {head['shape']}, {head['dtype']}; {where}; torch {head['torch']}. MFU: operations of "
        "forward and backward, over the rate of a large product in the same run."
    )
    yield TextTable(title, header, tuple(rows))
    parts = (*PHASES, OTHER)
    right = [r for r in run.of_kind("measurement") if "shares" in r]
    shares = tuple((r["case"], r["variant"], *(f"{100 * r['shares'][part]:.1f}" for part in parts)) for r in right)
    yield TextTable("Where a step's time goes, %.", ("case", "variant", *parts), shares)
