"""What the README says: its figures are those of the committed results, its commands are understood."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pixelflow_benchmarks.analysis.pages import fill
from pixelflow_benchmarks.quality.digits import SETTINGS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DIGITS = (ROOT / "docs/digits.md").read_text()


PAGES = ("README.md", *(f"docs/{name}.md" for name in ("ablations", "benchmarks", "digits", "kernels", "performance")))


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_are_those_of_the_results(page: str) -> None:
    text = (ROOT / page).read_text()
    assert fill(text, ROOT) == text, "make tables"


LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)")


def anchors(page: str) -> set[str]:
    """The names that a page's headings can be linked by, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def dead_links(page: Path, text: str) -> list[str]:
    """Links of a page to files and headings that are not there; results that it calls not measured need not be."""
    found, awaited = [], re.findall(r"^Not measured: .* in (\S+)\.$", text, re.MULTILINE)
    for target, anchor in LINK.findall(text):
        path = page.parent / target if target else page
        if any(target.endswith(source) for source in awaited):
            continue
        if not path.exists():
            found.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(text if path == page else path.read_text()):
            found.append(f"{target}#{anchor}: no such heading")
    return found


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/*.md")), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """A figure in a sentence is backed by the table or the result file that it links to."""
    assert dead_links(page, page.read_text()) == []


def test_dead_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# What is `exact` here?\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    text = "# Mine\n[a](other.md) [b](other.md#what-is-exact-here) [c](#mine) [d](https://a.b/c)\n"
    page.write_text(text)
    assert dead_links(page, text) == []
    awaited = "[a](../results/x.jsonl)\n\nNot measured: no run of `pixelflow eval x` in results/x.jsonl.\n"
    assert dead_links(page, awaited) == []
    assert dead_links(page, awaited.replace("in results/x", "in results/y")) == ["../results/x.jsonl: no such file"]
    broken = "[a](gone.md) [b](other.md#no-heading) [c](#yours)"
    assert dead_links(page, broken) == [
        "gone.md: no such file",
        "other.md#no-heading: no such heading",
        "#yours: no such heading",
    ]


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    lines = (ROOT / "benchmarks/results/digits/quality.jsonl").read_text().splitlines()
    assert "<!-- table: quality benchmarks/results/digits/quality.jsonl -->" in DIGITS
    return [json.loads(line) for line in lines]


def test_the_results_hold_what_the_bundled_model_promises(results: list[dict[str, Any]]) -> None:
    generated = [record for record in results if record["kind"] == "generated"]
    assert {record["name"] for record in generated} == {setting.name for setting in SETTINGS}
    assert all(record["count"] == 1000 for record in generated)
    default = [record for record in generated if record["name"] == SETTINGS[0].name]
    assert all(record["agreement"] >= 0.98 for record in default)
    assert all(record["copies"] <= 0.02 for record in generated)
    assert f"pixelflow eval digits --repeats {len(default)}`" in DIGITS


def commands() -> list[list[str]]:
    section = README.split("## Command line")[1].split("##")[0]
    return [shlex.split(line)[1:] for line in section.splitlines() if line.startswith("    pixelflow ")]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_the_commands_are_understood(command: list[str]) -> None:
    """Every sub-command and option exists; what they do is tested beside their code."""
    from pixelflow_benchmarks.cli import bench, evaluate
    from pixelflow_engine.cli import app
    from pixelflow_training.cli import train

    groups = {"eval": evaluate, "bench": bench, "train": train}
    known = groups.get(command[0], app)
    if command[0] in groups:
        command = command[1:]
    named = [] if command[0].startswith("-") else command[:1]  # `train` needs no name for what it does by default
    result = CliRunner().invoke(known, [*named, "--help"])
    assert result.exit_code == 0, result.output
    plain = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    for option in (word for word in command if word.startswith("--")):
        assert option in plain, option
