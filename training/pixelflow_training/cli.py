"""The ``pixelflow train`` commands: train a model, plot runs, publish weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

console = Console()


class TrainGroup(TyperGroup):
    """A command group whose default command is ``run``: arguments that do not begin with a command's name go to it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See :class:`click.Command`."""
        return super().parse_args(ctx, args if args and args[0] in self.commands else ["run", *args])


train = typer.Typer(cls=TrainGroup, help="Train a model from a recipe, or resume a run; plot or publish runs.")


@train.command()
def run(
    config: Annotated[
        str, typer.Option(help="YAML file, or a recipe: digits, digits-two-minutes, smoke, xl-imagenet256.")
    ],
    output: Annotated[Path, typer.Option(help="Run directory: recipe, log, checkpoints, model. A run there resumes.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, dotted: optimizer.lr=3e-4")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Refuse a run directory that holds anything.")] = False,
    from_step: Annotated[
        int | None, typer.Option(min=0, help="Resume from this checkpoint, not the last; later ones are deleted.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar, and no line before it.")] = False,
) -> None:
    """Train a model from a recipe, or resume a run; the result is a checkpoint that every other command accepts.

    The word `run` may be omitted. `pixelflow train plot RUN` plots what a run has logged; `pixelflow train publish RUN
    FOLDER` writes its weights in the published form.

    SIGTERM and SIGINT (Ctrl-C) finish the step, save, and exit with code 75; the same command resumes the run. A second
    Ctrl-C stops at once, with code 130; the last checkpoint is kept. Resume only from your own run directories: loading
    a checkpoint runs whatever code its author put there.
    """
    from . import loop
    from .config import load_config
    from .heap import keep_freed_memory
    from .signals import EXIT_AT_ONCE, EXIT_STOPPED, TrainingStopped

    keep_freed_memory()
    try:
        folder = loop.train(load_config(config, overrides or ()), output, quiet, fresh=fresh, from_step=from_step)
    except TrainingStopped as stopped:
        console.print(f"{stopped}; run the same command to resume", highlight=False, soft_wrap=True)
        raise typer.Exit(EXIT_STOPPED) from None
    except KeyboardInterrupt:
        # sys.exit would wait for a checkpoint that is being written. Abandoning it is safe: it is published only once
        # it is complete.
        os._exit(EXIT_AT_ONCE)
    if not quiet and os.environ.get("RANK", "0") == "0":
        console.print(f"wrote {folder}", highlight=False, soft_wrap=True)


@train.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, or their logs.")],
    output: Annotated[Path, typer.Option(help="The picture: *.svg or *.png.")] = Path("losses.svg"),
    smooth: Annotated[
        float | None,
        typer.Option(min=0, help="Steps that losses are averaged over; by default a thirtieth of the run."),
    ] = None,
) -> None:
    """Plot losses by stage, learning rate, gradient norm and speed of runs, including runs in progress.

    Spikes and skipped steps are marked in red.
    """
    from .curves import read_curves, short_names
    from .plot import save_plot

    save_plot([read_curves(run, name) for run, name in zip(runs, short_names(runs), strict=True)], output, smooth)
    console.print(f"wrote {output}", highlight=False, soft_wrap=True)


@train.command()
def publish(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory; your own.")],
    output: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to write.")],
    from_step: Annotated[int | None, typer.Option(min=0, help="This checkpoint, not the last.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what was published there before.")] = False,
) -> None:
    """Write a run's trained and averaged weights in the published form: config.yaml, and model_STEP.pt with both.

    Use it only on your own runs: loading a checkpoint runs whatever code its author put there.
    """
    from .publish import publish as write

    console.print(f"wrote {write(run, output, from_step, overwrite)}", highlight=False, soft_wrap=True)
