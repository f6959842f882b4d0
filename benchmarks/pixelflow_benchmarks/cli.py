"""``pixelflow eval`` and ``pixelflow bench``. Commands import modules that need torch or an extra when they run."""

from __future__ import annotations

import typer

from .commands import (
    ablations,
    blocks,
    coldstart,
    compare,
    curves,
    digits,
    distance,
    everything,
    gate,
    images,
    kernels,
    memory,
    profile,
    report,
    stages,
    tables,
    training,
    tune,
)

evaluate = typer.Typer(no_args_is_help=True, help="Measure the quality of generated images.")
evaluate.command("digits")(digits.evaluate)
evaluate.command("ablations")(ablations.command)
evaluate.command("table")(digits.table)

bench = typer.Typer(no_args_is_help=True, help="Measure speed.")
bench.command("all")(everything.command)
bench.command("kernels")(kernels.command)
bench.command("stages")(stages.command)
bench.command("images")(images.command)
bench.command("training")(training.command)
bench.command("curves")(curves.command)
bench.command("distance")(distance.command)
bench.command("memory")(memory.command)
bench.command("coldstart")(coldstart.command)
bench.command("blocks")(blocks.command)
bench.command("profile", cls=profile.KeyValueCommand)(profile.command)
bench.command("tune")(tune.command)
bench.command("compare")(compare.command)
bench.command("gate")(gate.command)
bench.command("tables")(tables.command)
bench.command("report")(report.command)
