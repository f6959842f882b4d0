"""``pixelflow bench coldstart``."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import Device, Output, asked, finish, known, place_of, show


def command(
    context: typer.Context,
    device: Device = "auto",
    shape: Annotated[
        Literal["xl", "cpu", "tiny", "digits"] | None,
        typer.Option(help="By default xl on a GPU, elsewhere digits, the bundled model."),
    ] = None,
    variant: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Euler's, at each stage.")] = 10,
    repeats: Annotated[int, typer.Option(min=1, help="Processes of each variant, in turns.")] = 5,
    budget_seconds: Annotated[float, typer.Option(help="After that long no further turn is begun.")] = math.inf,
    output: Output = None,
) -> None:
    """Time everything up to the first image, phase by phase, each time in a new process."""
    import tempfile

    import torch

    from pixelflow_benchmarks.harness.results import recording
    from pixelflow_benchmarks.harness.timing import first_line
    from pixelflow_benchmarks.suites.coldstart.job import Job
    from pixelflow_benchmarks.suites.coldstart.measure import measure_cold_starts, read_files_once
    from pixelflow_benchmarks.suites.coldstart.table import coldstart_table
    from pixelflow_benchmarks.suites.coldstart.variants import (
        BUNDLED,
        COMMAND,
        ON_CPU,
        ON_GPU,
        VARIANTS,
        Variant,
        checker,
        checkpoint_of,
        in_order,
    )
    from pixelflow_engine.backends import choose
    from pixelflow_engine.errors import BackendUnavailableError

    deadline = time.perf_counter() + budget_seconds
    where = place_of(device)
    on_gpu = where.type == "cuda"
    known(variant=(variant or [], (*VARIANTS, COMMAND)))
    usual = "xl" if on_gpu else BUNDLED
    name: str = shape or usual
    dtype = torch.bfloat16 if on_gpu else torch.float32
    wanted = variant or [*(v.name for v in (ON_GPU if on_gpu else ON_CPU)), COMMAND]
    short = str(dtype).removeprefix("torch.")
    with (
        recording(
            output, "coldstart", where, shape=name, dtype=short, steps=steps, **asked(context, shape=usual)
        ) as keep,
        tempfile.TemporaryDirectory(prefix="pixelflow-coldstart-") as folder,
    ):
        checkpoint = checkpoint_of(name, Path(folder) / "model", dtype)
        able = []
        for one in in_order(name for name in wanted if name != COMMAND):
            try:
                choose(one.backend, where, dtype, checkpoint.config.model.attention_head_dim)
                able.append(one)
            except BackendUnavailableError as error:
                keep({"kind": "absent", "variant": one.name, "reason": first_line(error)})

        def job(one: Variant, images: Path) -> Job:
            return Job(
                checkpoint=checkpoint.source,
                device=str(where),
                dtype=short,
                backend=one.backend,
                compile=one.compile,
                graphs=one.graphs,
                steps=steps,
                images=str(images),
                warmup=[1, 4, 16],
            )

        read_files_once()
        check = checker(checkpoint, steps, dtype, where)
        keep.all(
            measure_cold_starts(able, job, check, Path(folder), repeats, commands=COMMAND in wanted, deadline=deadline)
        )
    show(coldstart_table(keep.run))
    finish(keep.run)
