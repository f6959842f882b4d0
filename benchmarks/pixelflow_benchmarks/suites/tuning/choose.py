"""Choice of launch configurations from measurements; needs no GPU.

A configuration determines the order of sums and therefore the bits of results, so that a present configuration is
replaced only by one that is clearly faster.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pixelflow_benchmarks.harness.tables import TextTable

from .spaces import LENGTHS, TIED, Config

Record = dict[str, Any]

GAIN = 0.02
"""Least saving of a new configuration, as a share of the present one's time."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The result for one shape class.

    Attributes:
        kernel, shape_class: entry of the configuration tables.
        present, chosen: configurations; equal if nothing is clearly faster.
        ratio: time of the chosen configuration divided by that of the present one, as the geometric mean over problems;
            None if the present one could not be measured.
        problems: problems on which the choice is based.
        timed, tried: number of configurations that were timed on all these problems, and of all configurations.
        same_bits: whether every output had the bits of the present configuration.
    """

    kernel: str
    shape_class: str
    present: Config
    chosen: Config
    ratio: float | None
    problems: tuple[str, ...]
    timed: int
    tried: int
    same_bits: bool

    @property
    def changed(self) -> bool:
        """Whether another configuration is proposed."""
        return self.chosen != self.present


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A configuration that was timed on all problems of its shape class, and what it is compared with."""

    config: Config
    records: tuple[Record, ...]
    present: tuple[Record, ...]  # same problems; another candidate's if the present one has no times

    @property
    def ratios(self) -> list[float]:
        """Median times divided by the present configuration's, by problem."""
        return [_seconds(a, "median") / _seconds(b, "median") for a, b in zip(self.records, self.present, strict=True)]

    @property
    def bounds(self) -> list[float]:
        """The 80th percentiles divided by the present configuration's 20th percentiles, by problem."""
        return [_seconds(a, "high") / _seconds(b, "low") for a, b in zip(self.records, self.present, strict=True)]


@dataclass(frozen=True, slots=True)
class _Class:
    """All candidates of a shape class; ``works`` says whether the present configuration could be measured."""

    present: Config
    works: bool
    candidates: tuple[_Candidate, ...]
    problems: tuple[str, ...]
    tried: int


def choose(records: Iterable[Record]) -> list[Choice]:
    """Choose the best configuration of each shape class by the geometric mean over its problems.

    It replaces the present one if it takes at least 2% (:data:`GAIN`) less time and even its 80th percentile is below
    the present one's 20th, both as geometric means of ratios. A present configuration that does not run is replaced by
    the fastest one that does. Values that are tied across the shape classes of short and long sequences
    (:data:`~.spaces.TIED`) change in both classes or in neither.
    """
    groups: dict[tuple[str, str], dict[str, list[Record]]] = {}
    for record in records:
        if record["kind"] == "candidate":
            kernel, name = record["kernel"], record["shape_class"]
            stem = name.rpartition("-")[0] if kernel in TIED else name
            groups.setdefault((kernel, stem), {}).setdefault(name, []).append(record)
    choices = []
    for (kernel, stem), found in groups.items():
        classes = {name: _class_of(of) for name, of in found.items()}
        for name, best in _choose_together(kernel, stem, classes).items():
            choices.append(_choice(kernel, name, classes[name], best))
    return choices


def _choose_together(kernel: str, stem: str, classes: Mapping[str, _Class]) -> dict[str, _Candidate | None]:
    """Return a candidate for each class of a group, None to keep the present configuration."""
    tied = TIED.get(kernel, ())

    def values(config: Config) -> tuple[int, ...]:
        return tuple(config.get(key, 0) for key in tied)

    best = {}
    for name, of in classes.items():
        kept = [c for c in of.candidates if values(c.config) == values(of.present)]
        kept = [c for c in kept if not of.works or _clearly_faster([c])]
        best[name] = min(kept, key=lambda c: _mean(c.ratios), default=None)
    if not tied or {*classes} != {f"{stem}-{length}" for length in LENGTHS}:
        return best
    if not all(of.works for of in classes.values()):
        return best
    shared = set.intersection(*({values(c.config) for c in of.candidates} for of in classes.values()))
    for value in sorted(shared - {values(of.present) for of in classes.values()}):
        together: dict[str, _Candidate | None] = {}
        for name, of in classes.items():
            fitting = [c for c in of.candidates if values(c.config) == value]
            together[name] = min(fitting, key=lambda c: _mean(c.ratios))
        if _clearly_faster([c for c in together.values() if c]) and _cost(together, classes) < _cost(best, classes):
            best = together
    return best


