"""``bench all``: suites in processes of their own, by importance, within a budget."""

from __future__ import annotations

import os
import select
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from pixelflow_benchmarks.cli import bench
from pixelflow_benchmarks.commands import everything
from pixelflow_benchmarks.commands.everything import (
    GRACE,
    ON_CPU,
    ON_GPU,
    OVERTIME,
    Suite,
    line_of,
    parts_of,
    run_suites,
    run_within,
)
from support.packs import draws


class Clock:
    """Suites take as many seconds beyond what they are told as ``over`` says, those named by a number that number.

    Between two of them as many as ``lost`` says pass.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, codes: dict[str, int] | None = None, over: float = 0) -> None:
        self.now, self.over, self.codes = 0.0, over, codes or {}
        self.began: list[str] = []
        self.told: list[float] = []
        self.limits: list[float] = []
        self.lost = 0.0
        monkeypatch.setattr(everything.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(everything, "run_within", self.run)

    def run(self, line: list[str], limit: float) -> int | None:
        name = line[line.index("bench") + 1]
        told = float(line[line.index("--budget-seconds") + 1]) if "--budget-seconds" in line else 0.0
        takes = float(name) if name.isdigit() else told + self.over
        self.began.append(name)
        self.told.append(told)
        self.limits.append(limit)
        self.now += min(takes, limit) + self.lost
        return None if takes > limit else self.codes.get(name, 0)


OUT = Path("out")


def test_each_gets_what_is_kept_for_it_and_its_share_of_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    suites = [Suite(("a",), 40, 0.5), Suite(("b",), 60, 0.5), Suite(("c",), 100, 1.0)]
    assert run_suites(suites, "cuda:0", OUT, 400, None) == []
    # 200 are free at first; of the 280 that are left then 120 are, of the last 190 there are 90.
    assert clock.told == [20 + 100, 30 + 60, 50 + 90]
    assert clock.limits == [240, 180, 190 + OVERTIME]


@pytest.mark.parametrize("lost", [0.0, 0.01, 2.0])
@pytest.mark.parametrize("over", [0.0, 30.0, 100.0, 1e4])
@pytest.mark.parametrize("suites", [ON_GPU, ON_CPU], ids=["GPU", "CPU"])
def test_something_comes_of_every_suite_in_ten_minutes(
    suites: tuple[Suite, ...], over: float, lost: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much longer than it is told each suite takes, all of them have their least, and the whole ends."""
    clock = Clock(monkeypatch, over=over)
    clock.lost = lost
    run_suites(suites, "cuda:0", OUT, 540, None)
    assert clock.began == [suite.command[0] for suite in suites]
    for suite, told, limit in zip(suites, clock.told, clock.limits, strict=True):
        assert limit >= suite.least
        assert not suite.budgeted or suite.least / 2 <= told + 0.5
    assert clock.now <= 600 + lost


@draws(100)
@given(
    leasts=st.lists(st.floats(0, 100), min_size=1, max_size=8),
    shares=st.lists(st.floats(0, 1), min_size=8, max_size=8),
    taken=st.lists(st.floats(0, 1), min_size=8, max_size=8),
    more=st.floats(0, 500),
)
def test_what_is_kept_for_later_ones_stays_theirs(
    leasts: list[float], shares: list[float], taken: list[float], more: float
) -> None:
    """Whatever part of its limit each suite takes."""
    suites = [Suite(("a",), least, share) for least, share in zip(leasts, shares, strict=False)]
    left = sum(leasts) + more + 1e-6
    for place, suite in enumerate(suites):
        told, limit = parts_of(left, suite, suites[place + 1 :])
        assert told <= limit + 1e-6
        assert limit >= suite.least - 1e-6
        left -= taken[place] * limit
    assert left >= -OVERTIME - 1e-6


def test_with_too_little_time_those_that_matter_most_have_theirs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch, over=20)
    suites = [Suite(("a",), 40), Suite(("b",), 40), Suite(("c",), 40)]
    assert run_suites(suites, "cuda:0", OUT, 60, None) == []
    assert clock.began == ["a", "b"]
    assert clock.told == [20, 20]
    assert "c: not run, no time was left" in capsys.readouterr().out


def test_who_fails_or_hangs_costs_the_others_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch, codes={"b": 1})
    suites = [Suite(("9999",), 50, budgeted=False), Suite(("b",), 100, 0.5), Suite(("c",), 100, 0.5)]
    assert run_suites(suites, "cuda:0", OUT, 400, None) == ["9999", "b"]
    assert clock.began == ["9999", "b", "c"]
    assert clock.limits[0] == GRACE + 25
    assert "9999: ended after 145 seconds" in capsys.readouterr().out


