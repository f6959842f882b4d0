"""``pixelflow train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console()


def train(
    config: Annotated[str, typer.Option(help="YAML file, or the name of a recipe: digits, digits-two-minutes.")],
    output: Annotated[Path, typer.Option(help="Run directory to make: recipe, log, model.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, dotted: optimizer.lr=3e-4")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Train a model from a recipe; the result is a checkpoint that every other command takes."""
    from . import loop
    from .config import load_config

    folder = loop.train(load_config(config, overrides or ()), output, quiet)
    if not quiet:
        console.print(f"wrote {folder}", highlight=False, soft_wrap=True)
