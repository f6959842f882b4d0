"""Tables in pages: from the newest run, or that there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from pixelflow_benchmarks.analysis.pages import OF_SUITES, fill
from pixelflow_benchmarks.cli import bench
from pixelflow_benchmarks.commands.options import Device, Quiet, asked
from pixelflow_benchmarks.harness.results import read_runs
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


def test_who_tries_something_out_replaces_no_table(tmp_path: Path) -> None:
    """Newer runs with options, cut short or out of time, beside an older one of what the command does of itself."""
    tried = run_of("blocks", block(444), began="2026-03-02", options="--batch 2")
    cut = run_of("blocks", block(555), began="2026-03-03")
    cut.records.pop()
    late = run_of(
        "blocks", block(666), {"kind": "skipped"}, {"kind": "skipped"}, began="2026-03-04", options="--stage 0"
    )
    others = write_runs(tmp_path / "results/a-gpu/2026-03-02-a.jsonl", tried, cut)
    said = fill(PAGE, tmp_path)
    assert "| x | 555 | 3 |" in said, "the newest where none is complete"
    assert " The run was cut short.\n" in said
    write_runs(others, tried, cut, late)
    assert " Run with `--stage 0`. No time was left for 2 of its parts.\n" in fill(PAGE, tmp_path)
    write_runs(tmp_path / "results/a-gpu/2026-03-01-a.jsonl", run_of("blocks", block(222), began="2026-03-01"))
    said = fill(PAGE, tmp_path)
    assert "| x | 222 | 3 |" in said
    assert "Run with" not in said


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("--batch 16 --stage 3", None),
        ("--batch 2 --stage 0", "--batch 2 --stage 0"),
    ],
)
def test_a_run_says_which_options_are_not_the_usual_ones(line: str, options: str | None, tmp_path: Path) -> None:
    output = tmp_path / "blocks.jsonl"
    found = CliRunner().invoke(bench, ["blocks", *line.split(), "--output", str(output)])
    assert found.exit_code == 0, found.output
    (run,) = read_runs(output)
    assert run.environment.get("options") == options


def test_options_that_may_be_repeated_and_those_whose_default_depends_on_the_device() -> None:
    said: list[dict[str, str]] = []
    app = typer.Typer()

    @app.command()
    def command(
        context: typer.Context,
        device: Device = "auto",
        batch: Annotated[list[int] | None, typer.Option()] = None,
        steps: Annotated[int | None, typer.Option()] = None,
        quiet: Quiet = False,
    ) -> None:
        said.append(asked(context, steps=4, batch=[1, 16]))

    for line in ("", "--device cpu --quiet", "--steps 4 --batch 16 --batch 1", "--batch 4 --batch 1 --steps 1"):
        assert CliRunner().invoke(app, line.split()).exit_code == 0
    assert said == [{}, {}, {}, {"options": "--batch 4 --batch 1 --steps 1"}]


@pytest.mark.parametrize("suite", OF_SUITES)
def test_every_suite_says_its_options(suite: str) -> None:
    """What a command does not hand on, no page could know of."""
    (found,) = (command.callback for command in bench.registered_commands if command.name == suite)
    assert found is not None
    assert "asked" in found.__code__.co_names


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
