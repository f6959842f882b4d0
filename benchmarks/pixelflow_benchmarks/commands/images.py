"""``pixelflow bench images``."""

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
        Literal["xl", "cpu", "tiny"] | None, typer.Option(help="By default xl on a GPU, cpu elsewhere.")
    ] = None,
    variant: Annotated[list[str] | None, typer.Option(help="Only this opponent; may be repeated.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="May be repeated.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Euler's, at each stage: 10 on a GPU, 4 elsewhere.")] = None,
    repeats: Repeats = 20,
    budget_seconds: Annotated[float, typer.Option(help="After that long no further turn is begun.")] = math.inf,
    public: Public = None,
    output: Output = None,
) -> None:
    """Time whole images, engine against reference: the first call and the steady state. Wrong results get no time."""
    import torch
    import torch._dynamo

    from pixelflow_benchmarks.harness.ceilings import measure_ceilings
    from pixelflow_benchmarks.harness.results import recording
    from pixelflow_benchmarks.opponents.random_models import SHAPES, random_weights
    from pixelflow_benchmarks.suites.images.measure import measure_images
    from pixelflow_benchmarks.suites.images.opponents import ON_CPU, ON_GPU, PUBLIC, ImageOpponents, ImageProblem
    from pixelflow_benchmarks.suites.images.table import image_table

    deadline = time.perf_counter() + budget_seconds
    where = place_of(device)
    on_gpu = where.type == "cuda"
    names = ON_GPU if on_gpu else ON_CPU
    known(variant=(variant or [], (*ON_CPU, *ON_GPU)))
    usual: dict[str, Any] = (
        {"shape": "xl", "steps": 10, "batch": [1, 16]} if on_gpu else {"shape": "cpu", "steps": 4, "batch": [1]}
    )
    shape, steps = shape or usual["shape"], steps or usual["steps"]
    config, dtype = SHAPES[shape], torch.bfloat16 if on_gpu else torch.float32
    head = {"shape": shape, "dtype": str(dtype).removeprefix("torch."), "steps": steps} | asked(context, **usual)
    with recording(output, "images", where, **head) as keep, torch._dynamo.config.patch(recompile_limit=64):
        ceilings = measure_ceilings(where, dtype)
        keep(ceilings.record())
        opponents = ImageOpponents(config, random_weights(config, where, dtype), dtype, where, public)
        try:
            for count in batch or usual["batch"]:
                problem = ImageProblem(config=config, batch=count, steps=steps, dtype=dtype, device=where)
                wanted = tuple(variant or (name for name in names if public is not None or name != PUBLIC))
                keep.all(measure_images(problem, opponents, wanted, ceilings, repeats, deadline))
        finally:
            opponents.close()
    show(image_table(keep.run))
    finish(keep.run)
