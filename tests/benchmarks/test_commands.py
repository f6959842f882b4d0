"""The commands as such: they come quickly, and each can be asked what it does."""

from __future__ import annotations

import io
import string
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from pixelflow_benchmarks.cli import bench, evaluate
from pixelflow_benchmarks.commands import options
from pixelflow_benchmarks.harness.tables import TextTable


def test_the_commands_are_there_before_torch_is() -> None:
    program = "import sys, pixelflow_benchmarks.cli; assert not {'torch', 'numpy', 'matplotlib'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", [command.name for command in bench.registered_commands])
def test_each_says_what_it_does(name: str) -> None:
    result = CliRunner().invoke(bench, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert len(" ".join(result.output.split())) > 100


def test_the_names_are_unique() -> None:
    for group in (bench, evaluate):
        names = [command.name for command in group.registered_commands]
        assert len(names) == len({*names})


@pytest.mark.parametrize("line", [["kernels", "--device", "cpu"], ["tune"], ["stages", "--device", "cpu"]], ids=str)
@pytest.mark.parametrize("stage", ["4", "-1"])
def test_a_stage_that_does_not_exist_is_refused_before_anything_is_written(
    line: list[str], stage: str, tmp_path: Path
) -> None:
    output = tmp_path / "records.jsonl"
    result = CliRunner().invoke(bench, [*line, "--stage", stage, "--output", str(output)])
    assert isinstance(result.exception, ValueError)
    assert str(result.exception) == f"stage: got {stage}, expected one of 0, 1, 2, 3"
    assert not output.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_kernels_say_how_to_try_them_out(tmp_path: Path) -> None:
    result = CliRunner().invoke(bench, ["kernels", "--output", str(tmp_path / "records.jsonl")])
    assert str(result.exception).startswith("device: got 'cuda', expected a GPU that torch can use")
    assert [*tmp_path.iterdir()] == []


def test_a_narrow_terminal_cuts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    monkeypatch.setattr(options, "console", Console(file=output, width=40))
    name = "".join(chr(ord("a") + i % 26) for i in range(70))
    options.show(TextTable("times", ("case", "time"), ((name, "1.0"),)))
    letters = "".join(c for c in output.getvalue() if c in string.ascii_lowercase)
    assert name in letters.removeprefix("timescasetime")
