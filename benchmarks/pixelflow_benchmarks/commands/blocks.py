"""``pixelflow bench blocks``."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Output, Public, asked, finish, show


def command(
    context: typer.Context,
    batch: Annotated[int, typer.Option(min=1, help="Images; with guidance each counts twice.")] = 16,
    stage: Annotated[int, typer.Option(min=0, max=3)] = 3,
    public: Public = None,
    output: Output = None,
) -> None:
    """Count launches and bytes of a transformer block on fake tensors, which needs no GPU."""
    from pixelflow_benchmarks.harness.environment import CPU
    from pixelflow_benchmarks.harness.results import recording
    from pixelflow_benchmarks.suites.blocks import CITED, block_table, operation_tables, trace_blocks

    found = trace_blocks(batch, stage, public)
    with recording(output, "blocks", CPU, batch=batch, stage=stage, **asked(context)) as keep:
        keep.all([*found, CITED])
    for table in (*operation_tables(keep.run), block_table(keep.run)):
        show(table)
    finish(keep.run)
