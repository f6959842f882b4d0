"""``pixelflow eval``. What needs an extra is imported when the command runs."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

console = Console()
evaluate = typer.Typer(no_args_is_help=True, help="Measure the quality of generated images.")


@evaluate.callback()
def _evaluate() -> None:
    """Measure the quality of generated images."""
    # With a callback, typer keeps `digits` a sub-command although it is the only one.


@evaluate.command("digits")
def evaluate_digits_command(
    model: Annotated[str, typer.Option(help="Checkpoint or bundled model.")] = "digits",
    count: Annotated[int, typer.Option(min=200, help="Images per setting and repeat.")] = 1000,
    repeats: Annotated[int, typer.Option(min=1, help="Disjoint sets of seeds.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1)] = 250,
    only: Annotated[str | None, typer.Option(help="Only settings whose name contains this.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON lines to write.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Score generated digits: class agreement, Frechet distances, signs of copying."""
    try:
        import scipy  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError("eval needs scikit-learn and scipy: pip install 'pixelflow-engine[eval]'") from error
    from pixelflow_engine import PixelFlowEngine

    from . import digits

    settings = tuple(s for s in digits.SETTINGS if only is None or only in s.name)
    if not settings:
        raise ValueError(f"only: got {only!r}, expected a part of one of: {'; '.join(s.name for s in digits.SETTINGS)}")
    engine = PixelFlowEngine.from_pretrained(model)
    records = list(digits.evaluate_digits(engine, count, repeats, batch_size, settings, quiet))
    if output is not None:
        digits.write_records(output, [{"kind": "environment", **digits.environment()}, *records])
    console.print(quality_table(records))


def quality_table(records: list[dict[str, Any]]) -> Table:
    """A row per setting, mean and half the range over repeats; real digits and noise first."""
    judge = records[0]
    table = Table(
        "digits",
        "agreement",
        "Frechet",
        "Frechet (scan)",
        "copying",
        "copies",
        "evaluations",
        title=f"{judge['train']} training digits, {judge['held_out']} held out; "
        f"the classifier reads {judge['held_out_accuracy_svm']:.1%} of the latter",
    )
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records[1:]:
        groups[record.get("name", record["kind"])].append(record)
    for name, group in groups.items():
        cells = [
            spread([r[key] for r in group]) for key in ("agreement", "frechet", "frechet_scan", "copying", "copies")
        ]
        table.add_row(name, *cells, str(group[0].get("evaluations", "")))
    return table


def spread(values: list[float]) -> str:
    """Mean, and half the range where there are several."""
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.3f}"
