"""Records of ``bench images`` as a table."""

from __future__ import annotations

from pixelflow_benchmarks.harness.results import Run
from pixelflow_benchmarks.harness.tables import TextTable, interval
from pixelflow_benchmarks.harness.targets import heading, image_cell

from .opponents import LOOP, PUBLIC, REFERENCE


def image_table(run: Run) -> TextTable:
    """A row per case and variant: time, speed relative to three others, floor, first call, energy or shares, target."""
    rows, head = [], run.environment
    for r in run.of_kind("measurement"):
        if not r["right"]:
            rows.append((r["case"], r["variant"], "wrong: no time", r["fault"], *[""] * 6))
            continue
        beside = (interval(r["times"][o], 1, 2) if o in r["times"] else "" for o in (LOOP, REFERENCE, PUBLIC))
        share = r.get("shares")
        rows.append(
            (
                r["case"],
                r["variant"],
                interval(r["seconds"], 1, 3),
                *beside,
                f"{100 * r['fraction_of_floor']:.0f} %",
                f"{r['first_seconds']:.1f}",
                f"{r['joules']:.1f} J"
                if "joules" in r
                else f"{100 * share['attention']:.0f} / {100 * share['products']:.0f} %"
                if share
                else "",
                image_cell(head, r, PUBLIC) if r["variant"].startswith("engine") else "",
            )
        )
    where = head.get("gpu") or f"{head['processor']}, {head['threads']} threads, load {head['load']:.1f}"
    title = (
        f"Whole images, {head['shape']}, {head['dtype']}; {where}; torch {head['torch']}. Joules are an "
        "image's, on a GPU; shares those of attention and products, on a CPU."
    )
    header = (
        "case",
        "variant",
        "seconds an image",
        "times faster than with loop",
        "than reference",
        "than published",
        "floor reached",
        "first call, s",
        "joules, or shares",
        heading(head, "targets"),
    )
    return TextTable(title, header, tuple(rows))
