"""Records of ``bench training`` as a table."""

from __future__ import annotations

from pixelflow_benchmarks.harness.results import Run
from pixelflow_benchmarks.harness.tables import TextTable, interval
from pixelflow_benchmarks.harness.targets import heading, training_cell

from .opponents import PUBLIC
from .phases import PHASES
from .problem import REFERENCE


def training_table(run: Run) -> TextTable:
    """A row per case and variant: a step's time, rates, speed relative to two others, memory, parts of the step."""
    rows, head = [], run.environment
    for r in run.of_kind("measurement"):
        if not r["right"]:
            rows.append((r["case"], r["variant"], "wrong: no time", r["fault"], *[""] * 7))
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
                " / ".join(f"{100 * r['shares'][part]:.0f}" for part in PHASES),
                training_cell(head, r, PUBLIC) if r["variant"].startswith("engine") else "",
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
        f"{' / '.join(PHASES)}, %",
        heading(head, "targets"),
    )
    where = head.get("gpu") or f"{head['processor']}, {head['threads']} threads, load {head['load']:.1f}"
    title = (
        f"Steps of training, {head['shape']}, {head['dtype']}; {where}; torch {head['torch']}. MFU: operations of "
        "forward and backward, over the rate of a large product in the same run."
    )
    return TextTable(title, header, tuple(rows))
