"""``pixelflow bench all``: every suite in a process of its own.

A suite that runs out of memory, hangs or loses the device leaves the others what they need.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from .options import Device, Public, console, place_of

GRACE = 120.0
"""Seconds that a suite may need beyond what it is told, to end by itself: a check, a compilation, a CPU's profiles."""
TO_END = 60.0
"""Of these, what a suite has at least, or half of its time where that is less."""
OVERTIME = 60.0
"""Seconds after the budget by which the last suite has ended."""


@dataclass(frozen=True, slots=True)
class Suite:
    """A suite as a part of the whole.

    Attributes:
        command: its name and options.
        least: seconds in which something comes of it, kept for it however long others take. It is told of fewer, for
            it ends after the turn that it is in.
        share: it is also told, of the time that is kept for nobody when it begins.
        budgeted: it is told how long it has; another takes as long as it takes.
        opponent: it knows the published code.
    """

    command: tuple[str, ...]
    least: float
    share: float = 0.0
    budgeted: bool = True
    opponent: bool = False


ON_GPU = (
    Suite(("stages",), 200, 0.5, opponent=True),
    Suite(("images", "--batch", "4", "--batch", "1"), 110, 0.4, opponent=True),
    Suite(("kernels", "--quiet"), 40, 0.4),
    Suite(("training",), 60, 0.5, opponent=True),
    Suite(("memory",), 25, 0.5),
    Suite(("coldstart",), 40, 0.7),
    Suite(("distance",), 25, budgeted=False),
    Suite(("blocks",), 20, budgeted=False, opponent=True),
)
"""Most important first: a run that is cut short has measured what matters most."""
ON_CPU = (
    Suite(("stages",), 120, 0.5, opponent=True),
    Suite(("images", "--steps", "1"), 90, 0.5, opponent=True),
    Suite(("training",), 60, 0.5, opponent=True),
    Suite(("memory", "--steps", "1"), 100, 0.5),
    Suite(("coldstart",), 55, 0.7),
    Suite(("distance",), 50, budgeted=False),
    Suite(("blocks",), 15, budgeted=False, opponent=True),
)


def command(
    output: Annotated[Path, typer.Option(help="Folder of results; DEVICE/DATE-COMMIT.jsonl in it is appended to.")],
    device: Device = "auto",
    budget_seconds: Annotated[float, typer.Option(min=1, help="Of all suites together.")] = 540,
    public: Public = None,
) -> None:
    """Measure everything, what matters most first: cut short, what is there is of use."""
    from pixelflow_benchmarks.harness.results import check_output  # which needs torch

    check_output(output)
    where = place_of(device)
    suites = ON_GPU if where.type == "cuda" else ON_CPU
    if failed := run_suites(suites, str(where), output, budget_seconds, public):
        console.print(f"failed: {', '.join(failed)}", style="red", highlight=False)
        raise typer.Exit(1)


def run_suites(
    suites: Sequence[Suite], device: str, output: Path, budget_seconds: float, public: Path | None
) -> list[str]:
    """Run one suite after the other, each within its part of what is left.

    Returns:
        the suites that failed, or were ended because they did not end.
    """
    deadline, failed = time.monotonic() + budget_seconds, []
    for place, suite in enumerate(suites):
        name = suite.command[0]
        left = deadline - time.monotonic()
        if left <= 0:
            console.print(f"{name}: not run, no time was left", style="yellow", highlight=False)
            continue
        told, limit = parts_of(left, suite, suites[place + 1 :])
        code = run_within(line_of(suite, device, output, told, public), limit)
        if code is None:
            console.print(f"{name}: ended after {limit:.0f} seconds", style="red", highlight=False)
        if code != 0:
            failed.append(name)
    return failed


def parts_of(left: float, suite: Suite, later: Sequence[Suite]) -> tuple[float, float]:
    """Seconds that a suite is told, and after which it is ended.

    Beyond its own least it takes of what is kept for nobody: so later suites get theirs, whatever it does. Where too
    little is left for all, it has its least and no more: those that matter most get theirs, and a moment that is lost
    between two processes costs none of them its turn.

    Args:
        left: seconds of the budget.
        suite: that begins.
        later: those after it.
    """
    free = left - suite.least - sum(one.least for one in later)
    told = max(suite.least / 2, suite.least - TO_END)
    if free < 0:
        return min(told, left), min(suite.least, left + OVERTIME)
    told += suite.share * free
    return told, min(told + GRACE, suite.least + free + (0 if later else OVERTIME))


def run_within(line: Sequence[str], limit: float) -> int | None:
    """Run a command; its exit status, or None where it was ended, with all that it had started, after ``limit``.

    Raises:
        SystemExit: this process was told to end; so was the command.
    """
    with _signals_kept() as raise_signals, subprocess.Popen(line, start_new_session=True) as process:
        try:
            raise_signals()
            return process.wait(limit)
        except BaseException as error:
            # What it started is in its session: a checkout's process, a cold start that goes on.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                return None
            raise


@contextlib.contextmanager
def _signals_kept() -> Iterator[Callable[[], None]]:
    """A session of its own hears of no signal to this process's group: it must be ended by who is left.

    Yields what makes signals raise, those too that came before: while a command starts, nobody could end it.
    """
    came: list[int] = []
    raising = False

    def keep(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if raising:
            raise SystemExit(128 + number)

    def raise_signals() -> None:
        nonlocal raising
        raising = True
        if came:
            raise SystemExit(128 + came[0])

    before = {number: signal.signal(number, keep) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield raise_signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
