"""Timing and what decides whether a kernel gets a speed at all."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pixelflow_benchmarks.harness import timing
from pixelflow_benchmarks.harness.ceilings import Ceilings, measure_ceilings
from pixelflow_benchmarks.harness.timing import Timing, lacks_memory, spread, time_calls, time_runs
from pixelflow_benchmarks.suites.kernels.case import Case, faults
from pixelflow_benchmarks.suites.kernels.measure import measure
from pixelflow_benchmarks.suites.kernels.table import kernel_table
from support.results import run_of

CPU = torch.device("cpu")
CEILINGS = Ceilings(bytes_per_second=1e9, flops_per_second=1e12, dtype=torch.float32)


def test_a_call_takes_as_long_as_it_takes() -> None:
    called: list[str] = []

    def slow() -> None:
        called.append("slow")
        time.sleep(0.02)

    timings = time_calls({"slow": slow, "fast": lambda: called.append("fast")}, CPU, repeats=4)
    assert timings["slow"].median >= 0.02
    fast = timings["fast"].spread()
    assert fast["low"] <= fast["median"] <= fast["high"]
    assert len(timings["slow"].turns) == 4
    assert not timings["slow"].captured
    assert called[2:] == ["slow", "fast"] * 4, "variants take turns"


def fails_at(call: int, said: str = "out of paper\nand more") -> Callable[[], Any]:
    """A function that returns the squares of :func:`case` and raises in one of its calls, counted from 1."""
    calls: list[None] = []
    x = torch.randn(1000, generator=torch.Generator().manual_seed(3))

    def run() -> tuple[Tensor]:
        calls.append(None)
        if len(calls) == call:
            raise RuntimeError(said)
        return (x * x,)

    return run


@pytest.mark.parametrize("call", [1, 3])
def test_a_call_that_fails_is_left_out_where_its_error_is_noted(call: int) -> None:
    failed: dict[str, str] = {}
    timings = time_calls({"fails": fails_at(call), "works": lambda: None}, CPU, repeats=3, failed=failed)
    assert timings.keys() == {"works"}
    assert len(timings["works"].turns) == 3
    assert failed == {"fails": "RuntimeError: out of paper"}
    with pytest.raises(RuntimeError, match="out of paper"):
        time_calls({"fails": fails_at(call)}, CPU, repeats=3)


def test_too_few_repeats_are_refused() -> None:
    with pytest.raises(ValueError, match="repeats: got 2, expected at least 3"):
        time_calls({}, CPU, repeats=2)


def test_a_fifth_lies_below_and_a_fifth_above() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0, 6.0]
    assert spread(values) == {"median": 3.5, "low": 2.0, "high": 5.0, "repeats": 6}
    assert Timing(tuple(values)).spread() == spread(values)


def test_ratios_are_of_one_turn() -> None:
    """A machine that is four times slower in one turn disturbs neither ratio."""
    ours, theirs = Timing((1.0, 4.0, 1.0)), Timing((2.0, 8.0, 2.0))
    assert ours.times_faster_than(theirs) == {"median": 2.0, "low": 2.0, "high": 2.0, "repeats": 3}
    assert theirs.times_faster_than(ours)["median"] == 0.5


def test_runs_take_turns_and_who_fails_is_left_out() -> None:
    called: list[str] = []

    def fail() -> None:
        called.append("fails")
        if called.count("fails") == 2:
            raise RuntimeError("out of paper\nand more")

    runs = time_runs({"works": lambda: called.append("works"), "fails": fail}, CPU, repeats=3)
    assert called == ["works", "fails", "works", "fails", "works"]
    assert len(runs.timings["works"].turns) == 3
    assert runs.timings.keys() == {"works"}
    assert runs.failed == {"fails": "RuntimeError: out of paper"}


def test_no_turn_is_begun_after_the_deadline() -> None:
    runs = time_runs({"works": lambda: None}, CPU, repeats=5, deadline=time.perf_counter() - 1)
    assert len(runs.timings["works"].turns) == 1, "one turn at least"


def more_than_there_is() -> Tensor:
    return torch.empty(2**50)


def unnamed_lack() -> None:
    raise MemoryError


def too_many_registers() -> None:
    raise RuntimeError("out of resource: shared memory, Required: 300000, Hardware limit: 232448")


@pytest.mark.parametrize(
    ("call", "lacking"), [(more_than_there_is, True), (unnamed_lack, True), (too_many_registers, False)]
)
def test_a_lack_of_memory_is_told_from_other_errors(call: Callable[[], object], lacking: bool) -> None:
    (said,) = time_runs({"it": call}, CPU, repeats=1).failed.values()
    assert lacks_memory(said) == lacking


def test_ceilings_are_rates() -> None:
    found = measure_ceilings(CPU, torch.float32, repeats=3)
    assert found.bytes_per_second > 0
    assert found.flops_per_second > 0


def case(ours: Callable[[Tensor], Tensor], **overrides: Any) -> Case:
    """Squares of some numbers; 4 kB read and 4 kB written."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    fields: dict[str, Any] = {
        "name": "squares",
        "variants": {"ours": lambda: (ours(x),), "eager": lambda: (x * x,)},
        "plain": lambda: (x * x,),
        "truth": lambda: (x.double() ** 2,),
        "bytes_moved": 8000,
    }
    return Case(**(fields | overrides))


