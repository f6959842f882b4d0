"""``pixelflow bench compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import console, show


def command(
    before: Annotated[Path, typer.Argument(help="A result file.")],
    after: Annotated[Path, typer.Argument(help="The same of another version.")],
) -> None:
    """Compare two result files, measurement by measurement; exits with 1 if something is slower or became wrong."""
    from pixelflow_benchmarks.analysis.compare import became_wrong, compare, compare_table, different_surroundings
    from pixelflow_benchmarks.harness.results import read_runs

    old, new = read_runs(before), read_runs(after)
    changes, gone, added = compare(old, new)
    wrong = became_wrong(old, new)
    show(compare_table(changes))
    if wrong:
        console.print(f"wrong, and right before: {'; '.join(wrong)}", style="red", highlight=False)
    for said, names in (("only before", gone), ("only after", added)):
        if names:
            console.print(f"{said}: {'; '.join(names)}", highlight=False)
    for difference in different_surroundings(old, new):
        console.print(f"differs, {difference}", highlight=False)
    if wrong or any(change.verdict == "slower" for change in changes):
        raise typer.Exit(1)
