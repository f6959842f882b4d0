"""The committed baseline: counts, ratios and by how much each may change, as JSON that is readable in diffs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .measure import Counts, Measured

DEFAULT = Path(__file__).parents[3] / "baselines.json"
"""Path of the baseline in a checkout."""

AT_MOST = {
    "launches": 1.0,
    "bytes": 1.0,
    "instructions": 1.01,
    "main_loop": 1.01,
    "registers": 1.05,
    "spills": 1.0,
    "narrow": 1.0,
    "shared": 1.0,
}
"""Largest ratio of after to before that passes, for figures that should be small; the values of a new baseline."""

AT_LEAST = {"times": 0.9}
"""Smallest ratio of after to before that passes, for figures that should be large; the values of a new baseline."""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Contents of a baseline file.

    Attributes:
        versions: versions of Triton and ptxas; machine code from other versions is not compared.
        processor: processor on which the ratios were measured.
        at_most: largest ratio of after to before that passes, by kind of count.
        at_least: smallest ratio of after to before that passes, for ``times``.
        block, machine_code: see :class:`~.measure.Measured`.
        times: how many times faster than the reference, by variant.
    """

    versions: Mapping[str, str]
    processor: str
    at_most: Mapping[str, float]
    at_least: Mapping[str, float]
    block: Counts
    machine_code: Counts
    times: Mapping[str, float]


def committed() -> Path:
    """Return the path of the checkout's baseline, which need not exist.

    Raises:
        ValueError: this package is not that of a checkout.
    """
    if not DEFAULT.is_file() and not (DEFAULT.parents[1] / "pyproject.toml").is_file():
        raise ValueError(
            f"baseline: there is no {DEFAULT}: benchmarks/baselines.json comes with a source checkout, not with an "
            "installed package; run the command from a checkout's package, or name a file with --baseline"
        )
    return DEFAULT


def read_baseline(path: Path) -> Baseline:
    """Read and check a baseline file.

    Raises:
        ValueError: the file is missing or malformed; the message names the file, the field and what was expected.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"baseline: {path}: expected a JSON file, got {type(error).__name__}: {error}") from error
    names = tuple(Baseline.__dataclass_fields__)
    if not isinstance(found, dict) or {*found} != {*names}:
        got = ", ".join(found) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"baseline: {path}: got {got or 'nothing'}, expected {', '.join(names)}")
    _expect(path, "processor", isinstance(found["processor"], str), "a text")
    _expect(path, "versions", _is(found["versions"], str), "texts by name")
    for name, kinds in (("at_most", AT_MOST), ("at_least", AT_LEAST)):
        right = (
            _is(found[name], int, float) and {*found[name]} == {*kinds} and all(map(_positive, found[name].values()))
        )
        _expect(path, name, right, f"positive numbers for {', '.join(kinds)}")
    for name in ("block", "machine_code"):
        _expect(path, name, _counts(found[name]), "whole numbers by subject and kind")
    times = found["times"]
    _expect(path, "times", _is(times, int, float) and all(map(_positive, times.values())), "positive numbers by name")
    return Baseline(**found)


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Write a baseline file, one number per line."""
    path.write_text(json.dumps(asdict(baseline), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def updated(old: Baseline | None, measured: Measured) -> Baseline:
    """Return the baseline that a run leads to.

    Tolerances are kept. So is an old ratio of the same processor that lies within the run's spread.
    """
    times = {}
    for name, spread in measured.times.items():
        before = None if old is None or old.processor != measured.processor else old.times.get(name)
        same = before is not None and spread["low"] <= before <= spread["high"]
        times[name] = before if before is not None and same else round(spread["median"], 3)
    return Baseline(
        versions=dict(measured.versions),
        processor=measured.processor,
        at_most=AT_MOST if old is None else old.at_most,
        at_least=AT_LEAST if old is None else old.at_least,
        block=measured.block,
        machine_code=measured.machine_code,
        times=times,
    )


def _expect(path: Path, name: str, right: bool, what: str) -> None:
    if not right:
        raise ValueError(f"baseline: {path}: {name}: expected {what}")


def _is(value: Any, *types: type) -> bool:
    """Whether ``value`` is a JSON object whose values are of these types; ``true`` and ``false`` are not numbers."""
    return isinstance(value, dict) and all(isinstance(v, types) and not isinstance(v, bool) for v in value.values())


def _counts(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    return all(_is(kinds, int) and {*kinds} <= {*AT_MOST} and min(kinds.values(), default=0) >= 0
               for kinds in value.values())  # fmt: skip


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0
