"""Records of ``bench stages`` as a table."""

from __future__ import annotations

from pixelflow_benchmarks.harness.results import Run
from pixelflow_benchmarks.harness.tables import TextTable, interval

from .problem import REFERENCE


def stage_table(run: Run) -> TextTable:
    """A row per problem and variant: time, share of the floor, speed against the reference, memory, energy."""
    rows = []
    for r in run.of_kind("measurement"):
        if not r["right"]:
            rows.append((r["case"], r["variant"], "wrong: no time", r["fault"], "", "", ""))
            continue
        rows.append(
            (
                r["case"],
                r["variant"],
                interval(r["seconds"], 1000, 3),
                f"{100 * r['fraction_of_floor']:.0f} %",
                interval(r["times"][REFERENCE], 1, 2) if REFERENCE in r.get("times", {}) else "",
                f"{r['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in r else "",
                f"{r['joules']:.2f}" if "joules" in r else "",
            )
        )
    header = ("problem", "variant", "ms", "floor reached", "times reference", "peak GiB", "joules")
    head = run.environment
    title = (
        f"Stages of the model, {head['shape']}, {head['dtype']}, {head.get('gpu', head['processor'])}, torch "
        f"{head['torch']}; ms and joules per image and evaluation (Euler: a step). Floor: products and attention at "
        "the rate of a large product, 24 bytes a token, channel and block at the rate of a copy."
    )
    return TextTable(title, header, tuple(rows))
