"""Two result files, measurement by measurement: what became wrong, slower or faster by more than the spread of both.

What counts is the time beside an opponent's of the same turns, where there is one: between two runs the machine
changes, too, by more than it does within a run. An opponent's own time tells of the machine alone.

What a file has several runs of is spread from the lowest to the highest of them. If only chance tells two versions with
k runs each apart, all of one lie below all of the other in 2 of ``(2k choose k)`` cases: every third for k = 2, every
tenth for 3, one of 35 for 4.
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
"""What the environments of two runs of one kind may differ in."""


@dataclass(frozen=True, slots=True)
class Spread:
    """The median, and what a fifth of the repeats lies below and above: of several runs the lowest and the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, record: Mapping[str, float]) -> Spread:
        """From a record's fields."""
        return cls(record["median"], record["low"], record["high"])

    @classmethod
    def over(cls, runs: Sequence[Spread]) -> Spread:
        """Of several runs: the median of their medians, the lowest low and the highest high."""
        median = statistics.median(run.median for run in runs)
        return cls(median, min(run.low for run in runs), max(run.high for run in runs))

    @property
    def width(self) -> float:
        """From low to high, over the median."""
        return (self.high - self.low) / self.median

    def apart(self, other: Spread) -> bool:
        """Whether what lies between low and high does not overlap."""
        return self.low > other.high or self.high < other.low


@dataclass(frozen=True, slots=True)
class Measurement:
    """How long one thing took.

    Attributes:
        seconds: of it.
        times: by opponent of the same run, how many times faster than that it was; itself left out.
        opponent: others were compared with it.
    """

    seconds: Spread
    times: Mapping[str, Spread]
    opponent: bool


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
    def beside(self) -> tuple[str, Spread, Spread] | None:
        """The opponent that both were compared with, and times faster than it before and after."""
        for opponent, before in self.before.times.items():
            if opponent in self.after.times:
                return opponent, before, self.after.times[opponent]
        return None

    @property
    def ratio(self) -> float:
        """After over before, beside an opponent where there is one: above 1 is slower."""
        if self.beside is not None:
            _, before, after = self.beside
            return before.median / after.median
        return self.after.seconds.median / self.before.seconds.median

    @property
    def verdict(self) -> Verdict:
        """Different where the spreads of before and after do not overlap."""
        before, after = self.before.seconds, self.after.seconds
        if self.beside is not None:
            _, before, after = self.beside
        if not after.apart(before):
            return "within the spread"
        if self.before.opponent or self.after.opponent:  # beside another opponent, too: neither is our code
            return "the machine"
        return "slower" if self.ratio > 1 else "faster"


def measurements(runs: Iterable[Run]) -> dict[str, Measurement]:
    """Every time in a result file, by what it is of.

    Runs of a suite under the conditions of its newest one count together; those under other conditions count where the
    newer ones have nothing.
    """
    found: dict[str, list[tuple[Record, Measurement]]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.began):
        for record in run.of_kind("measurement"):
            if "seconds" in record:
                found[_name(run, record)].append((conditions(run), _measurement(record)))
    return {name: _together([of for under, of in group if under == group[-1][0]]) for name, group in found.items()}


def conditions(run: Run) -> Record:
    """Hardware, versions, sizes: all that is known of a run but the code and what changes from minute to minute."""
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
    """What both files measured, the largest change first; and what only the first, or only the second has.

    What became wrong is in neither, see :func:`became_wrong`.

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
    """What passed its check in every run before, and not in every one after."""
    was, now = _right(before), _right(after)
    return [name for name, right in was.items() if right and not now.get(name, True)]


def _right(runs: Iterable[Run]) -> dict[str, bool]:
    """Whether a case was right in all runs; of times and of bytes."""
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
    """In which the last runs of both differ besides the code: hardware, versions, sizes."""
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
    """A row for each measurement."""
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
    """How two files of one version agree: a row per suite; what lies beyond the spread of both, and how wide it is."""
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