def _clearly_faster(candidates: Sequence[_Candidate]) -> bool:
    """Whether candidates are faster by more than the noise, over all problems of all of them."""
    ratios, bounds = [r for c in candidates for r in c.ratios], [b for c in candidates for b in c.bounds]
    return _mean(ratios) <= 1 - GAIN and _mean(bounds) < 1


def _cost(choice: Mapping[str, _Candidate | None], classes: Mapping[str, _Class]) -> float:
    """Return the mean time as a share of the present one's, over all problems of all classes."""
    return _mean([r for name, c in choice.items() for r in (c.ratios if c else [1.0] * len(classes[name].problems))])


def _class_of(records: Sequence[Record]) -> _Class:
    timed: dict[str, dict[str, Record]] = {}  # by configuration, then problem
    for record in records:
        if record["result"] == "timed":
            timed.setdefault(_key(record["config"]), {})[record["problem"]] = record
    present = next(r["config"] for r in records if r["present"])
    base = timed.get(_key(present), {})
    works = bool(base)
    problems = tuple(dict.fromkeys(r["problem"] for r in records if not works or r["problem"] in base))
    candidates = []
    for by_problem in timed.values():
        if not {*problems} <= {*by_problem}:
            continue
        own = tuple(by_problem[problem] for problem in problems)
        beside = tuple(base[problem] for problem in problems) if works else own
        # If only one of the two could be captured, the other's time includes that of the host.
        if all(a["captured"] == b["captured"] for a, b in zip(own, beside, strict=True)):
            candidates.append(_Candidate(own[0]["config"], own, beside))
    if not works and candidates:  # compared with one another: any of them can be the unit
        unit = candidates[0].records
        candidates = [_Candidate(c.config, c.records, unit) for c in candidates]
    return _Class(present, works, tuple(candidates), problems, len({_key(r["config"]) for r in records}))


def _choice(kernel: str, name: str, of: _Class, best: _Candidate | None) -> Choice:
    return Choice(
        kernel=kernel,
        shape_class=name,
        present=of.present,
        chosen=of.present if best is None else best.config,
        ratio=None if not of.works else 1.0 if best is None else _mean(best.ratios),
        problems=of.problems,
        timed=len(of.candidates),
        tried=of.tried,
        same_bits=best is None or all(record["same_bits"] for record in best.records),
    )


def merged(table: Mapping[str, Mapping[str, Config]], choices: Iterable[Choice]) -> dict[str, dict[str, Config]]:
    """Return the table with the proposed configurations; entries that were not tuned, or are kept, do not change."""
    found = {kernel: {name: dict(config) for name, config in of.items()} for kernel, of in table.items()}
    for choice in choices:
        if choice.changed:
            found.setdefault(choice.kernel, {})[choice.shape_class] = dict(choice.chosen)
    return found


def _key(config: Config) -> str:
    return repr(sorted(config.items()))


def _seconds(record: Record, key: str) -> float:
    """Return a positive time: as the difference of two measurements, that of a very short kernel may be 0."""
    return max(record[key], 1e-9)


def _mean(values: Sequence[float]) -> float:
    """Return the geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def tuning_table(choices: Sequence[Choice], gpu: str) -> TextTable:
    """A row per shape class: the present and the proposed configuration, and the measurements behind the choice."""
    rows = []
    for c in choices:
        rows.append(
            (
                c.kernel,
                c.shape_class,
                _settings(c.present),
                _settings(c.chosen) if c.changed else "keep",
                "" if c.ratio is None else f"{c.ratio:.3f}",
                ", ".join(c.problems),
                f"{c.timed} of {c.tried}",
                "same" if c.same_bits else "other",
            )
        )
    header = ("kernel", "class", "present", "proposed", "of present time", "problems", "timed", "bits")
    return TextTable(f"Launch configurations, {gpu}; times are geometric means over problems.", header, tuple(rows))


def _settings(config: Mapping[str, int]) -> str:
    return " ".join(f"{key} {value}" for key, value in config.items())
