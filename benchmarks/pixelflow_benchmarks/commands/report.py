"""``pixelflow bench report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import console


def command(
    results: Annotated[Path, typer.Argument(help="A result file, or a folder of them.")],
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML page with the tables and plots of result files; it needs no network."""
    from pixelflow_benchmarks.analysis.report import report
    from pixelflow_benchmarks.harness.results import unread
    from pixelflow_engine.files import write_atomically

    if output.is_dir():
        raise ValueError(f"output: got the folder {output}, expected the name of a file")
    page = report(results)
    write_atomically(output, lambda file: file.write(page.encode()))
    others = unread(results)
    if others:
        names = ", ".join(str(file.relative_to(results)) for file in others)
        console.print(f"not read, because not named DATE-COMMIT.jsonl: {names}", highlight=False)
    console.print(f"written: {output}", highlight=False)
