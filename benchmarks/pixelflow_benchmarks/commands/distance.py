"""``pixelflow bench distance``."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from .options import Output, asked, finish, show


def command(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Checkpoint or bundled model, class-conditional.")] = "digits",
    shape: Annotated[
        Literal["xl", "cpu", "small", "tiny"] | None,
        typer.Option(help="Instead of a checkpoint: a model of this shape with random weights."),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Images; classes in turn.")] = 20,
    # With two steps, all velocities would be those near the end of a stage.
    steps: Annotated[int, typer.Option(min=3, help="Euler's, at each stage.")] = 10,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    output: Output = None,
) -> None:
    """Compare the velocities and images of every way of running a model with float64, from the same noise.

    On a CPU the kernels run under Triton's interpreter, if TRITON_INTERPRET=1 is set; use --shape tiny for that.
    """
    from pixelflow_benchmarks.harness.environment import CPU
    from pixelflow_benchmarks.harness.results import recording
    from pixelflow_benchmarks.opponents.random_models import SHAPES, random_weights
    from pixelflow_benchmarks.suites.distance import INTERPRETED, VARIANTS, distance_table, measure_distance
    from pixelflow_engine import Checkpoint, load_checkpoint
    from pixelflow_engine.arguments import place
    from pixelflow_kernels.registration import interpreting

    where = place(device)
    if shape is None:
        name, checkpoint = model, load_checkpoint(model)
    else:
        name = f"{shape}, random weights"
        checkpoint = Checkpoint(SHAPES[shape], random_weights(SHAPES[shape], CPU), name)
    if (classes := checkpoint.config.model.num_classes) == 0:
        raise ValueError(f"model: got {model!r}, expected one with classes")
    labels = [i % classes for i in range(images)]
    variants = INTERPRETED if interpreting() else VARIANTS
    head = {"model": name, "images": images, "steps": steps, "interpreted": interpreting(), **asked(context)}
    with recording(output, "distance", where, **head) as keep:
        keep.all(measure_distance(checkpoint, labels, steps, where, variants))
    show(distance_table(keep.run))
    finish(keep.run)
