"""Compare two result files measurement by measurement: what became wrong, or slower or faster beyond both spreads.

If a measurement has an opponent timed in the same turns, the ratio to it is compared instead of the time: the machine
changes more between two runs than within one. A change of an opponent's own time says something about the machine only.

Several runs in one file are combined into one spread, from their lowest low to their highest high. If only chance
separates two versions with k runs each, all of one lie below all of the other in 2 of ``(2k choose k)`` cases: one of
three for k = 2, one of ten for k = 3, one of 35 for k = 4.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pixelflow_benchmarks.harness.results import Record, Run, newest
from pixelflow_benchmarks.harness.tables import TextTable

Verdict = Literal["slower", "faster", "within the spread", "the machine"]

CHANGING = ("kind", "commit", "budget_seconds", "load", "sm_mhz", "memory_mhz", "celsius", "watts", "held_down_by")
"""Fields of the environment that may differ between runs under the same conditions."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, 20th and 80th percentile of a run's repeats; of several runs the lowest low and the highest high."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, record: Mapping[str, float]) -> Spread:
        """Return the spread in a record."""
        return cls(record["median"], record["low"], record["high"])

    @classmethod
    def over(cls, runs: Sequence[Spread]) -> Spread:
        """Combine several runs: the median of their medians, the lowest low and the highest high."""
        median = statistics.median(run.median for run in runs)
        return cls(median, min(run.low for run in runs), max(run.high for run in runs))

    @property
    def width(self) -> float:
        """Distance from low to high, relative to the median."""
        return (self.high - self.low) / self.median

    def apart(self, other: Spread) -> bool:
        """Return whether the intervals from low to high do not overlap."""
        return self.low > other.high or self.high < other.low


@dataclass(frozen=True, slots=True)
class Measurement:
    """The time of one case and variant.

    Attributes:
        seconds: spread of the time.
        times: by opponent of the same run, other than itself, how many times faster than it this variant was.
        opponent: whether others were compared with this variant.
    """

    seconds: Spread
    times: Mapping[str, Spread]
    opponent: bool


@dataclass(frozen=True, slots=True)
class Change:
    """One measurement in both files.

    Attributes:
        name: suite, case and variant.
        before, after: the measurement in each file.
    """

    name: str
    before: Measurement
    after: Measurement

    @property
    def beside(self) -> tuple[str, Spread, Spread] | None:
        """The first opponent common to both, and the speed relative to it before and after; None without one."""
        for opponent, before in self.before.times.items():
            if opponent in self.after.times:
                return opponent, before, self.after.times[opponent]
        return None

    @property
    def ratio(self) -> float:
        """Time after over time before, relative to an opponent if there is one: above 1 is slower."""
        if self.beside is not None:
            _, before, after = self.beside
            return before.median / after.median
        return self.after.seconds.median / self.before.seconds.median

    @property
    def verdict(self) -> Verdict:
        """Whether the spreads of before and after are apart, and in which direction."""
        before, after = self.before.seconds, self.after.seconds
        if self.beside is not None:
            _, before, after = self.beside
        if not after.apart(before):
            return "within the spread"
        if self.before.opponent or self.after.opponent:  # even beside another opponent: neither is our code
            return "the machine"
        return "slower" if self.ratio > 1 else "faster"


def measurements(runs: Iterable[Run]) -> dict[str, Measurement]:
    """Return every time in the runs, by suite, case and variant.

    Runs under the conditions of the newest run that has a measurement are combined; its runs under other conditions are
    ignored.
    """
    found: dict[str, list[tuple[Record, Measurement]]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.began):
        for record in run.of_kind("measurement"):
            if "seconds" in record:
                found[_name(run, record)].append((conditions(run), _measurement(record)))
    return {name: _together([of for under, of in group if under == group[-1][0]]) for name, group in found.items()}


def conditions(run: Run) -> Record:
    """Return a run's environment (hardware, versions, sizes) without commit, time budget and momentary state."""
    return {key: value for key, value in run.environment.items() if key not in CHANGING}


def _measurement(record: Record) -> Measurement:
    times = record.get("times", {})
    others = {name: Spread.of(ratio) for name, ratio in times.items() if name != record["variant"]}
    return Measurement(Spread.of(record["seconds"]), others, record["variant"] in times)


def _together(runs: Sequence[Measurement]) -> Measurement:
    shared = [name for name in runs[0].times if all(name in run.times for run in runs)]
    times = {name: Spread.over([run.times[name] for run in runs]) for name in shared}
    return Measurement(Spread.over([run.seconds for run in runs]), times, any(run.opponent for run in runs))


