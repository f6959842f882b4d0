"""Result files side by side: ratios, what is beyond the spread, what differs around them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pixelflow_benchmarks.cli import bench
from pixelflow_benchmarks.compare import compare, compare_table, different_surroundings, measurements

ROOT = Path(__file__).parents[2]


def kernel(case: str, median: float, spread: float = 0.01, variant: str = "ours") -> dict[str, Any]:
    times = {"median": median, "low": median * (1 - spread), "high": median * (1 + spread)}
    return {"kind": "kernel", "case": case, "variant": variant, "right": True, **times}


def stage(number: int, median: float) -> dict[str, Any]:
    times = {"median": median, "low": 0.99 * median, "high": 1.01 * median}
    return {
        "kind": "stage",
        "stage": number,
        "batch": 16,
        "solver": "euler",
        "variant": "triton/graphs",
        "milliseconds": times,
    }


def test_ratios_and_verdicts() -> None:
    before = [kernel("a", 1.0), kernel("b", 1.0), kernel("c", 1.0, 0.2), kernel("d", 4.0), stage(3, 20.0)]
    after = [kernel("a", 1.5), kernel("b", 0.5), kernel("c", 1.2, 0.2), kernel("e", 4.0), stage(3, 20.1)]
    changes, gone, new = compare(before, after)
    assert [(c.name, round(c.ratio, 3), c.verdict) for c in changes] == [
        ("case b, variant ours", 0.5, "faster"),
        ("case a, variant ours", 1.5, "slower"),
        ("case c, variant ours", 1.2, "within the spread"),
        ("stage 3, batch 16, solver euler, variant triton/graphs", 1.005, "within the spread"),
    ]
    assert (gone, new) == (["case d, variant ours"], ["case e, variant ours"])
    table = compare_table(changes)
    assert table.title.startswith("4 measurements: 1 slower, 1 faster")
    assert [row[-1] for row in table.rows] == ["faster", "slower", "", ""]


def test_quartiles_that_touch_are_within_the_spread() -> None:
    (change,), _, _ = compare([kernel("a", 1.0, 0.1)], [kernel("a", 1.1 / 0.9, 0.1)])
    assert change.verdict == "within the spread"
    (change,), _, _ = compare([kernel("a", 1.0, 0.1)], [kernel("a", 1.2 / 0.9, 0.1)])
    assert change.verdict == "slower"


def test_wrong_and_absent_records_have_no_time() -> None:
    wrong = {"kind": "kernel", "case": "a", "variant": "ours", "right": False, "faults": ["zeros"]}
    absent = {"kind": "kernel", "case": "a", "variant": "flash", "absent": "not installed"}
    assert measurements([wrong, absent, kernel("b", 1.0)]).keys() == {"case b, variant ours"}
    with pytest.raises(ValueError, match="results: got two files without a measurement in common"):
        compare([wrong], [kernel("a", 1.0)])
    with pytest.raises(ValueError, match="results: got case a, variant ours twice"):
        measurements([kernel("a", 1.0), kernel("a", 2.0)])


def test_other_machines_are_named_and_other_commits_are_not() -> None:
    one = {"kind": "environment", "gpu": "A", "torch": "2.11", "commit": "x", "celsius": 30}
    two = {"kind": "environment", "gpu": "B", "torch": "2.11", "commit": "y", "celsius": 50, "driver": "580"}
    assert different_surroundings([one], [two]) == ["gpu: A and B", "driver: None and 580"]
    assert different_surroundings([one], [one]) == []


def test_the_command_on_committed_results(tmp_path: Path) -> None:
    path = ROOT / "benchmarks/results/cpu/cascade.jsonl"
    slower = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "time" and record["variant"] == "engine, compiled":
            record |= {key: 2 * record[key] for key in ("median", "low", "high")}
        if record["kind"] == "environment":
            record["torch"] = "another"
        slower.append(json.dumps(record))
    (tmp_path / "after.jsonl").write_text("\n".join(slower))
    runner = CliRunner()
    same = runner.invoke(bench, ["compare", str(path), str(path)])
    assert same.exit_code == 0, same.output
    assert "4 measurements: 0 slower, 0 faster" in " ".join(same.output.split())
    other = runner.invoke(bench, ["compare", str(path), str(tmp_path / "after.jsonl")])
    assert other.exit_code == 1, "something is slower"
    words = " ".join(other.output.split())
    assert "1 slower" in words
    assert "2.000" in words
    assert "torch: 2.13.0+cpu and another" in words
