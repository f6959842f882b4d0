"""``pixelflow bench training``."""

from __future__ import annotations

import math
import time
from typing import Annotated, Any, Literal

import typer

from .options import Device, Output, Public, Repeats, asked, finish, known, place_of, show


def command(
    context: typer.Context,
    device: Device = "auto",
    shape: Annotated[
        Literal["xl", "cpu", "small", "tiny"] | None, typer.Option(help="By default xl on a GPU, small elsewhere.")
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float32"] | None,
        typer.Option(help="Of the products. By default bfloat16 on a GPU, float32 elsewhere."),
    ] = None,
    variant: Annotated[list[str] | None, typer.Option(help="Only this opponent; may be repeated.")] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Images a step, a multiple of the stages; may be repeated.")
    ] = None,
    repeats: Repeats = 20,
    budget_seconds: Annotated[float, typer.Option(help="After that long no further turn is begun.")] = math.inf,
    public: Public = None,
    output: Output = None,
) -> None:
    """Time training steps, the project's loop against others. Wrong results get no time."""
    import torch
    import torch._dynamo

    from pixelflow_benchmarks.harness.ceilings import measure_ceilings
    from pixelflow_benchmarks.harness.results import recording
    from pixelflow_benchmarks.opponents.random_models import SHAPES, random_weights
    from pixelflow_benchmarks.suites.training.measure import measure_training
    from pixelflow_benchmarks.suites.training.opponents import BATCHES, ON_CPU, ON_GPU, PUBLIC, TrainingOpponents
    from pixelflow_benchmarks.suites.training.problem import TrainingProblem
    from pixelflow_benchmarks.suites.training.table import training_table
    from pixelflow_training.heap import keep_freed_memory

    keep_freed_memory()  # as `pixelflow train` does; for the benefit of all variants
    deadline = time.perf_counter() + budget_seconds
    where = place_of(device)
    on_gpu = where.type == "cuda"
    names = ON_GPU if on_gpu else ON_CPU
    known(variant=(variant or [], (*ON_CPU, *ON_GPU)))
    wanted = tuple(variant or (name for name in names if public is not None or name != PUBLIC))
    usual: dict[str, Any] = {"shape": "xl" if on_gpu else "small", "dtype": "bfloat16" if on_gpu else "float32"}
    usual["batch"] = [*BATCHES[usual["shape"]]]
    shape, dtype = shape or usual["shape"], dtype or usual["dtype"]
    what, config = getattr(torch, dtype), SHAPES[shape]
    problems = [
        TrainingProblem(config=config, batch=count, dtype=what, device=where) for count in batch or BATCHES[shape]
    ]
    head = {"shape": shape, "dtype": dtype} | asked(context, **usual)
    with recording(output, "training", where, **head) as keep, torch._dynamo.config.patch(recompile_limit=64):
        ceilings = measure_ceilings(where, what)
        keep(ceilings.record())
        opponents = TrainingOpponents(config, random_weights(config, where), what, where, public)
        try:
            for problem in problems:
                keep.all(measure_training(problem, opponents, wanted, ceilings, repeats, deadline))
        finally:
            opponents.close()
    show(training_table(keep.run))
    finish(keep.run)