def compare(before: Sequence[Run], after: Sequence[Run]) -> tuple[list[Change], list[str], list[str]]:
    """Return the changes, the largest first, then the names that only ``before`` has and that only ``after`` has.

    What became wrong is in none of them, see :func:`became_wrong`.

    Raises:
        ValueError: the files have nothing in common.
    """
    old, new = measurements(before), measurements(after)
    wrong = became_wrong(before, after)
    for name in wrong:
        old.pop(name, None)
        new.pop(name, None)
    changes = [Change(name, old[name], new[name]) for name in old if name in new]
    if not changes and not wrong:
        raise ValueError("results: got two files without a measurement in common, expected results of one command")
    changes.sort(key=lambda change: max(change.ratio, 1 / change.ratio), reverse=True)
    return changes, [name for name in old if name not in new], [name for name in new if name not in old]


def became_wrong(before: Sequence[Run], after: Sequence[Run]) -> list[str]:
    """Return the names of what passed its check in every run before, and failed it in some run after."""
    was, now = _right(before), _right(after)
    return [name for name, right in was.items() if right and not now.get(name, True)]


def _right(runs: Iterable[Run]) -> dict[str, bool]:
    """Return, by name, whether the result was right in all runs; for measurements of times and of bytes."""
    found: dict[str, bool] = {}
    for run in runs:
        for record in run.records:
            if "right" in record:
                name = _name(run, record)
                found[name] = found.get(name, True) and bool(record["right"])
    return found


def _name(run: Run, record: Record) -> str:
    return f"{run.suite}: {record.get('case')}, {record.get('variant')}"


def different_surroundings(before: Sequence[Run], after: Sequence[Run]) -> list[str]:
    """Describe how the newest runs of each suite differ besides the code: hardware, versions, sizes."""
    said = []
    for suite in dict.fromkeys(run.suite for run in before):
        old, new = newest(before, suite), newest(after, suite)
        if old is None or new is None:
            continue
        one, two = conditions(old), conditions(new)
        keys = dict.fromkeys([*one, *two])
        said += [f"{suite}, {key}: {one.get(key)} and {two.get(key)}" for key in keys if one.get(key) != two.get(key)]
    return said


def compare_table(changes: Sequence[Change]) -> TextTable:
    """Return a table with a row for each measurement."""
    rows = []
    for change in changes:
        mark = "" if change.verdict == "within the spread" else change.verdict
        beside = change.beside
        rows.append(
            (
                change.name,
                f"{change.before.seconds.median:.4g}",
                f"{change.after.seconds.median:.4g}",
                "" if beside is None else f"{beside[1].median:.3f} and {beside[2].median:.3f} times {beside[0]}",
                f"{change.ratio:.3f}",
                mark,
            )
        )
    count = {verdict: sum(change.verdict == verdict for change in changes) for verdict in ("slower", "faster")}
    title = (
        f"{len(changes)} measurements: {count['slower']} slower, {count['faster']} faster, the others within the "
        "spread of both, or the machine's doing."
    )
    return TextTable(title, ("measurement", "s before", "s after", "beside", "ratio", ""), tuple(rows))


def agreement_table(before: Sequence[Run], after: Sequence[Run]) -> TextTable:
    """Tabulate how well two files of one version agree, per suite: changes beyond both spreads, and their width."""
    changes, _, _ = compare(before, after)
    suites = list(dict.fromkeys(change.name.partition(":")[0] for change in changes))
    groups = {suite: [change for change in changes if change.name.startswith(f"{suite}:")] for suite in suites}
    rows = [_agreement_row(suite, group) for suite, group in [*groups.items(), ("all", changes)]]
    header = (
        "suite", "runs", "measured twice", "seconds beyond the spread", "its width",
        "beside an opponent", "of these beyond it", "its width",
    )  # fmt: skip
    head = before[0].environment
    title = (
        f"One version measured twice; {head.get('gpu', head['processor'])}, torch {head['torch']}. "
        "Width: from low to high over the median, in the median case."
    )
    counts = {suite: sum(run.suite == suite for run in before) for suite in suites}
    counts["all"] = sum(counts.values())
    return TextTable(title, header, tuple((row[0], str(counts[row[0]]), *row[1:]) for row in rows))


def _agreement_row(suite: str, group: Sequence[Change]) -> tuple[str, ...]:
    pairs = [change.beside for change in group if change.beside is not None]
    seconds = sum(change.after.seconds.apart(change.before.seconds) for change in group)
    beside = sum(new.apart(old) for _, old, new in pairs)
    widths = [
        statistics.median(spread.width for spread in spreads) if spreads else 0.0
        for spreads in (
            [spread for change in group for spread in (change.before.seconds, change.after.seconds)],
            [spread for _, old, new in pairs for spread in (old, new)],
        )
    ]
    return suite, str(len(group)), str(seconds), f"{widths[0]:.1%}", str(len(pairs)), str(beside), f"{widths[1]:.1%}"
