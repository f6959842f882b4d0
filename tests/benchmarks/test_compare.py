"""Result files side by side: ratios, what is beyond the spread, what differs around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pixelflow_benchmarks.analysis.compare import (
    agreement_table,
    became_wrong,
    compare,
    compare_table,
    different_surroundings,
    measurements,
)
from pixelflow_benchmarks.cli import bench
from pixelflow_benchmarks.harness.results import Run
from support.results import measurement, run_of, spread_of, write_runs


def kernels(**medians: float) -> Run:
    """Spreads of 20 % for what is called noisy, of 1 % otherwise."""
    return run_of("kernels", *(measurement(k, "ours", m, 0.2 if k == "noisy" else 0.01) for k, m in medians.items()))


def test_ratios_and_verdicts() -> None:
    before = [kernels(a=1.0, b=1.0, noisy=1.0, d=4.0), run_of("stages", measurement("stage 3", "triton", 20.0))]
    after = [kernels(a=1.5, b=0.5, noisy=1.2, e=4.0), run_of("stages", measurement("stage 3", "triton", 20.1))]
    changes, gone, new = compare(before, after)
    assert [(c.name, round(c.ratio, 3), c.verdict) for c in changes] == [
        ("kernels: b, ours", 0.5, "faster"),
        ("kernels: a, ours", 1.5, "slower"),
        ("kernels: noisy, ours", 1.2, "within the spread"),
        ("stages: stage 3, triton", 1.005, "within the spread"),
    ]
    assert (gone, new) == (["kernels: d, ours"], ["kernels: e, ours"])
    table = compare_table(changes)
    assert table.title.startswith("4 measurements: 1 slower, 1 faster")
    assert [row[-1] for row in table.rows] == ["faster", "slower", "", ""]


def test_spreads_that_touch_are_no_change() -> None:
    for after, verdict in ((1.1 / 0.9, "within the spread"), (1.2 / 0.9, "slower"), (0.9 / 1.2, "faster")):
        one, two = ([run_of("kernels", measurement("a", "ours", m, 0.1))] for m in (1.0, after))
        (change,), _, _ = compare(one, two)
        assert change.verdict == verdict


def beside(variant: str, seconds: float, ratio: float, off: float = 0.01) -> dict[str, Any]:
    """Measured, and so many times faster than eager in the same turns."""
    return measurement("a", variant, seconds, off, times={"eager": spread_of(ratio, off)})


@pytest.mark.parametrize(
    ("seconds", "ratio", "verdict", "change"),
    [
        (2.0, 1.5, "within the spread", 1.0),  # the machine is half as fast
        (1.0, 1.0, "slower", 1.5),  # though it takes as long: the machine is faster
        (0.5, 3.0, "faster", 0.5),
        (1.0, 1.51, "within the spread", 1.5 / 1.51),
    ],
)
def test_what_counts_is_the_time_beside_an_opponents(seconds: float, ratio: float, verdict: str, change: float) -> None:
    before = [run_of("kernels", beside("eager", 1.5, 1.0), beside("ours", 1.0, 1.5))]
    after = [run_of("kernels", beside("eager", seconds * ratio, 1.0), beside("ours", seconds, ratio))]
    changes = {c.name: c for c in compare(before, after)[0]}
    assert changes["kernels: a, ours"].verdict == verdict
    assert changes["kernels: a, ours"].ratio == pytest.approx(change)
    assert changes["kernels: a, eager"].verdict in ("the machine", "within the spread"), "it is not our code"
    assert (changes["kernels: a, eager"].verdict == "the machine") == (abs(seconds * ratio / 1.5 - 1) > 0.02)


def test_an_opponent_beside_another_one_is_the_machine_still() -> None:
    """The noise loop becomes faster: the reference did not become slower, nor did the engine."""

    def images(loop: float) -> Run:
        seconds = {"reference": 1.0, "loop": loop, "engine": 0.5}
        others = ("reference", "loop")
        return run_of("images", *(
            measurement("a", name, s, times={other: spread_of(seconds[other] / s) for other in others})
            for name, s in seconds.items()
        ))  # fmt: skip

    changes = {c.name: c.verdict for c in compare([images(1.4)], [images(1.2)])[0]}
    assert changes == {
        "images: a, reference": "the machine",
        "images: a, loop": "the machine",
        "images: a, engine": "within the spread",
    }


WRONG = {"kind": "measurement", "case": "a", "variant": "ours", "right": False, "fault": "zeros"}


def test_what_becomes_wrong_is_said_and_leaves_with_1(tmp_path: Path) -> None:
    before = write_runs(tmp_path / "before.jsonl", kernels(a=1.0, b=1.0))
    after = write_runs(tmp_path / "after.jsonl", run_of("kernels", WRONG, measurement("b", "ours", 1.0)))
    worse = CliRunner().invoke(bench, ["compare", str(before), str(after)])
    assert worse.exit_code == 1
    assert "wrong, and right before: kernels: a, ours" in worse.output
    assert "only before" not in worse.output
    better = CliRunner().invoke(bench, ["compare", str(after), str(before)])
    assert better.exit_code == 0, better.output
    assert "only after: kernels: a, ours" in better.output


def test_what_was_wrong_once_is_wrong_and_bytes_are_checked_too() -> None:
    """In one of two runs of the second file, or with nothing else in common."""
    held = {"kind": "memory", "case": "stage 3", "variant": "ours", "right": True, "peak_bytes": 1}
    lost = {"kind": "memory", "case": "stage 3", "variant": "ours", "right": False, "fault": "zeros"}
    assert became_wrong([kernels(a=1.0)], [run_of("kernels", WRONG), kernels(a=1.0)]) == ["kernels: a, ours"]
    assert became_wrong([run_of("kernels", WRONG), kernels(a=1.0)], [run_of("kernels", WRONG)]) == []
    assert became_wrong([run_of("memory", held)], [run_of("memory", lost)]) == ["memory: stage 3, ours"]
    assert compare([kernels(a=1.0)], [run_of("kernels", WRONG)]) == ([], [], [])


def test_runs_of_another_budget_count_together() -> None:
    runs = [run_of("stages", measurement("a", "ours", m), budget_seconds=b) for m, b in ((1.0, 480.0), (3.0, 900.0))]
    assert measurements(runs)["stages: a, ours"].seconds.median == 2.0


def test_how_two_runs_of_one_version_agree() -> None:
    """One of three is beyond its spread in seconds, and another one beside its opponent."""
    one = [
        run_of("kernels", beside("ours", 1.0, 1.5), measurement("b", "ours", 1.0)),
        run_of("images", beside("x", 1, 2)),
    ]
    two = [
        run_of("kernels", beside("ours", 1.0, 1.6), measurement("b", "ours", 2.0)),
        run_of("images", beside("x", 1, 2)),
    ]
    assert agreement_table(one, two).rows == (
        ("kernels", "1", "2", "1", "2.0%", "1", "1", "2.0%"),
        ("images", "1", "1", "0", "2.0%", "1", "0", "2.0%"),
        ("all", "2", "3", "1", "2.0%", "2", "1", "2.0%"),
    )


def test_runs_under_one_condition_count_together() -> None:
    """Medians 1, 2 and 4 with spreads of 1 %: 2, from 0.99 to 4.04."""
    runs = [kernels(a=1.0), kernels(a=4.0), kernels(a=2.0, b=7.0)]
    found = measurements(runs)
    seconds = found["kernels: a, ours"].seconds
    assert (seconds.median, seconds.low, seconds.high) == (2.0, pytest.approx(0.99), pytest.approx(4.04))
    assert found["kernels: b, ours"].seconds.median == 7.0
    once = [kernels(a=4.1)]
    assert [c.verdict for c in compare(runs, once)[0]] == ["slower"]
    assert [c.verdict for c in compare(runs, [*once, kernels(a=3.0)])[0]] == ["within the spread"]


def test_ratios_of_several_runs_count_together_where_all_have_them() -> None:
    one, two = (run_of("kernels", beside("ours", s, r), began=f"2026-0{s:.0f}-01") for s, r in ((1.0, 1.5), (2.0, 3.0)))
    ratio = measurements([one, two])["kernels: a, ours"].times["eager"]
    assert (ratio.median, ratio.low, ratio.high) == (2.25, pytest.approx(1.485), pytest.approx(3.03))
    alone = run_of("kernels", measurement("a", "ours", 1.0))
    assert not measurements([one, alone])["kernels: a, ours"].times


def test_under_other_conditions_the_newest_run_counts() -> None:
    earlier = run_of("kernels", measurement("a", "ours", 1.0), measurement("b", "ours", 2.0), batch=1)
    later = run_of("kernels", measurement("a", "ours", 3.0), began="2026-02-01", batch=2)
    found = measurements([later, earlier])
    assert {name: m.seconds.median for name, m in found.items()} == {"kernels: a, ours": 3.0, "kernels: b, ours": 2.0}


def test_wrong_and_absent_records_have_no_time() -> None:
    absent = {"kind": "absent", "case": "a", "variant": "flash", "reason": "not installed"}
    run = run_of("kernels", WRONG, absent, measurement("b", "ours", 1.0))
    assert measurements([run]).keys() == {"kernels: b, ours"}
    with pytest.raises(ValueError, match="results: got two files without a measurement in common"):
        compare([run_of("kernels", WRONG)], [kernels(a=1.0)])


def test_other_machines_are_named_and_other_commits_are_not() -> None:
    one = run_of("kernels", gpu="A", commit="x", celsius=30)
    two = run_of("kernels", gpu="B", commit="y", celsius=50, driver="580")
    assert different_surroundings([one], [two]) == ["kernels, gpu: A and B", "kernels, driver: None and 580"]
    assert different_surroundings([one], [one, run_of("stages")]) == []


def test_the_command(tmp_path: Path) -> None:
    before = write_runs(tmp_path / "before.jsonl", kernels(a=1.0, b=1.0))
    after = write_runs(
        tmp_path / "after.jsonl", run_of("kernels", *kernels(a=2.0, b=1.0).records[1:-1], torch="another")
    )
    runner = CliRunner()
    same = runner.invoke(bench, ["compare", str(before), str(before)])
    assert same.exit_code == 0, same.output
    assert "2 measurements: 0 slower, 0 faster" in " ".join(same.output.split())
    other = runner.invoke(bench, ["compare", str(before), str(after)])
    assert other.exit_code == 1, "something is slower"
    words = " ".join(other.output.split())
    assert "1 slower" in words
    assert "2.000" in words
    assert "torch: 2.13 and another" in words
