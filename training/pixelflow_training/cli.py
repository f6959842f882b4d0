"""``pixelflow train``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console()


def train(
    config: Annotated[str, typer.Option(help="YAML file, or the name of a recipe: digits, digits-two-minutes.")],
    output: Annotated[Path, typer.Option(help="Run directory: recipe, log, checkpoints, model. A run there goes on.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, dotted: optimizer.lr=3e-4")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Refuse a run directory that holds anything.")] = False,
    from_step: Annotated[
        int | None, typer.Option(min=0, help="Go on from this checkpoint, not the last; later ones are deleted.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Train a model from a recipe, or go on; the result is a checkpoint that every other command takes.

    SIGTERM and SIGINT (Ctrl-C) finish the step, save, and exit with code 75: the same command goes on. A second Ctrl-C
    stops at once, with code 130; the last checkpoint stays. Go on only from run directories of your own: loading a
    checkpoint runs whatever code its author put there.
    """
    from . import loop
    from .config import load_config
    from .signals import EXIT_AT_ONCE, EXIT_STOPPED, TrainingStopped

    try:
        folder = loop.train(load_config(config, overrides or ()), output, quiet, fresh=fresh, from_step=from_step)
    except TrainingStopped as stopped:
        console.print(f"{stopped}; run the same command to go on", highlight=False, soft_wrap=True)
        raise typer.Exit(EXIT_STOPPED) from None
    except KeyboardInterrupt:
        # Not sys.exit, which would wait for a checkpoint that is being written. It is not there until it is complete.
        os._exit(EXIT_AT_ONCE)
    if not quiet:
        console.print(f"wrote {folder}", highlight=False, soft_wrap=True)
