"""``pixelflow bench stages``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from .options import Device, Output, Public, Repeats, asked, finish, known, place_of, show


def command(
    context: typer.Context,
    device: Device = "auto",
    shape: Annotated[
        Literal["xl", "cpu", "tiny"] | None, typer.Option(help="By default xl on a GPU, cpu elsewhere.")
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float32"] | None, typer.Option(help="By default bfloat16 on a GPU, float32 elsewhere.")
    ] = None,
    variant: Annotated[list[str] | None, typer.Option(help="Only this opponent; may be repeated.")] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="May be repeated; 1, 4, 16, 32 on a GPU, 1 elsewhere.")
    ] = None,
    stage: Annotated[list[int] | None, typer.Option(help="Only this stage; may be repeated.")] = None,
    solver: Annotated[
        list[str] | None, typer.Option(help="euler, dopri5; may be repeated. Both on a GPU, Euler elsewhere.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Euler's; by default few where they are long.")] = None,
    repeats: Repeats = 20,
    budget_seconds: Annotated[float, typer.Option(help="After that long no further problem is begun.")] = 480,
    public: Public = None,
    output: Output = None,
) -> None:
    """Time the stages of the model, engine against reference. Wrong results get no time."""
    import torch
    import torch._dynamo

    from pixelflow_benchmarks.harness.ceilings import measure_ceilings
    from pixelflow_benchmarks.harness.results import recording
    from pixelflow_benchmarks.opponents.random_models import SHAPES, random_weights
    from pixelflow_benchmarks.suites.stages.measure import measure_stages
    from pixelflow_benchmarks.suites.stages.opponents import VARIANTS, Opponents
    from pixelflow_benchmarks.suites.stages.table import stage_table
    from pixelflow_benchmarks.suites.stages.tasks import tasks

    where = place_of(device)
    on_gpu = where.type == "cuda"
    usual: dict[str, Any] = {
        "shape": "xl" if on_gpu else "cpu",
        "dtype": "bfloat16" if on_gpu else "float32",
        "batch": [16, 1, 4, 32] if on_gpu else [1],
        "solver": ["euler", "dopri5"] if on_gpu else ["euler"],
    }
    shape, dtype = shape or usual["shape"], dtype or usual["dtype"]
    what, config = getattr(torch, dtype), SHAPES[shape]
    count = config.scheduler.num_stages
    wanted = [name for name in VARIANTS if public is not None or name != "public"] if variant is None else variant
    solvers: list[Any] = solver or usual["solver"]
    known(variant=(wanted, VARIANTS), solver=(solvers, ("euler", "dopri5")), stage=(stage or [], range(count)))
    work = tasks(config, wanted, stage or range(count), batch or usual["batch"], solvers, steps, what, where)
    head = {"shape": shape, "dtype": dtype, "budget_seconds": budget_seconds} | asked(context, **usual)
    with recording(output, "stages", where, **head) as keep:
        ceilings = measure_ceilings(where, what)
        keep(ceilings.record())
        opponents = Opponents(config, random_weights(config, where, what), what, public)
        try:
            # Many models of one class are compiled here, which exceeds the default limit; sampling compiles only one.
            with torch._dynamo.config.patch(recompile_limit=64):
                keep.all(measure_stages(work, opponents, ceilings, repeats, budget_seconds))
        finally:
            opponents.close()
    show(stage_table(keep.run))
    finish(keep.run)
