"""``pixelflow bench curves``."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Output, asked, finish, known, show


def command(
    context: typer.Context,
    backend: Annotated[
        list[str] | None, typer.Option(help="torch or triton; may be repeated, both by default.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=2, help="How many, from 0.")] = 3,
    steps: Annotated[int, typer.Option(min=10, help="Of training, a multiple of 10.")] = 200,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    output: Output = None,
) -> None:
    """Train a small model on each backend and with the reference, and compare their loss curves.

    On a CPU the kernels run under Triton's interpreter, if TRITON_INTERPRET=1 is set.
    """
    from pixelflow_benchmarks.harness.results import recording
    from pixelflow_benchmarks.suites.curves import curves_table, measure_curves, recipe
    from pixelflow_engine.arguments import place

    backends = backend or ["torch", "triton"]
    known(backend=(backends, ("torch", "triton")))
    where = place(device)
    head = {"steps": steps, "seeds": seeds, "batch": recipe(steps, 0).batch_size, **asked(context)}
    with recording(output, "curves", where, **head) as keep:
        keep.all(measure_curves(backends, seeds, steps, where))
    show(curves_table(keep.run))
    finish(keep.run)
