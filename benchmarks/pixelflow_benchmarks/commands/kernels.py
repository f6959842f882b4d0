"""``pixelflow bench kernels``."""

from __future__ import annotations

import math
import time
from typing import Annotated, Literal

import typer
from tqdm.auto import tqdm

from .options import Output, Quiet, Repeats, asked, finish, known, show


def command(
    context: typer.Context,
    op: Annotated[list[str] | None, typer.Option(help="Only this operation; may be repeated.")] = None,
    device: Annotated[str, typer.Option(help="cuda, cuda:1, ...; cpu tries the command out.")] = "cuda",
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], typer.Option()] = "bfloat16",
    batch: Annotated[int, typer.Option(min=1, help="Images; with guidance each counts twice.")] = 16,
    stage: Annotated[list[int] | None, typer.Option(help="Only this stage, 0 to 3; may be repeated.")] = None,
    repeats: Repeats = 20,
    budget_seconds: Annotated[float, typer.Option(help="After that long no further case is begun.")] = math.inf,
    output: Output = None,
    quiet: Quiet = False,
) -> None:
    """Time every kernel against PyTorch, at the sizes of the published model. Wrong results get no time."""
    import torch

    from pixelflow_benchmarks.harness.ceilings import measure_ceilings
    from pixelflow_benchmarks.harness.results import recording
    from pixelflow_benchmarks.suites.kernels.cases import OPS, STAGE_SIDES, all_cases
    from pixelflow_benchmarks.suites.kernels.measure import measure
    from pixelflow_benchmarks.suites.kernels.table import kernel_table
    from pixelflow_engine.arguments import place

    deadline = time.perf_counter() + budget_seconds
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device: got 'cuda', expected a GPU that torch can use (see `pixelflow doctor`); cpu tries the command out"
        )
    where, what = place(device), getattr(torch, dtype)
    known(op=(op or [], OPS), stage=(stage or [], range(len(STAGE_SIDES))))
    cases = all_cases(op or OPS, stage or range(len(STAGE_SIDES)), batch, what, where)
    with recording(output, "kernels", where, dtype=dtype, batch=batch, **asked(context)) as keep:
        ceilings = measure_ceilings(where, what)
        keep(ceilings.record())
        keep.all(tqdm(measure(cases, ceilings, where, repeats, deadline), unit="variant", delay=2, disable=quiet))
    show(kernel_table(keep.run))
    finish(keep.run)