def test_a_command_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    """What a suite started may hold the device: a pipe ends when its last holder does."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()  # it waits for the child to open the pipe, then for its end

    assert run_within(["sh", "-c", f"sleep 600 > {shlex.quote(str(pipe))} & wait"], 10) is None
    reader.join(60)
    assert read == [""]


@pytest.fixture
def nothing_ignored() -> Iterator[None]:
    """Here and in every child, a hangup is ignored under ``nohup``, and an interrupt in the background of a script."""
    usual = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("nothing_ignored")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_who_is_told_to_end_ends_what_it_runs(number: signal.Signals, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    line = ["sh", "-c", f"sleep 600 > {shlex.quote(str(pipe))} & wait"]
    code = f"from pixelflow_benchmarks.commands.everything import run_within; run_within({line!r}, 600)"
    # The pipe opens once the command has it open, and ends with its last holder.
    with subprocess.Popen([sys.executable, "-c", code]) as process, pipe.open() as held:
        process.send_signal(number)
        assert process.wait(60) == 128 + number
        assert select.select([held], [], [], 60)[0]
        assert held.read() == ""


@pytest.mark.usefixtures("nothing_ignored")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_who_is_told_to_end_while_a_command_starts_ends_it(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Told(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)
            signal.raise_signal(number)

    monkeypatch.setattr(everything.subprocess, "Popen", Told)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as left:
        run_within(["sleep", "600"], 600)
    assert number == signal.SIGINT or left.value.code == 128 + number  # type: ignore[attr-defined]
    assert signal.getsignal(number) is before
    assert [process.returncode for process in started] == [-signal.SIGKILL]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_what_was_ignored_stays_ignored(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        assert run_within(["sh", "-c", f"kill -{number:d} {os.getpid()}; exit 7"], 120) == 7
    finally:
        signal.signal(number, before)


def test_a_command_that_ends_says_how() -> None:
    assert run_within([sys.executable, "-c", "raise SystemExit(7)"], 120) == 7


@pytest.mark.parametrize("suite", [*ON_GPU, *ON_CPU], ids=lambda suite: " ".join(suite.command))
def test_every_line_is_understood_by_its_command(suite: Suite) -> None:
    line = line_of(suite, "cpu", Path("out"), 10, Path("checkout"))
    assert line[:4] == [sys.executable, "-m", "pixelflow_engine", "bench"]
    result = CliRunner().invoke(bench, [*line[4:], "--help"])
    assert result.exit_code == 0, result.output


def test_stages_come_first_everywhere() -> None:
    assert ON_GPU[0].command[0] == ON_CPU[0].command[0] == "stages"


@pytest.mark.parametrize("suite", [*ON_GPU, *ON_CPU], ids=lambda suite: " ".join(suite.command))
def test_suites_are_asked_for_what_there_is(suite: Suite) -> None:
    """Options exist, and so do the variants that they name."""
    from pixelflow_benchmarks.suites.coldstart.variants import VARIANTS as COLD_STARTS
    from pixelflow_benchmarks.suites.memory.measured import ON_GPU as MEMORY
    from pixelflow_benchmarks.suites.stages.opponents import VARIANTS as STAGES

    name, *options = suite.command
    (command,) = (one for one in bench.registered_commands if one.name == name)
    assert command.callback is not None
    known = command.callback.__annotations__
    assert all(word[2:].replace("-", "_") in known for word in options if word.startswith("--"))
    variants = {"stages": STAGES, "memory": MEMORY, "coldstart": COLD_STARTS}
    asked = [value for word, value in pairwise(options) if word == "--variant"]
    assert all(one in variants[name] for one in asked)


def test_the_command_is_a_module_too() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pixelflow_engine", "--help"], capture_output=True, text=True, check=True
    )
    assert "generate" in run.stdout


def test_an_output_of_another_kind_is_refused_before_any_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(everything, "run_within", lambda *_: pytest.fail("a suite was begun"))
    (tmp_path / "picture.png").touch()
    result = CliRunner().invoke(bench, ["all", "--device", "cpu", "--output", str(tmp_path / "picture.png")])
    assert "picture.png, expected a folder or a name that ends in .jsonl" in str(result.exception)


def test_suites_run_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(everything, "ON_CPU", (Suite(("blocks",), 60, budgeted=False),))
    result = CliRunner().invoke(bench, ["all", "--device", "cpu", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert len(list(tmp_path.rglob("*.jsonl"))) == 1
