"""Comparison of a gate run with its baseline: what became worse or better, and what only one of them has."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pixelflow_benchmarks.harness.tables import TextTable

from .baseline import Baseline
from .measure import Counts, Measured

Verdict = Literal["worse", "wrong", "gone", "new", "better", "grown, within its tolerance", "same"]
FAILING: tuple[Verdict, ...] = ("wrong", "worse", "gone", "new")


@dataclass(frozen=True, slots=True)
class Change:
    """One figure in the baseline and in the run.

    Attributes:
        name: what was measured, and which kind of figure it is.
        before, after: both values, formatted for a reader.
        ratio: after divided by before; NaN if one of them is missing.
        verdict: result of the comparison. ``new`` and ``gone`` fail too: a figure that the baseline lacks would have no
            limit.
        limit: limit of the ratio, as text.
    """

    name: str
    before: str
    after: str
    ratio: float
    verdict: Verdict
    limit: str = ""

    @property
    def line(self) -> str:
        """The change as one line of text."""
        ratio = "" if math.isnan(self.ratio) else f", ratio {self.ratio:.4g}"
        limit = f" ({self.limit})" if self.limit and self.verdict == "worse" else ""
        return f"{self.verdict}: {self.name}: from {self.before} to {self.after}{ratio}{limit}"


def changes(baseline: Baseline, measured: Measured) -> list[Change]:
    """Compare all figures of the baseline and the run; failing ones come first."""
    found = [*_counted("block", baseline.block, measured.block, baseline.at_most, measured.faults)]
    if measured.skipped is None:
        before, after = baseline.machine_code, measured.machine_code
        found += _counted(f"sm_{measured.arch}", before, after, baseline.at_most, measured.faults)
    found += _timed(baseline, measured)
    found += [Change(name, "right", fault, math.nan, "wrong") for name, fault in measured.faults.items()]
    order: tuple[Verdict, ...] = (*FAILING, "better", "grown, within its tolerance", "same")
    return sorted(found, key=lambda change: order.index(change.verdict))


def _counted(
    group: str, before: Counts, after: Counts, at_most: Mapping[str, float], faults: Mapping[str, str]
) -> Iterator[Change]:
    old = {(subject, kind): n for subject, kinds in before.items() for kind, n in kinds.items()}
    new = {(subject, kind): n for subject, kinds in after.items() for kind, n in kinds.items()}
    for subject, kind in {**old, **new}:
        if subject in faults:  # reported once, with its reason, by changes()
            continue
        name = f"{group}, {subject}: {kind}"
        one, two = old.get((subject, kind)), new.get((subject, kind))
        if one is None or two is None:
            yield _alone(name, one, two)
            continue
        ratio = two / one if one else (math.inf if two else 1.0)
        limit = at_most[kind]
        verdict: Verdict = "better" if ratio < 1 else "same" if ratio == 1 else "grown, within its tolerance"
        yield Change(name, str(one), str(two), ratio, "worse" if ratio > limit else verdict, f"at most {limit:g}")


def _timed(baseline: Baseline, measured: Measured) -> Iterator[Change]:
    """Compare the ratios of times.

    A ratio is worse if even its 80th percentile over the rounds is below the baseline times the limit, and better if
    even its 20th percentile is above the baseline divided by the limit.
    """
    limit = baseline.at_least["times"]
    for variant in {**baseline.times, **measured.times}:
        if f"CPU, {variant}" in measured.faults:  # reported once, with its reason, by changes()
            continue
        name = f"CPU, {variant}: times faster than the reference"
        one, spread = baseline.times.get(variant), measured.times.get(variant)
        if one is None or spread is None:
            yield _alone(name, one, None if spread is None else round(spread["median"], 3))
            continue
        worse, better = spread["high"] < limit * one, spread["low"] > one / limit
        after = f"{spread['median']:.3f} ({spread['low']:.3f} to {spread['high']:.3f})"
        verdict: Verdict = "worse" if worse else "better" if better else "same"
        yield Change(name, f"{one:.3f}", after, spread["median"] / one, verdict, f"at least {limit:g}")


def _alone(name: str, before: float | None, after: float | None) -> Change:
    absent = "nothing"
    if before is None:
        return Change(name, absent, str(after), math.nan, "new")
    return Change(name, str(before), absent, math.nan, "gone")


def change_table(found: Sequence[Change]) -> TextTable:
    """A row per ratio of times, and per other figure that has changed."""
    shown = [change for change in found if change.verdict != "same" or change.name.startswith("CPU")]
    rows = []
    for change in shown:
        ratio = "" if math.isnan(change.ratio) else f"{change.ratio:.4g}"
        rows.append((change.name, change.before, change.after, ratio, change.limit, change.verdict))
    same = sum(change.verdict == "same" for change in found)
    title = f"{len(found)} figures beside the baseline, {same} of them the same."
    return TextTable(title, ("figure", "before", "after", "ratio", "passes", ""), tuple(rows))
