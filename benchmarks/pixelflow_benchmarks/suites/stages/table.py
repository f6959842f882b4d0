"""Records of ``bench stages`` as a table."""

from __future__ import annotations

from pixelflow_benchmarks.harness.results import Run
from pixelflow_benchmarks.harness.tables import TextTable, interval
from pixelflow_benchmarks.harness.targets import heading, stage_cells

from .opponents import ENGINES, PUBLIC
from .problem import REFERENCE


def stage_table(run: Run) -> TextTable:
    """A row per problem and variant: time, floor, speed relative to two others, memory, energy, targets of ours."""
    rows, head = [], run.environment
    for r in run.of_kind("measurement"):
        if not r["right"]:
            rows.append((r["case"], r["variant"], "wrong: no time", r["fault"], *[""] * 6))
            continue
        rows.append(
            (
                r["case"],
                r["variant"],
                interval(r["seconds"], 1000, 3),
                f"{100 * r['fraction_of_floor']:.0f} %",
                *(interval(r["times"][o], 1, 2) if o in r.get("times", {}) else "" for o in (REFERENCE, PUBLIC)),
                f"{r['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in r else "",
                f"{r['joules']:.2f}" if "joules" in r else "",
                *(stage_cells(head, r) if r["variant"] in ENGINES else ("", "")),
            )
        )
    header = (
        "problem",
        "variant",
        "ms",
        "floor reached",
        "times reference",
        "times published",
        "peak GiB",
        "joules",
        heading(head, "target, ms"),
        "target, of floor",
    )
    title = (
        f"Stages of the model, {head['shape']}, {head['dtype']}, {head.get('gpu', head['processor'])}, torch "
        f"{head['torch']}; ms and joules per image and evaluation (Euler: a step). Floor: products and attention at "
        "the rate of a large product, 24 bytes a token, channel and block at the rate of a copy."
    )
    return TextTable(title, header, tuple(rows))
