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

    if output.is_dir():
        raise ValueError(f"output: got the folder {output}, expected the name of a file")
    page = report(results)
    output.write_text(page, encoding="utf-8")
    console.print(f"written: {output}", highlight=False)
