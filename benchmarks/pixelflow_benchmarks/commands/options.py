"""Common parts of the commands: options, printing, and exit status."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.table import Table

from pixelflow_benchmarks.harness.tables import TextTable, faults, missing

if TYPE_CHECKING:
    import torch

    from pixelflow_benchmarks.harness.results import Run

console = Console()

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto is a GPU if there is one.")]
Output = Annotated[
    Path | None,
    typer.Option(help="Where records are appended: a .jsonl file, or a folder (DEVICE/DATE-COMMIT.jsonl in it)."),
]
Repeats = Annotated[
    int, typer.Option(min=3, help="Measurements of each variant, in rounds; fewer if they take over a minute.")
]
Public = Annotated[Path | None, typer.Option(help="Checkout of the published code, as an opponent.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]


def place_of(device: str) -> torch.device:
    """Return the device of that name; ``auto`` is a GPU if there is one, otherwise the CPU.

    Raises:
        ValueError: there is no such device.
    """
    from pixelflow_engine.arguments import automatic, place

    return place(automatic(device))


NEUTRAL = ("device", "output", "budget_seconds", "public", "quiet")
"""Options that change where a suite runs, how much of it, and against which opponents, but not what is measured."""


def asked(context: typer.Context, **usual: Any) -> dict[str, str]:
    """Return the options that differ from a command's defaults, for its environment record.

    Args:
        context: context of the command.
        usual: effective defaults of options whose declared default is None.

    Returns:
        ``options``, as on a command line; empty if all options have their defaults.
    """
    words = []
    for option in context.command.params:
        name = str(option.name)
        values, default = _texts(context.params.get(name)), _texts(usual.get(name, option.default))
        if name not in NEUTRAL and values and sorted(values) != sorted(default):
            words += [f"--{name.replace('_', '-')} {value}" for value in values]
    return {"options": " ".join(words)} if words else {}


def _texts(value: Any) -> list[str]:
    """Return an option's value, or the values of a repeatable one, as text; empty if it was not given."""
    return [str(part) for part in (value if isinstance(value, list | tuple) else [value]) if part is not None]


def show(text: TextTable) -> None:
    """Print a table without empty columns; in a narrow terminal its cells wrap, so that nothing is cut."""
    text = text.without_empty()
    table = Table(title=text.title, padding=(0, 0))
    for name in text.header:
        table.add_column(name, overflow="fold")
    for row in text.rows:
        table.add_row(*row)
    console.print(table)


def finish(run: Run) -> None:
    """Print which variants were absent and which results were wrong.

    Raises:
        typer.Exit: with status 1, if something was wrong.
    """
    for reason, names in missing(run).items():
        console.print(f"absent: {'; '.join(dict.fromkeys(names))}: {reason}", highlight=False)  # names hold commas
    if wrong := faults(run):
        console.print("\n".join(["wrong results:", *wrong]), style="red", highlight=False)
        raise typer.Exit(1)


def new_lines(output: Path | None) -> AbstractContextManager[TextIO | None]:
    """Open a new file for JSON lines, in a folder that is made if missing; there is none for None.

    Raises:
        FileExistsError: the file is there already.
    """
    if output is None:
        return nullcontext()
    output.parent.mkdir(parents=True, exist_ok=True)
    return output.open("x", encoding="utf-8")


def known(**asked: tuple[Sequence[Any], Sequence[Any]]) -> None:
    """Check option values against the known names.

    Args:
        asked: by option, the given values and the known names.

    Raises:
        ValueError: a value is unknown; the message names the option, the value and what was expected.
    """
    for option, (given, names) in asked.items():
        for value in given:
            if value not in names:
                expected = ", ".join(repr(name) for name in dict.fromkeys(names))
                raise ValueError(f"{option}: got {value!r}, expected one of {expected}")
