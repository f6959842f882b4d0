"""Tables in pages: from the newest run, or that there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pixelflow_benchmarks.analysis.pages import OF_SUITES, fill
from pixelflow_benchmarks.cli import bench
from pixelflow_benchmarks.suites.blocks import CITED
from support.results import run_of, write_runs

PAGE = "before\n<!-- table: blocks results/a-gpu -->\nold\n<!-- /table -->\nafter <!-- other -->\n"


def block(launches: int) -> dict[str, object]:
    bytes_per_value = dict.fromkeys(("product", "attention", "pointwise"), 1.0)
    return {"kind": "block", "variant": "x", "launches": launches, "pointwise_launches": 3, "ops": []} | {
        "bytes_per_value": bytes_per_value
    }


def test_the_newest_run_of_a_device_is_shown(tmp_path: Path) -> None:
    newer = run_of("blocks", block(222), began="2026-03-01")
    write_runs(tmp_path / "results/a-gpu/2026-03-01-a.jsonl", newer, run_of("kernels", began="2026-04-01"))
    write_runs(tmp_path / "results/a-gpu/2026-02-01-b.jsonl", run_of("blocks", block(111), CITED, began="2026-02-01"))
    write_runs(tmp_path / "results/b-gpu/2026-05-01-b.jsonl", run_of("blocks", block(333), began="2026-05-01"))
    page = fill(PAGE, tmp_path)
    assert "| x | 222 | 3 |" in page
    assert "old" not in page
    assert "111" not in page
    assert page.startswith("before\n<!-- table: blocks results/a-gpu -->\n| block |")
    assert page.endswith("\n<!-- /table -->\nafter <!-- other -->\n")
    assert fill(page, tmp_path) == page


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    page = fill(PAGE, tmp_path)
    assert "Not measured: no run of `pixelflow bench blocks` in results/a-gpu." in page


def test_an_unknown_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="table: got 'speeds', expected one of blocks"):
        fill(PAGE.replace("blocks", "speeds"), tmp_path)


def test_the_command_says_what_is_out_of_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    runner = CliRunner()
    checked = runner.invoke(bench, ["tables", "page.md", "--check"])
    assert (checked.exit_code, page.read_text()) == (1, PAGE)
    assert "out of date: page.md" in checked.output
    assert runner.invoke(bench, ["tables", "page.md"]).exit_code == 0
    assert page.read_text() == fill(PAGE, tmp_path)
    assert runner.invoke(bench, ["tables", "page.md", "--check"]).exit_code == 0


def test_every_suite_with_a_command_has_a_table() -> None:
    commands = {command.name for command in bench.registered_commands}
    assert OF_SUITES.keys() <= commands
