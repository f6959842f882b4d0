"""``pixelflow bench all``: every suite in a process of its own.

A suite that runs out of memory, hangs or loses the device therefore does not affect the others.
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
"""Seconds beyond its budget that a suite may need to end by itself: a check, a compilation, a CPU's profiles."""
TO_END = 60.0
"""The part of the grace that every suite gets, or half of its minimum time if that is less."""
OVERTIME = 60.0
"""Seconds after the whole budget by which the last suite has ended."""


@dataclass(frozen=True, slots=True)
class Suite:
    """A suite as a part of the whole run.

    Attributes:
        command: its name and options.
        least: minimum time in seconds, enough to produce a result, reserved however long other suites take. The budget
            that the suite is told is shorter, because it ends only after the turn in progress.
        share: fraction of the unreserved time, at the suite's start, that is added to its budget.
        budgeted: whether the command takes a time budget; without one it takes as long as it needs.
        opponent: whether the command takes a checkout of the published code.
    """

    command: tuple[str, ...]
    least: float
    share: float = 0.0
    budgeted: bool = True
    opponent: bool = False


def _variants(*names: str) -> tuple[str, ...]:
    return tuple(word for name in names for word in ("--variant", name))


ON_GPU = (
    Suite(
        ("stages", *_variants("reference", "public", "triton/both", "triton/graphs", "triton/eager")),
        200,
        0.5,
        opponent=True,
    ),
    Suite(("images", "--batch", "1", "--steps", "30"), 90, 0.4, opponent=True),
    Suite(("kernels", "--quiet"), 40, 0.4),
    Suite(("training", "--batch", "32"), 60, 0.5, opponent=True),
    Suite(("memory", "--batch", "1", *_variants("triton/both", "triton/eager")), 35, 0.5),
    Suite(("coldstart", "--shape", "digits", "--repeats", "1", *_variants("triton, graphs, filled cache")), 45, 0.7),
    Suite(("distance",), 30, budgeted=False),
    Suite(("blocks",), 20, budgeted=False, opponent=True),
)
"""The most important first, so that a run that is cut short has measured these. What a suite would not end within its
time is left to the suite's own command."""
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
    """Measure everything, the most important first, so that a run that is cut short is still of use."""
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
    """Run one suite after the other, each within its part of the remaining time.

    Returns:
        The suites that failed, or were killed because they did not end in time.
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
    """Divide the remaining time: return a suite's budget in seconds, and the limit after which it is killed.

    Beyond its own minimum time a suite takes only unreserved time, so later suites get their minimum whatever it does.
    If too little is left for all, it gets its minimum and no more: the most important suites get theirs, and the
    moments lost between two processes cost none of them its turn.

    Args:
        left: remaining seconds of the whole budget.
        suite: the suite that begins.
        later: the suites after it.
    """
    free = left - suite.least - sum(one.least for one in later)
    told = max(suite.least / 2, suite.least - TO_END)
    if free < 0:
        return min(told, left), min(suite.least, left + OVERTIME)
    told += suite.share * free
    return told, min(told + GRACE, suite.least + free + (0 if later else OVERTIME))


def run_within(line: Sequence[str], limit: float) -> int | None:
    """Run a command and return its exit status, or None if it was killed after ``limit`` seconds with its children.

    Raises:
        SystemExit: this process received a signal to end; the command was killed as well.
        KeyboardInterrupt: the same for SIGINT.
    """
    with _signals_kept() as raise_signals, subprocess.Popen(line, start_new_session=True) as process:
        try:
            raise_signals()
            return process.wait(limit)
        except BaseException as error:
            # The session contains the command's own children: a process of the published code, a cold start.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                return None
            raise


@contextlib.contextmanager
def _signals_kept() -> Iterator[Callable[[], None]]:
    """Handle signals for a child in a session of its own: it gets no signal sent to this process's group.

    Signals to end are kept until the child can be killed. Yields a function that makes them raise SystemExit, and
    SIGINT KeyboardInterrupt, including those that arrived before: while a command is being started, there is nothing to
    kill yet. Those that were ignored, as under nohup, stay ignored.
    """
    came: list[int] = []
    raising = False

    def keep(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if raising:
            raise_first()

    def raise_first() -> None:
        raise KeyboardInterrupt if came[0] == signal.SIGINT else SystemExit(128 + came[0])

    def raise_signals() -> None:
        nonlocal raising
        raising = True
        if came:
            raise_first()

    ends = [n for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, keep) for number in ends}
    try:
        yield raise_signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def line_of(suite: Suite, device: str, output: Path, seconds: float, public: Path | None) -> list[str]:
    """Return the suite's command line."""
    line = [sys.executable, "-m", "pixelflow_engine", "bench", *suite.command, "--output", str(output)]
    if suite.command[0] != "blocks":  # it only counts and has no device
        line += ["--device", device]
    if suite.budgeted:
        line += ["--budget-seconds", f"{seconds:.0f}"]
    if suite.opponent and public is not None:
        line += ["--public", str(public)]
    return line
