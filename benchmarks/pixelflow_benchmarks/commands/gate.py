"""``pixelflow bench gate``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .options import console, show


def command(
    baseline: Annotated[Path | None, typer.Option(help="By default benchmarks/baselines.json of the checkout.")] = None,
    update: Annotated[bool, typer.Option("--update", help="Write the baseline anew and say what changed.")] = False,
) -> None:
    """Compare counts, machine code and CPU ratios with the committed baseline; exits with 1 if one is worse."""
    from pixelflow_benchmarks.suites.gate.baseline import committed, read_baseline, updated, write_baseline
    from pixelflow_benchmarks.suites.gate.compare import FAILING, change_table, changes
    from pixelflow_benchmarks.suites.gate.measure import measure_gate

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET: got 1, expected it unset: interpreted kernels have no machine code")
    path = baseline or committed()
    old = None if update and not path.exists() else read_baseline(path)
    measured = measure_gate(None if update or old is None else old.versions)
    if measured.skipped is not None:
        console.print(f"machine code is not compared: {measured.skipped}", highlight=False)
    if old is not None and old.processor != measured.processor:
        console.print(f"ratios are of {measured.processor}, the baseline's of {old.processor}", highlight=False)
    found = [] if old is None else changes(old, measured)
    if found:
        show(change_table(found))
    if update:
        if measured.faults:
            wrong = "\n".join(f"{name}: {fault}" for name, fault in measured.faults.items())
            console.print(f"{path} stays as it was, for something is wrong:\n{wrong}", style="red", highlight=False)
            raise typer.Exit(1)
        write_baseline(path, updated(old, measured))
        console.print(f"wrote {path}", highlight=False)
        return
    failing = [change for change in found if change.verdict in FAILING]
    for change in failing:
        console.print(change.line, style="red", highlight=False, soft_wrap=True)
    if any(change.verdict in ("new", "gone") for change in failing):
        console.print("where that is meant, write the baseline anew: pixelflow bench gate --update", highlight=False)
    if not failing and any(change.verdict == "better" for change in found):
        console.print("better than the baseline: run pixelflow bench gate --update", highlight=False)
    if failing:
        raise typer.Exit(1)
