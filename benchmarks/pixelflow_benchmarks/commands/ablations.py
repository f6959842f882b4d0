"""``pixelflow eval ablations``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Quiet, show


def command(
    work: Annotated[Path, typer.Option(help="Folder of the run directories; what is there is not trained again.")],
    output: Annotated[Path, typer.Option(help="JSON lines to append to; what is there is not measured again.")],
    config: Annotated[
        str, typer.Option(help="Recipe, or YAML file, that gives what the ablations do not.")
    ] = "digits-two-minutes",
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each cascade.")] = 3,
    steps: Annotated[int | None, typer.Option(min=1, help="Of each training; 2100 by default.")] = None,
    count: Annotated[int, typer.Option(min=10, help="Digits in a set.")] = 1000,
    quiet: Quiet = False,
) -> None:
    """Train cascades of digits that begin at different resolutions, sample them in many ways, and score the digits.

    If it is stopped, the same command resumes it.
    """
    try:
        import scipy  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError("eval needs scikit-learn and scipy: the extra `eval` (in a clone: make setup)") from error
    from pixelflow_benchmarks.harness.environment import CPU
    from pixelflow_benchmarks.harness.results import read_runs, recording
    from pixelflow_benchmarks.quality.ablations.measure import measure_ablations
    from pixelflow_benchmarks.quality.ablations.plan import STEPS
    from pixelflow_benchmarks.quality.ablations.table import TABLES

    if output.suffix != ".jsonl":
        raise ValueError(f"output: got {output}, expected a name that ends in .jsonl")
    steps = steps or STEPS
    head = {"recipe": config, "steps": steps, "count": count}
    runs = read_runs(output) if output.exists() else []
    for run in runs:
        if other := {key: run.environment.get(key) for key in head if run.environment.get(key) != head[key]}:
            raise ValueError(f"output: {output} has results of {other}, expected {head}: give another file")
    before = [record for run in runs for record in run.records]
    output.parent.mkdir(parents=True, exist_ok=True)
    with recording(output, "ablations", CPU, **head) as keep:
        keep.all(measure_ablations(config, work, range(seeds), steps, count, before, quiet))
    for table in TABLES.values():
        show(table([*runs, keep.run]))
