"""``pixelflow bench all``: every suite in a process of its own.

A suite that runs out of memory, hangs or loses the device leaves the others what they need.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Public, console, place_of

GRACE = 120.0
"""Seconds that a suite may need beyond its share to end by itself: a check, a compilation, on a CPU its profiles."""


@dataclass(frozen=True, slots=True)
class Suite:
    """A suite as a part of the whole.

    Attributes:
        command: its name and options.
        share: of the time that is left when it begins.
        budgeted: it is told how long it has; another is quick.
        opponent: it knows the published code.
    """

    command: tuple[str, ...]
    share: float
    budgeted: bool = True
    opponent: bool = False


ON_GPU = (
    Suite(("stages",), 0.5, opponent=True),
    Suite(("images", "--batch", "4", "--batch", "1"), 0.4, opponent=True),
    Suite(("kernels", "--quiet"), 0.4),
    Suite(("training",), 0.4, opponent=True),
    Suite(("memory",), 0.4),
    Suite(("coldstart",), 0.7),
    Suite(("distance",), 1.0, budgeted=False),
    Suite(("blocks",), 1.0, budgeted=False, opponent=True),
)
"""Most important first."""
ON_CPU = (
    Suite(("stages",), 0.4, opponent=True),
    Suite(("images", "--steps", "1"), 0.4, opponent=True),
    Suite(("training",), 0.4, opponent=True),
    Suite(("memory",), 0.4),
    Suite(("coldstart",), 0.7),
    Suite(("distance",), 1.0, budgeted=False),
    Suite(("blocks",), 1.0, budgeted=False, opponent=True),
)


def command(
    output: Annotated[Path, typer.Option(help="Folder of results; DEVICE/DATE-COMMIT.jsonl in it is appended to.")],
    device: Device = "auto",
    budget_seconds: Annotated[float, typer.Option(min=1, help="Of all suites together.")] = 540,
    public: Public = None,
) -> None:
    """Measure everything, what matters most first: cut short, what is there is of use."""
    where = place_of(device)
    suites = ON_GPU if where.type == "cuda" else ON_CPU
    if failed := run_suites(suites, str(where), output, budget_seconds, public):
        console.print(f"failed: {', '.join(failed)}", style="red", highlight=False)
        raise typer.Exit(1)


def run_suites(
    suites: Sequence[Suite], device: str, output: Path, budget_seconds: float, public: Path | None
) -> list[str]:
    """Run one suite after the other, each within its share of what is left.

    Returns:
        the suites that failed, or were ended because they did not end.
    """
    deadline, failed = time.monotonic() + budget_seconds, []
    for suite in suites:
        name = suite.command[0]
        left = deadline - time.monotonic()
        if left <= 0:
            console.print(f"{name}: not run, no time was left", style="yellow", highlight=False)
            continue
        seconds = suite.share * left
        try:
            code = subprocess.run(line_of(suite, device, output, seconds, public), timeout=seconds + GRACE).returncode
        except subprocess.TimeoutExpired:
            console.print(f"{name}: ended after {seconds + GRACE:.0f} seconds", style="red", highlight=False)
            code = 1
        if code != 0:
            failed.append(name)
    return failed


def line_of(suite: Suite, device: str, output: Path, seconds: float, public: Path | None) -> list[str]:
    """The suite's command line."""
    line = [sys.executable, "-m", "pixelflow_engine", "bench", *suite.command, "--output", str(output)]
    if suite.command[0] != "blocks":  # it counts, on no device
        line += ["--device", device]
    if suite.budgeted:
        line += ["--budget-seconds", f"{seconds:.0f}"]
    if suite.opponent and public is not None:
        line += ["--public", str(public)]
    return line
