"""``pixelflow bench distance``."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Output, finish, show


def command(
    model: Annotated[str, typer.Option(help="Checkpoint or bundled model, class-conditional.")] = "digits",
    images: Annotated[int, typer.Option(min=1, help="Images; classes in turn.")] = 20,
    steps: Annotated[int, typer.Option(min=2, help="Euler's, at each stage.")] = 10,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    output: Output = None,
) -> None:
    """Compare velocities and images of every way of running a model with float64, at equal noise."""
    from pixelflow_benchmarks.harness.results import recording
    from pixelflow_benchmarks.suites.distance import VARIANTS, distance_table, measure_distance
    from pixelflow_engine import load_checkpoint
    from pixelflow_engine.arguments import place

    where, checkpoint = place(device), load_checkpoint(model)
    if (classes := checkpoint.config.model.num_classes) == 0:
        raise ValueError(f"model: got {model!r}, expected one with classes")
    labels = [i % classes for i in range(images)]
    with recording(output, "distance", where, model=model, images=images, steps=steps) as keep:
        keep.all(measure_distance(checkpoint, labels, steps, where, VARIANTS))
    show(distance_table(keep.run))
    finish(keep.run)
