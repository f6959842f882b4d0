"""What the README says: its figures are those of the committed results, its commands are understood."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pixelflow_benchmarks.cpu import cascade_table
from pixelflow_benchmarks.digits import SETTINGS
from pixelflow_benchmarks.distance import distance_table
from pixelflow_benchmarks.tables import TextTable, quality_table

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"<!-- quality: pixelflow eval table (\S+) -->\n(.*?)<!-- /quality -->", re.DOTALL)


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    block = BLOCK.search(README)
    assert block is not None
    return [json.loads(line) for line in (ROOT / block[1]).read_text().splitlines()]


def test_the_quality_table_is_the_one_of_the_results(results: list[dict[str, Any]]) -> None:
    block = BLOCK.search(README)
    assert block is not None
    assert block[2].strip() == quality_table(results).markdown().strip()


def test_the_results_hold_what_the_bundled_model_promises(results: list[dict[str, Any]]) -> None:
    generated = [record for record in results if record["kind"] == "generated"]
    assert {record["name"] for record in generated} == {setting.name for setting in SETTINGS}
    assert all(record["count"] == 1000 for record in generated)
    default = [record for record in generated if record["name"] == SETTINGS[0].name]
    assert all(record["agreement"] >= 0.98 for record in default)
    assert all(record["copies"] <= 0.02 for record in generated)
    assert f"pixelflow eval digits --repeats {len(default)}`" in README


def test_the_figures_of_other_weights_are_those_of_their_results() -> None:
    """The recipe run again with another seed, and the short recipe."""
    block = re.search(r"<!-- again: (\S+) (\S+) -->\n(.*?)<!-- /again -->", README, re.DOTALL)
    assert block is not None
    rows = [[cell.strip() for cell in row.strip("| ").split("|")] for row in block[3].splitlines()[2:]]
    assert [row[0] for row in rows] == ["`digits`, seed 1", "`digits-two-minutes`"]
    for row, path in zip(rows, block.group(1, 2), strict=True):
        records = [json.loads(line) for line in (ROOT / path).read_text().splitlines()]
        generated = [record for record in records if record["kind"] == "generated"]
        assert [record["name"] for record in generated] == [SETTINGS[0].name] * 2
        *_, figures = quality_table(records).rows
        assert row[1:] == list(figures[1:7])


@pytest.mark.parametrize(("name", "table"), [("cascade", cascade_table), ("distance", distance_table)])
def test_the_tables_of_the_benchmarks_page_are_those_of_their_results(
    name: str, table: Callable[[list[dict[str, Any]]], TextTable]
) -> None:
    page = (ROOT / "docs/benchmarks.md").read_text()
    block = re.search(rf"<!-- {name}: (\S+) -->\n(.*?)<!-- /{name} -->", page, re.DOTALL)
    assert block is not None
    records = [json.loads(line) for line in (ROOT / block[1]).read_text().splitlines()]
    assert block[2].strip() == table(records).markdown().strip()


def commands() -> list[list[str]]:
    section = README.split("## Commands")[1].split("##")[0]
    return [shlex.split(line)[1:] for line in section.splitlines() if line.startswith("    pixelflow ")]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_the_commands_are_understood(command: list[str]) -> None:
    """Every sub-command and option exists; what they do is tested beside their code."""
    from pixelflow_benchmarks.cli import bench, evaluate
    from pixelflow_engine.cli import app
    from pixelflow_training.cli import train

    groups = {"eval": evaluate, "bench": bench}
    known = app if command[0] not in ("train", *groups) else groups.get(command[0])
    if command[0] in groups:
        command = command[1:]
    names = [word for word in command if not word.startswith("-")]
    if known is None:
        assert command[0] == "train"
        assert train.__doc__
        return
    result = CliRunner().invoke(known, [names[0], "--help"])
    assert result.exit_code == 0, result.output
    plain = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    for option in (word for word in command if word.startswith("--")):
        assert option in plain, option
