"""Runs and result files for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pixelflow_benchmarks.harness.results import Run

HEAD = {
    "kind": "environment", "commit": "abc", "torch": "2.13", "machine": "x86_64", "processor": "a CPU", "threads": "2",
    "device": "a-cpu", "load": 0.0,
}  # fmt: skip


def run_of(suite: str, *records: dict[str, Any], began: str = "2026-01-01T00:00:00+00:00", **head: Any) -> Run:
    """Return a run with these records between an environment and an end record."""
    return Run(suite, began, [{**HEAD, **head}, *records, {"kind": "end"}])


def spread_of(median: float, off: float = 0.01, repeats: int = 20) -> dict[str, float]:
    """Return a spread around a median."""
    return {"median": median, "low": median * (1 - off), "high": median * (1 + off), "repeats": repeats}


def measurement(case: str, variant: str, median: float, off: float = 0.01, **more: Any) -> dict[str, Any]:
    """Return a measurement that passed its check."""
    record = {"kind": "measurement", "case": case, "variant": variant, "right": True, "per": "call"}
    return {**record, "seconds": spread_of(median, off), **more}


def write_runs(path: Path, *runs: Run) -> Path:
    """Write a result file and return its path."""
    lines = [json.dumps({"suite": run.suite, "run": run.began, **record}) for run in runs for record in run.records]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))
    return path
