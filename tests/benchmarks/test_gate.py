"""The regression gate: what a run is compared with, which changes fail it, and that seeded ones are noticed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from pixelflow_benchmarks.cli import bench
from pixelflow_benchmarks.suites.blocks import trace_engine_block
from pixelflow_benchmarks.suites.gate import baseline as baseline_module
from pixelflow_benchmarks.suites.gate import measure
from pixelflow_benchmarks.suites.gate.baseline import DEFAULT, Baseline, read_baseline, updated, write_baseline
from pixelflow_benchmarks.suites.gate.compare import FAILING, changes
from pixelflow_benchmarks.suites.gate.measure import COMPILED, Measured, compile_sample, count_block, ratios, sample
from pixelflow_benchmarks.suites.images.opponents import EXACT, REFERENCE
from pixelflow_engine.fused import FusedOperations
from pixelflow_engine.operations import PlainOperations
from support.results import spread_of

VERSIONS = {"triton": "3.7.1", "ptxas": "12.8.93"}


def measured(**other: Any) -> Measured:
    known: dict[str, Any] = {
        "versions": VERSIONS,
        "processor": "x",
        "block": {"pointwise": {"launches": 3, "bytes": 1000}},
        "machine_code": {
            "op.a": {"instructions": 1000, "main_loop": 200, "registers": 100, "spills": 0, "narrow": 0, "shared": 4096}
        },
        "times": {EXACT: spread_of(1.0)},
    }
    return Measured(**(known | other))


BASELINE = updated(None, measured())


def kernel(**kinds: int) -> dict[str, dict[str, int]]:
    return {"op.a": BASELINE.machine_code["op.a"] | kinds}


def verdicts(run: Measured, baseline: Baseline = BASELINE) -> dict[str, str]:
    return {change.name: change.verdict for change in changes(baseline, run) if change.verdict != "same"}


def test_the_same_again_passes() -> None:
    assert verdicts(measured()) == {}
    assert len(changes(BASELINE, measured())) == 2 + 6 + 1


@pytest.mark.parametrize(
    ("change", "name", "verdict"),
    [
        ({"block": {"pointwise": {"launches": 4, "bytes": 1000}}}, "block, pointwise: launches", "worse"),
        ({"block": {"pointwise": {"launches": 3, "bytes": 1001}}}, "block, pointwise: bytes", "worse"),
        ({"block": {"pointwise": {"launches": 2, "bytes": 1000}}}, "block, pointwise: launches", "better"),
        ({"machine_code": kernel(spills=1)}, "sm_90, op.a: spills", "worse"),
        ({"machine_code": kernel(narrow=2)}, "sm_90, op.a: narrow", "worse"),
        ({"machine_code": kernel(shared=4097)}, "sm_90, op.a: shared", "worse"),
        ({"machine_code": kernel(instructions=1020)}, "sm_90, op.a: instructions", "worse"),
        ({"machine_code": kernel(instructions=1010)}, "sm_90, op.a: instructions", "grown, within its tolerance"),
        ({"machine_code": kernel(instructions=999)}, "sm_90, op.a: instructions", "better"),
        ({"machine_code": kernel(main_loop=203)}, "sm_90, op.a: main_loop", "worse"),
        ({"machine_code": kernel(registers=106)}, "sm_90, op.a: registers", "worse"),
        ({"times": {EXACT: spread_of(0.87)}}, f"CPU, {EXACT}: times faster than the reference", "worse"),
        ({"times": {EXACT: spread_of(1.2)}}, f"CPU, {EXACT}: times faster than the reference", "better"),
    ],
)  # fmt: skip
def test_what_changes_is_named(change: dict[str, Any], name: str, verdict: str) -> None:
    assert verdicts(measured(**change)) == {name: verdict}


def test_a_ratio_fails_by_its_whole_spread_alone() -> None:
    """The limit is 0.9: what reaches it from below with a fifth of the turns has not failed."""
    assert verdicts(measured(times={EXACT: spread_of(0.7, 0.3)})) == {}
    assert verdicts(measured(times={EXACT: spread_of(0.7, 0.27)})) != {}
    assert verdicts(measured(times={EXACT: spread_of(1.3, 0.15)})) == {}, "better, but not with the whole spread"


def test_before_after_and_ratio_are_said() -> None:
    found = changes(BASELINE, measured(machine_code=kernel(instructions=1020, spills=3)))
    assert [change.line for change in found[:2]] == [
        "worse: sm_90, op.a: instructions: from 1000 to 1020, ratio 1.02 (at most 1.01)",
        "worse: sm_90, op.a: spills: from 0 to 3, ratio inf (at most 1)",
    ]


def test_what_only_one_of_them_has_fails() -> None:
    found = verdicts(measured(machine_code={"op.b": {"spills": 0}}, times={COMPILED: spread_of(1.0)}))
    assert {name: verdict for name, verdict in found.items() if not name.startswith("sm_90, op.a")} == {
        "sm_90, op.b: spills": "new",
        f"CPU, {COMPILED}: times faster than the reference": "new",
        f"CPU, {EXACT}: times faster than the reference": "gone",
    }
    assert [verdict for name, verdict in found.items() if name.startswith("sm_90, op.a")] == ["gone"] * 6
    assert {"new", "gone", "worse", "wrong"} == {*FAILING}


def test_what_is_wrong_is_said_once() -> None:
    run = measured(machine_code={}, times={}, faults={"op.a": "does not compile", f"CPU, {EXACT}": "not finite"})
    assert verdicts(run) == {"op.a": "wrong", f"CPU, {EXACT}": "wrong"}


def test_other_compilers_machine_code_is_not_compared() -> None:
    assert verdicts(measured(machine_code={}, skipped="triton 3.6.0 instead of 3.7.1")) == {}


# --- seeded regressions ------------------------------------------------------------------------------------


class GeluApart(FusedOperations):
    linear_gelu = PlainOperations.linear_gelu


def test_a_fourth_pointwise_launch_is_noticed() -> None:
    baseline = replace(BASELINE, block=count_block())
    assert baseline.block["pointwise"]["launches"] == 3
    assert verdicts(measured(block=count_block()), baseline) == {}
    found = verdicts(measured(block=count_block(GeluApart("triton"))), baseline)
    assert found["block, pointwise: launches"] == "worse"
    assert found["block, pointwise: bytes"] == "worse"
    assert sum(len(kinds) for kinds in baseline.block.values()) == 6
    traced = trace_engine_block(FusedOperations("triton"), True, 32, 64)
    assert sum(kinds["bytes"] for kinds in baseline.block.values()) == sum(op.bytes_moved for op in traced)


def test_what_the_compiler_makes_worse_is_noticed() -> None:
    """One kernel held to fewer registers, which it spills, and one that is no longer told that its rows are aligned."""
    by_name = {specimen.name: specimen for specimen in sample()}
    spilt = by_name["modulate.forward.layer_norm_modulate/bf16/c1152"]
    longer = by_name["ode_step.euler/bf16/guided-dense"]
    before, faults = compile_sample([spilt, longer])
    assert faults == {}
    assert {*before[spilt.name]} == {"instructions", "registers", "spills", "narrow", "shared"}
    after, _ = compile_sample(
        [
            replace(spilt, options={**spilt.options, "maxnreg": 32}),
            replace(longer, unaligned=("velocity_ptr", "x_ptr", "out_ptr")),
        ]
    )
    found = verdicts(measured(machine_code=after), replace(BASELINE, machine_code=before))
    assert found[f"sm_90, {spilt.name}: spills"] == "worse"
    assert found[f"sm_90, {longer.name}: instructions"] == "worse"
    assert found[f"sm_90, {longer.name}: narrow"] == "worse"
    _, faults = compile_sample([replace(longer, constants={**longer.constants, "BLOCK": 63})])
    assert faults[longer.name].startswith("does not compile")


def test_an_engine_that_sleeps_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only the calls move."""
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def call(seconds: float, value: float = 1.0) -> Callable[[], Tensor]:
        def run() -> Tensor:
            nonlocal now
            now += seconds
            return torch.full((1, 3, 2, 2), value)

        return run

    def run(**calls: Callable[[], Tensor]) -> Measured:
        everybody = {REFERENCE: call(0.08), EXACT: calls["exact"]}
        times, faults = ratios(everybody, lambda: torch.ones(1, 3, 2, 2, dtype=torch.float64), turns=20)
        return measured(times=times, faults={f"CPU, {name}": fault for name, fault in faults.items()})

    name = f"CPU, {EXACT}: times faster than the reference"
    as_before = run(exact=call(0.08))
    assert as_before.times[EXACT]["repeats"] == 20
    assert verdicts(as_before) == {}
    assert verdicts(run(exact=call(0.08 + 0.02))) == {name: "worse"}
    assert verdicts(run(exact=call(0.04))) == {name: "better"}
    off = run(exact=call(0.01, value=1.5))
    assert off.times == {}, "nothing wrong gets a time"
    other = changes(BASELINE, off)[0]
    assert (other.verdict, other.name) == ("wrong", f"CPU, {EXACT}")
    assert "12 of 12 values differ" in other.after


