"""``pixelflow bench tables``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import console


def command(
    pages: Annotated[list[Path], typer.Argument(help="Markdown pages; the paths in them are relative to this folder.")],
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; leave with 1 where a page is out of date.")
    ] = False,
) -> None:
    """Fill in the tables of Markdown pages from the result files that they name."""
    from pixelflow_benchmarks.analysis.pages import fill

    old = False
    for page in pages:
        before = page.read_text(encoding="utf-8")
        after = fill(before, Path())
        if after != before:
            old = True
            console.print(f"{'out of date' if check else 'written'}: {page}", highlight=False)
            if not check:
                page.write_text(after, encoding="utf-8")
    if check and old:
        raise typer.Exit(1)
