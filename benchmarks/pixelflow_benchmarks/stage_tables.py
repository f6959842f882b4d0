"""Records of ``bench stages`` as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .stage_runs import REFERENCE
from .tables import Record, TextTable


def absent(records: Iterable[Record]) -> dict[str, list[str]]:
    """Who could not be had, by reason."""
    found: dict[str, list[str]] = {}
    for record in records:
        if record["kind"] == "absent":
            found.setdefault(record["reason"], []).append(record["variant"])
    return found


def stage_table(records: Sequence[Record]) -> TextTable:
    """A row per problem and variant: time, share of the floor, speed against the reference, memory, energy."""
    stages = [record for record in records if record["kind"] == "stage"]
    key = ("stage", "batch", "solver")
    plain = {tuple(r[k] for k in key): r for r in stages if r["variant"] == REFERENCE and r["right"]}
    rows = []
    for r in stages:
        problem = f"stage {r['stage']}, batch {r['batch']}, {r['solver']}"
        if not r["right"]:
            rows.append((problem, r["variant"], "wrong: no time", r["fault"], "", "", ""))
            continue
        took, base = r["milliseconds"], plain.get(tuple(r[k] for k in key))
        rows.append(
            (
                problem,
                r["variant"],
                f"{took['median']:.3f} ({took['low']:.3f} to {took['high']:.3f})",
                f"{100 * r['fraction_of_floor']:.0f} %",
                "" if base is None else f"{base['milliseconds']['median'] / took['median']:.2f}",
                f"{r['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in r else "",
                f"{r['joules_per_image']:.2f}" if "joules_per_image" in r else "",
            )
        )
    header = ("problem", "variant", "ms", "floor reached", "times reference", "peak GiB", "joules")
    head = next(r for r in records if r["kind"] == "environment")
    title = (
        f"Stages of the model, {head['shape']}, {head['dtype']}, {head.get('gpu', 'CPU')}, torch {head['torch']}; "
        "ms and joules per image and evaluation (Euler: a step). Floor: products and attention at the rate of a large "
        "product, 24 bytes a token, channel and block at the rate of a copy."
    )
    return TextTable(title, header, tuple(rows))
