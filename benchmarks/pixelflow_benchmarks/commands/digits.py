"""``pixelflow eval digits`` and ``pixelflow eval table``: the quality of generated digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import Quiet, new_lines, show


def evaluate(
    model: Annotated[str, typer.Option(help="Checkpoint or bundled model.")] = "digits",
    count: Annotated[int, typer.Option(min=200, help="Images per setting and repeat.")] = 1000,
    repeats: Annotated[int, typer.Option(min=1, help="Disjoint sets of seeds.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1)] = 100,
    only: Annotated[str | None, typer.Option(help="Only settings whose name contains this.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON lines to write; a new file.")] = None,
    quiet: Quiet = False,
) -> None:
    """Score generated digits: class agreement, Frechet distances, signs of copying."""
    try:
        import scipy  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError("eval needs scikit-learn and scipy: the extra `eval` (in a clone: make setup)") from error
    from pixelflow_benchmarks.quality import digits
    from pixelflow_benchmarks.quality.table import quality_table
    from pixelflow_engine import PixelFlowEngine

    settings = tuple(s for s in digits.SETTINGS if only is None or only in s.name)
    if not settings:
        raise ValueError(f"only: got {only!r}, expected a part of one of: {'; '.join(s.name for s in digits.SETTINGS)}")
    engine = PixelFlowEngine.from_pretrained(model)
    network = engine.config.model
    if (network.num_classes, network.cross_attention_dim) != (10, None) or network.in_channels not in (1, 3):
        raise ValueError(f"model: got {model!r}, expected one of the ten digits, in one channel or three")
    records = []
    # Records are written as they are measured, so that an interrupted evaluation keeps its results.
    with new_lines(output) as file:
        for record in digits.evaluate_digits(engine, count, repeats, batch_size, settings, quiet):
            records.append(record)
            if file is not None:
                print(json.dumps(record), file=file, flush=True)
    show(quality_table(records))


def table(results: Annotated[Path, typer.Argument(help="JSON lines of an evaluation.")]) -> None:
    """Print the results of an evaluation as a Markdown table."""
    from pixelflow_benchmarks.quality.table import quality_table

    print(quality_table([json.loads(line) for line in results.read_text().splitlines()]).markdown(), end="")