# --- the file ----------------------------------------------------------------------------------------------


def test_the_committed_baseline_is_what_the_code_measures() -> None:
    """Of the block, which takes no time to count; of the sample, the names."""
    baseline = read_baseline(DEFAULT)
    assert baseline.block == count_block()
    assert [*baseline.machine_code] == [specimen.name for specimen in sample()]
    assert {*baseline.times} == {EXACT, COMPILED}
    assert all(baseline.at_most[kind] == 1 for kind in ("launches", "bytes", "spills"))
    assert baseline.at_most["instructions"] == 1.01
    assert "seconds" not in DEFAULT.read_text(), "no absolute times"


def test_a_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_baseline(tmp_path / "b.json", BASELINE)
    assert read_baseline(tmp_path / "b.json") == BASELINE


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (None, "expected a JSON file, got FileNotFoundError"),
        ("{", "expected a JSON file, got JSONDecodeError"),
        ("[]", "got list, expected versions, processor"),
        ({"more": 1}, "expected versions, processor"),
        ({"versions": {"triton": 3}}, "versions: expected texts"),
        ({"at_most": {"launches": 1.0}}, "at_most: expected positive numbers for launches, bytes"),
        ({"at_least": {"times": 0}}, "at_least: expected positive numbers for times"),
        ({"at_least": {"times": float("nan")}}, "at_least: expected positive numbers for times"),
        ({"block": {"pointwise": {"launches": 3.5}}}, "block: expected whole numbers"),
        ({"block": {"pointwise": {"launches": True}}}, "block: expected whole numbers"),
        ({"machine_code": {"a": {"speed": 3}}}, "machine_code: expected whole numbers"),
        ({"machine_code": {"a": {"spills": -1}}}, "machine_code: expected whole numbers"),
        ({"times": {"a": "fast"}}, "times: expected positive numbers"),
    ],
)
def test_a_malformed_file_is_refused_by_name(change: str | dict[str, Any] | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    if isinstance(change, str):
        path.write_text(change)
    elif change is not None:
        write_baseline(path, BASELINE)
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"baseline: .*b.json: .*{said}"):
        read_baseline(path)


