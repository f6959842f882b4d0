"""Two result files, measurement by measurement: what became slower or faster by more than the spread of both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from pixelflow_benchmarks.harness.results import Run, newest
from pixelflow_benchmarks.harness.tables import TextTable

Verdict = Literal["slower", "faster", "within the spread"]


@dataclass(frozen=True, slots=True)
class Measurement:
    """Seconds of one thing: the median, and what a fifth of the repeats lies below and above."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Change:
    """One measurement in both files.

    Attributes:
        name: what was measured.
        before, after: how long it took.
    """

    name: str
    before: Measurement
    after: Measurement

    @property
    def ratio(self) -> float:
        """After over before: above 1 is slower."""
        return self.after.median / self.before.median

    @property
    def verdict(self) -> Verdict:
        """Different where the middle three fifths of both do not overlap."""
        if self.after.low > self.before.high:
            return "slower"
        if self.after.high < self.before.low:
            return "faster"
        return "within the spread"


def measurements(runs: Iterable[Run]) -> dict[str, Measurement]:
    """Every time in a result file, by what it is of; what was measured again counts as it was the last time."""
    found: dict[str, Measurement] = {}
    for run in runs:
        for record in run.of_kind("measurement"):
            if (times := record.get("seconds")) is not None:
                name = f"{run.suite}: {record['case']}, {record['variant']}"
                found[name] = Measurement(times["median"], times["low"], times["high"])
    return found


def compare(before: Sequence[Run], after: Sequence[Run]) -> tuple[list[Change], list[str], list[str]]:
    """What both files measured, the largest change first; and what only the first, or only the second has.

    Raises:
        ValueError: the files have nothing in common.
    """
    old, new = measurements(before), measurements(after)
    changes = [Change(name, old[name], new[name]) for name in old if name in new]
    if not changes:
        raise ValueError("results: got two files without a measurement in common, expected results of one command")
    changes.sort(key=lambda change: max(change.ratio, 1 / change.ratio), reverse=True)
    return changes, [name for name in old if name not in new], [name for name in new if name not in old]


def different_surroundings(before: Sequence[Run], after: Sequence[Run]) -> list[str]:
    """In which the last runs of both differ besides the code: hardware, versions, sizes."""
    changing = ("kind", "commit", "load", "sm_mhz", "memory_mhz", "celsius", "watts", "held_down_by")
    said = []
    for suite in dict.fromkeys(run.suite for run in before):
        old, new = newest(before, suite), newest(after, suite)
        if old is None or new is None:
            continue
        one, two = old.environment, new.environment
        keys = [key for key in dict.fromkeys([*one, *two]) if key not in changing]
        said += [f"{suite}, {key}: {one.get(key)} and {two.get(key)}" for key in keys if one.get(key) != two.get(key)]
    return said


def compare_table(changes: Sequence[Change]) -> TextTable:
    """A row for each measurement."""
    rows = []
    for change in changes:
        mark = "" if change.verdict == "within the spread" else change.verdict
        rows.append(
            (change.name, f"{change.before.median:.4g}", f"{change.after.median:.4g}", f"{change.ratio:.3f}", mark)
        )
    slower, faster = (sum(change.verdict == verdict for change in changes) for verdict in ("slower", "faster"))
    title = f"{len(changes)} measurements: {slower} slower, {faster} faster, the others within the spread of both."
    return TextTable(title, ("measurement", "before", "after", "ratio", ""), tuple(rows))
