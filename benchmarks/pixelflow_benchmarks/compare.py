"""Two result files, measurement by measurement: what became slower or faster by more than the spread of both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .tables import Record, TextTable

NAMES = ("case", "stage", "batch", "solver", "variant")
"""What says which measurement a record is of, where it has them."""

Verdict = Literal["slower", "faster", "within the spread"]


@dataclass(frozen=True, slots=True)
class Measurement:
    """Seconds, or milliseconds, of one thing: median and quartiles."""

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
        """Different where the middle halves of both do not overlap."""
        if self.after.low > self.before.high:
            return "slower"
        if self.after.high < self.before.low:
            return "faster"
        return "within the spread"


def measurements(records: Iterable[Record]) -> dict[str, Measurement]:
    """Every time in a result file, by what it is of.

    Raises:
        ValueError: something was measured twice; the message names it.
    """
    found: dict[str, Measurement] = {}
    for record in records:
        times = record.get("milliseconds", record if record["kind"] in ("kernel", "time") else {})
        if "median" not in times:
            continue
        name = ", ".join(f"{key} {record[key]}" for key in NAMES if key in record)
        if name in found:
            raise ValueError(f"results: got {name} twice, expected one measurement of each in a file")
        found[name] = Measurement(times["median"], times["low"], times["high"])
    return found


def compare(before: Sequence[Record], after: Sequence[Record]) -> tuple[list[Change], list[str], list[str]]:
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


def different_surroundings(before: Sequence[Record], after: Sequence[Record]) -> list[str]:
    """In which the two runs differ besides the code: hardware, versions, sizes."""
    heads: list[dict[str, Any]] = [
        next((r for r in records if r["kind"] == "environment"), {}) for records in (before, after)
    ]
    changing = ("commit", "load", "kind", "sm_mhz", "memory_mhz", "celsius")
    keys = [key for key in dict.fromkeys([*heads[0], *heads[1]]) if key not in changing]
    return [
        f"{key}: {heads[0].get(key)} and {heads[1].get(key)}" for key in keys if heads[0].get(key) != heads[1].get(key)
    ]


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
