"""Read result files for a report: runs are checked and grouped by device, suite and settings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from pixelflow_benchmarks.harness.results import Record, Run, read_runs, result_files

VERSIONS = {
    "gpu": "GPU",
    "compute_capability": "Compute capability",
    "processor": "Processor",
    "machine": "Machine",
    "threads": "Threads",
    "python": "Python",
    "torch": "PyTorch",
    "triton": "Triton",
    "numpy": "NumPy",
    "cuda": "CUDA",
    "driver": "Driver",
}
"""Fields of every environment record, where they apply, and their names in a report."""
STATE = {
    "sm_mhz": ("SM clock", "MHz"),
    "memory_mhz": ("Memory clock", "MHz"),
    "celsius": ("Temperature", "°C"),
    "watts": ("Power", "W"),
    "watts_limit": ("Power limit", "W"),
    "held_down_by": ("Clocks held down by", ""),
    "load": ("Load", ""),
}
"""Fields of the device's momentary state, in environment and end records: name in a report and unit."""
_NO_SETTINGS = {"kind", "commit", "device", "budget_seconds", *VERSIONS, *STATE}


@dataclass(frozen=True, eq=False, slots=True)
class Group:
    """Runs of one suite on one device with the same settings.

    Attributes:
        device: name of the device's folder.
        suite: name of the suite.
        runs: the newest last.
    """

    device: str
    suite: str
    runs: list[Run]

    @property
    def newest(self) -> Run:
        """The newest run, which is the one that is shown."""
        return self.runs[-1]

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return "gpu" in self.newest.environment

    @property
    def settings(self) -> dict[str, Any]:
        """What the suite was asked to measure: shape, type, batch, ..."""
        return settings(self.newest)


def settings(run: Run) -> dict[str, Any]:
    """Return an environment record's settings: all fields but hardware, versions and state."""
    return {name: value for name, value in run.environment.items() if name not in _NO_SETTINGS}


def read_results(path: Path) -> tuple[list[Path], list[Run]]:
    """Read all runs of a result file, or of the result files in a folder and below it.

    Returns:
        The files, and their runs in the order in which they began, each run once.

    Raises:
        ValueError: there is no result file, or one cannot be read; the message names it.
    """
    files = [path] if path.is_file() else result_files(path)
    if not files:
        raise ValueError(
            f"results: got {path}, expected a result file, or a folder with DEVICE/DATE-COMMIT.jsonl in it"
        )
    found: dict[tuple[str, str, str], Run] = {}
    for file in files:
        for run in read_runs(file):
            for record in run.records:
                if not _has_form(record):
                    raise ValueError(f"results: {file}, run {run.began} of {run.suite}: {_expected(record)}")
            clean = Run(_clean(run.suite), _clean(run.began), _clean(run.records))
            found.setdefault((str(clean.environment.get("device")), clean.suite, clean.began), clean)
    return files, sorted(found.values(), key=lambda run: run.began)


def groups(runs: Iterable[Run], order: Iterable[str]) -> list[Group]:
    """Group runs by device, suite (those in ``order`` first, in that order) and settings."""
    found: dict[tuple[str, str, str], Group] = {}
    for run in sorted(runs, key=lambda run: run.began):
        device = str(run.environment.get("device", "unknown device"))
        key = (device, run.suite, json.dumps(settings(run), sort_keys=True))
        found.setdefault(key, Group(device, run.suite, [])).runs.append(run)
    places = {suite: place for place, suite in enumerate(order)}
    return [found[key] for key in sorted(found, key=lambda k: (k[0], places.get(k[1], len(places)), k[1], k[2]))]


def _clean(value: Any) -> Any:
    """Return the value with printable text: white space becomes blanks, other unprintable characters U+FFFD."""
    if isinstance(value, str):
        return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in value)
    if isinstance(value, dict):
        return {_clean(key): _clean(part) for key, part in value.items()}
    return [_clean(part) for part in value] if isinstance(value, list) else value


def _has_form(record: Record) -> bool:
    """Return whether a record has the fields that the report relies on."""
    if record["kind"] == "absent":
        return isinstance(record.get("variant"), str) and isinstance(record.get("reason"), str)
    if record["kind"] == "ceilings":
        rates = (record.get("bytes_per_second"), record.get("flops_per_second"))
        return all(_is_number(rate) and rate > 0 for rate in rates)
    if record["kind"] != "measurement":
        return True
    spreads = [record["seconds"]] if "seconds" in record else []
    times = record.get("times", {})
    return (
        isinstance(record.get("case"), str)
        and isinstance(record.get("variant"), str)
        and isinstance(record.get("right"), bool)
        and isinstance(times, dict)
        and all(_is_spread(spread) for spread in [*spreads, *times.values()])
        and all(_is_number(record[name]) for name in _FIGURES if name in record)
    )


_FIGURES = (
    "floor_seconds",
    "fraction_of_floor",
    "flops",
    "bytes",
    "peak_bytes",
    "joules",
    "first_seconds",
)


def _is_spread(value: object) -> bool:
    return isinstance(value, Mapping) and all(_is_number(value.get(name)) for name in ("median", "low", "high"))


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _expected(record: Record) -> str:
    fields = {"absent": "variant and reason", "ceilings": "bytes_per_second and flops_per_second, above 0"}
    named = fields.get(record["kind"], "case, variant and right; spreads and figures, where there are any, as numbers")
    return f"expected a record of kind {record['kind']} to have {named}; got {json.dumps(record)[:200]}"
