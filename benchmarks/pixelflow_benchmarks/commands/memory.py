"""``pixelflow bench memory``."""

from __future__ import annotations

import math
import time
from typing import Annotated, Any, Literal

import typer

from .options import Device, Output, asked, finish, known, place_of, show


def command(
    context: typer.Context,
    device: Device = "auto",
    shape: Annotated[
        Literal["xl", "cpu", "tiny"] | None, typer.Option(help="By default xl on a GPU, cpu elsewhere.")
    ] = None,
    variant: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Images; may be repeated.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Euler's, which hardly affect a peak.")] = 2,
    budget_seconds: Annotated[float, typer.Option(help="After that long no further stage is begun.")] = math.inf,
    output: Output = None,
) -> None:
    """Measure peak memory per stage, batch and variant; and count that of the published model, which needs no GPU."""
    import torch
    import torch._dynamo

    from pixelflow_benchmarks.harness.results import recording
    from pixelflow_benchmarks.opponents.random_models import SHAPES, random_weights
    from pixelflow_benchmarks.suites.memory.counted import VARIANTS, count_memory
    from pixelflow_benchmarks.suites.memory.measured import ON_CPU, ON_GPU, measure_memory
    from pixelflow_benchmarks.suites.memory.table import memory_table

    deadline = time.perf_counter() + budget_seconds
    where = place_of(device)
    on_gpu = where.type == "cuda"
    known(variant=(variant or [], (*ON_GPU, *ON_CPU, *VARIANTS)))
    wanted = variant or [*(ON_GPU if on_gpu else ON_CPU), *VARIANTS]
    usual: dict[str, Any] = {"shape": "xl" if on_gpu else "cpu"}
    shape = shape or usual["shape"]
    dtype = torch.bfloat16 if on_gpu else torch.float32
    head = {"shape": shape, "dtype": str(dtype).removeprefix("torch."), "steps": steps} | asked(context, **usual)
    with recording(output, "memory", where, **head) as keep, torch._dynamo.config.patch(recompile_limit=64):
        if measured := [name for name in wanted if name not in VARIANTS]:
            weights = random_weights(SHAPES[shape], where, dtype)
            sizes = batch or ([1, 4, 16] if on_gpu else [1, 2])
            keep.all(measure_memory(shape, SHAPES[shape], weights, measured, sizes, steps, dtype, where, deadline))
        if counted := [name for name in wanted if name in VARIANTS]:
            keep.all(count_memory("tiny" if shape == "tiny" else "xl", counted, batch or [1, 16], deadline))
    show(memory_table(keep.run))
    finish(keep.run)