def test_what_an_update_keeps() -> None:
    """Tolerances, and a ratio that the new spread still holds: a diff has what changed and no noise."""
    old = replace(BASELINE, at_most=BASELINE.at_most | {"registers": 1.2})
    new = updated(old, measured(times={EXACT: spread_of(1.01)}, machine_code=kernel(spills=2)))
    assert new.at_most == old.at_most
    assert new.times == {EXACT: 1.0}
    assert new.machine_code["op.a"]["spills"] == 2
    assert updated(old, measured(times={EXACT: spread_of(1.05)})).times == {EXACT: 1.05}
    assert updated(old, measured(times={EXACT: spread_of(1.01)}, processor="y")).times == {EXACT: 1.01}


# --- the command -------------------------------------------------------------------------------------------


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """The command with what it measures made up."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(measure, "sample", list)
    monkeypatch.setattr(measure, "compilers", lambda: VERSIONS)
    monkeypatch.setattr(measure, "processor", lambda: "x")

    def run(*arguments: str, file: Path | None = tmp_path / "b.json", **made_up: Any) -> tuple[int, str]:
        its = measured(**made_up)
        monkeypatch.setattr(measure, "count_block", lambda: its.block)
        monkeypatch.setattr(measure, "compile_sample", lambda specimens: (its.machine_code, its.faults))
        monkeypatch.setattr(measure, "engine_ratios", lambda: (its.times, {}))
        named = [] if file is None else ["--baseline", str(file)]
        result = CliRunner().invoke(bench, ["gate", *named, *arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output

    return run


def test_the_command(gate: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    file = tmp_path / "b.json"
    with pytest.raises(ValueError, match=r"baseline: .*b\.json: expected a JSON file, got FileNotFoundError"):
        gate()
    assert gate("--update")[0] == 0
    assert read_baseline(file) == BASELINE
    assert gate()[0] == 0
    code, said = gate(machine_code=kernel(instructions=1020))
    assert code == 1
    assert "worse: sm_90, op.a: instructions: from 1000 to 1020, ratio 1.02" in said
    code, said = gate(machine_code=kernel(instructions=900))
    assert code == 0
    assert "better than the baseline: run pixelflow bench gate --update" in said
    code, said = gate("--update", machine_code=kernel(instructions=900))
    assert (code, "900" in said, "better" in said) == (0, True, True), "it says what changed"
    assert read_baseline(file).machine_code["op.a"]["instructions"] == 900


@pytest.mark.parametrize("arguments", [(), ("--update",)], ids=str)
def test_an_installed_package_has_no_baseline(
    gate: Callable[..., tuple[int, str]], arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is one written among the packages."""
    monkeypatch.setattr(baseline_module, "DEFAULT", tmp_path / "site-packages" / "baselines.json")
    (tmp_path / "site-packages").mkdir()
    with pytest.raises(ValueError, match=r"^baseline: there is no .*site-packages/baselines.json: .* source checkout"):
        gate(*arguments, file=None)
    assert not [*(tmp_path / "site-packages").iterdir()]
    assert gate("--update")[0] == 0, "a file that is named may be anywhere"
    (tmp_path / "pyproject.toml").touch()
    assert gate("--update", file=None)[0] == 0, "a checkout may have lost its own"
    assert gate(file=None)[0] == 0


def test_other_versions_are_said_and_skipped(gate: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    write_baseline(tmp_path / "b.json", replace(BASELINE, versions={"triton": "3.6.0", "ptxas": "12.8.93"}))
    code, said = gate(machine_code=kernel(instructions=5000))
    assert code == 0
    assert "machine code is not compared: triton 3.7.1 instead of 3.6.0" in said
    assert "ptxas" not in said, "only what differs"
    code, said = gate(block={"pointwise": {"launches": 4, "bytes": 1000}})
    assert code == 1, "the rest is held"


def test_another_processor_is_said(gate: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    write_baseline(tmp_path / "b.json", replace(BASELINE, processor="y"))
    code, said = gate()
    assert code == 0
    assert "ratios are of x, the baseline's of y" in said
    assert gate(times={EXACT: spread_of(0.5)})[0] == 1, "they are compared all the same"


def test_nothing_wrong_becomes_a_baseline(gate: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    assert gate("--update", machine_code={}, faults={"op.a": "does not compile"})[0] == 1
    assert not (tmp_path / "b.json").exists()


def test_an_interpreter_is_refused(gate: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="TRITON_INTERPRET: got 1, expected it unset"):
        gate()