@pytest.mark.parametrize(
    ("ours", "exact", "said"),
    [
        (lambda x: x * x, True, None),
        (lambda x: x * x, False, None),
        (lambda x: x.abs() ** 2, False, None),
        (lambda x: torch.nextafter(x * x, torch.tensor(9.0)), True, "1000 of 1000 values differ"),
        (lambda x: x * x + 1e-4, False, "of a row's largest value, bound"),
        (lambda x: (x * x).index_fill(0, torch.tensor([500]), torch.nan), False, "error nan"),
        (lambda x: (x * x)[:-1], False, "expected torch.float32 (1000,)"),
        (lambda x: (x * x).double(), False, "expected torch.float32"),
    ],
)
def test_what_is_wrong_is_found(ours: Callable[[Tensor], Tensor], exact: bool, said: str | None) -> None:
    found = faults(case(ours, exact=exact))["ours"]
    assert (found == []) if said is None else (len(found) == 1 and said in found[0])


def test_the_turns_of_one_case_leave_time_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing.time, "perf_counter", lambda: 100.0)
    assert timing.end_of_turns(math.inf) == 100 + timing.TURNS_SECONDS
    assert timing.end_of_turns(100 + 60.0) == pytest.approx(110)
    assert timing.end_of_turns(90.0) < 100


def test_no_case_is_begun_after_the_deadline() -> None:
    cases = [case(lambda x: x * x, name=name) for name in "abc"]
    records = list(measure(cases, CEILINGS, CPU, 3, deadline=time.perf_counter() - 1))
    assert [r.get("case") for r in records] == ["a", "a", None]
    assert records[-1] == {"kind": "skipped", "reason": "no time was left after 1 cases"}


@pytest.mark.parametrize("call", [1, 2, 4], ids=["check", "warm-up", "turn"])
def test_a_variant_that_fails_ends_nothing(call: int) -> None:
    variants = {"ours": fails_at(call), "eager": fails_at(0)}
    cases = [case(lambda x: x, variants=variants, name="one fails"), case(lambda x: x * x, name="next")]
    records = list(measure(cases, CEILINGS, CPU, repeats=3))
    assert [(r["case"], r["variant"], r["right"]) for r in records] == [
        ("one fails", "ours", False),
        ("one fails", "eager", True),
        ("next", "ours", True),
        ("next", "eager", True),
    ]
    assert records[0]["fault"] == "RuntimeError: out of paper"
    assert "seconds" not in records[0]
    assert records[1]["seconds"]["repeats"] == 3


@pytest.mark.parametrize("what", ["plain", "truth"])
def test_where_nothing_can_be_compared_the_next_case_is_measured(what: str) -> None:
    cases = [case(lambda x: x * x, **{what: fails_at(1)}), case(lambda x: x * x)]
    records = list(measure(cases, CEILINGS, CPU, repeats=3))
    assert [r["right"] for r in records] == [False, False, True, True]
    assert {r["fault"] for r in records[:2]} == {"nothing to compare with: RuntimeError: out of paper"}


def test_a_missing_output_is_wrong() -> None:
    two = replace(case(lambda x: x * x), plain=lambda: (torch.zeros(1),) * 2)
    assert faults(two)["ours"] == ["1 outputs, expected 2"]


def test_nothing_wrong_gets_a_speed() -> None:
    cases = [
        case(lambda x: x * x, name="right", flops=500),
        case(lambda x: x * x + 1, name="wrong", absent={"other": "not installed"}),
    ]
    records = list(measure(cases, CEILINGS, CPU, repeats=3))
    by_name = {(r["case"], r["variant"]): r for r in records}
    right, wrong = by_name["right", "ours"], by_name["wrong", "ours"]
    assert right["right"]
    median = right["seconds"]["median"]
    assert right["fraction_of_copy"] == pytest.approx(8000 / median / 1e9)
    assert right["gigabytes_per_second"] == pytest.approx(right["fraction_of_copy"])
    assert right["teraflops"] == pytest.approx(500 / median / 1e12)
    assert right["floor_seconds"] == pytest.approx(8000 / 1e9), "the bytes take longer than the products"
    assert right["fraction_of_floor"] == pytest.approx(right["fraction_of_copy"])
    assert right["times"]["eager"]["repeats"] == 3
    assert not wrong["right"]
    assert "seconds" not in wrong
    assert "error" in wrong["fault"]
    assert "seconds" in by_name["wrong", "eager"]
    other = by_name["wrong", "other"]
    assert (other["kind"], other["reason"]) == ("absent", "not installed")

    run = run_of("kernels", CEILINGS.record(), *records, dtype="float32", batch=1)
    rows = {row[:2]: row for row in kernel_table(run).rows}
    assert rows["wrong", "ours"][2] == "wrong: no speed"
    assert rows["wrong", "other"][2] == "not installed"
    assert rows["right", "ours"][2].startswith(f"{median * 1e6:.1f} (")
    assert rows["right", "eager"][5] == "1.00 (1.00 to 1.00)"


def test_every_operation_has_cases_that_are_right_and_timed(tmp_path: Path) -> None:
    """The command tried out on a CPU at the smallest stages, where `ours` is each operation's CPU implementation."""
    from typer.testing import CliRunner

    from pixelflow_benchmarks.cli import bench

    output = tmp_path / "kernels.jsonl"
    command = ["kernels", "--device", "cpu", "--dtype", "float32", "--batch", "1", "--repeats", "3", "--output"]
    stages = ["--stage", "0", "--op", "rope2d", "--op", "modulate", "--op", "ode_step"]
    result = CliRunner().invoke(bench, [*command, str(output), *stages])
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [r["kind"] for r in records[:2]] == ["environment", "ceilings"]
    assert records[-1]["kind"] == "end"
    ours = {r["case"]: r for r in records if r.get("variant") == "ours"}
    assert len(ours) == 12
    assert all(r["right"] and r["seconds"]["median"] > 0 for r in ours.values())
