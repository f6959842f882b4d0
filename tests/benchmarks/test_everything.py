"""``bench all``: suites in processes of their own, by importance, within a budget."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pixelflow_benchmarks.cli import bench
from pixelflow_benchmarks.commands import everything
from pixelflow_benchmarks.commands.everything import ON_CPU, ON_GPU, Suite, line_of, run_suites


class Clock:
    """Suites take as many seconds as they are told to, or as their name says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, codes: dict[str, int] | None = None) -> None:
        self.now, self.lines = 0.0, []
        self.codes = codes or {}
        monkeypatch.setattr(everything.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(everything.subprocess, "run", self.run)

    lines: list[list[str]]

    def run(self, line: list[str], timeout: float) -> Any:
        self.lines.append(line)
        name = line[line.index("bench") + 1]
        takes = float(name) if name.isdigit() else float(line[line.index("--budget-seconds") + 1])
        self.now += min(takes, timeout)
        if takes > timeout:
            raise subprocess.TimeoutExpired(line, timeout)
        return subprocess.CompletedProcess(line, self.codes.get(name, 0))


def test_each_gets_its_share_of_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    suites = [Suite(("a",), 0.5), Suite(("b",), 0.5), Suite(("c",), 1.0)]
    assert run_suites(suites, "cuda:0", Path("out"), 400, None) == []
    assert [line[-1] for line in clock.lines] == ["200", "100", "100"]
    assert clock.now <= 400


def test_who_fails_or_hangs_costs_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, codes={"b": 1})
    suites = [Suite(("9999",), 0.1, budgeted=False), Suite(("b",), 0.5), Suite(("c",), 0.5)]
    assert run_suites(suites, "cuda:0", Path("out"), 400, None) == ["9999", "b"]
    assert [line[line.index("bench") + 1] for line in clock.lines] == ["9999", "b", "c"]


def test_what_no_time_is_left_for_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock(monkeypatch)
    suites = [Suite(("50",), 0.9, budgeted=False), Suite(("b",), 0.5)]
    assert run_suites(suites, "cuda:0", Path("out"), 40, None) == []
    assert len(clock.lines) == 1
    assert "b: not run, no time was left" in capsys.readouterr().out


@pytest.mark.parametrize("suite", [*ON_GPU, *ON_CPU], ids=lambda suite: " ".join(suite.command))
def test_every_line_is_understood_by_its_command(suite: Suite) -> None:
    line = line_of(suite, "cpu", Path("out"), 10, Path("checkout"))
    assert line[:4] == [sys.executable, "-m", "pixelflow_engine", "bench"]
    result = CliRunner().invoke(bench, [*line[4:], "--help"])
    assert result.exit_code == 0, result.output


def test_stages_come_first_everywhere() -> None:
    assert ON_GPU[0].command == ON_CPU[0].command == ("stages",)


def test_the_command_is_a_module_too() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pixelflow_engine", "--help"], capture_output=True, text=True, check=True
    )
    assert "generate" in run.stdout


def test_suites_run_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(everything, "ON_CPU", (Suite(("blocks",), 1.0, budgeted=False),))
    result = CliRunner().invoke(bench, ["all", "--device", "cpu", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert len(list(tmp_path.rglob("*.jsonl"))) == 1
