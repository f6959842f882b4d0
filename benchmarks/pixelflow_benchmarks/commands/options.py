"""What the commands have in common: options, printing, and how they end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
Repeats = Annotated[int, typer.Option(min=3, help="Measurements of each variant, in turns.")]
Public = Annotated[Path | None, typer.Option(help="Checkout of the published code, as an opponent.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]


def place_of(device: str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: there is none.
    """
    import torch

    from pixelflow_engine.arguments import place

    return place(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


NEUTRAL = ("device", "output", "budget_seconds", "public", "quiet")
"""Options that change where something runs, how much of it, and who else does, not what."""


def asked(context: typer.Context, **usual: Any) -> dict[str, str]:
    """What a command's options ask for that it does not do of itself, as its environment record says it.

    Args:
        context: of the command.
        usual: what it takes where an option has no default that the command line shows.

    Returns:
        ``options``, as one would write them; nothing where all is as usual.
    """
    words = []
    for option in context.command.params:
        name = str(option.name)
        values, default = _texts(context.params.get(name)), _texts(usual.get(name, option.default))
        if name not in NEUTRAL and values and sorted(values) != sorted(default):
            words += [f"--{name.replace('_', '-')} {value}" for value in values]
    return {"options": " ".join(words)} if words else {}


def _texts(value: Any) -> list[str]:
    """An option's value, or its values where it may be repeated; none of one that was not given."""
    return [str(part) for part in (value if isinstance(value, list | tuple) else [value]) if part is not None]


def show(text: TextTable) -> None:
    """Print a table, without empty columns; in a narrow terminal its cells fold at blanks."""
    text = text.without_empty()
    table = Table(*text.header, title=text.title, padding=(0, 0))
    for row in text.rows:
        table.add_row(*row)
    console.print(table)


def finish(run: Run) -> None:
    """Say who was absent and what was wrong.

    Raises:
        typer.Exit: something was wrong.
    """
    for reason, names in missing(run).items():
        console.print(f"absent: {', '.join(dict.fromkeys(names))}: {reason}", highlight=False)
    if wrong := faults(run):
        console.print("\n".join(["wrong results:", *wrong]), style="red", highlight=False)
        raise typer.Exit(1)


def known(**asked: tuple[Sequence[Any], Sequence[Any]]) -> None:
    """Refuse names that nothing has.

    Raises:
        ValueError: naming the option, what came and what was expected.
    """
    for option, (given, names) in asked.items():
        for value in given:
            if value not in names:
                words = [str(name) for name in dict.fromkeys(names)]
                if any("," in word for word in words):
                    words = [repr(word) for word in words]
                raise ValueError(f"{option}: got {value!r}, expected one of {', '.join(words)}")
