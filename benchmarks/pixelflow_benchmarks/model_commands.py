"""``pixelflow bench blocks``, ``cpu`` and ``stages``: benchmarks of the model, where ``kernels`` has single kernels."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from .tables import TextTable

Output = Annotated[Path | None, typer.Option(help="JSON lines to write; a new file.")]


def register(bench: typer.Typer, show: Callable[[TextTable], None], console: Console) -> None:
    """Add the commands."""

    @bench.command("blocks")
    def blocks_command(
        batch: Annotated[int, typer.Option(min=1, help="Images; with guidance each counts twice.")] = 16,
        stage: Annotated[int, typer.Option(min=0, max=3)] = 3,
        public: Annotated[Path | None, typer.Option(help="Checkout of the published code, traced too.")] = None,
        output: Output = None,
    ) -> None:
        """Count launches and bytes of a transformer block, on fake tensors: needs no GPU."""
        from .blocks import CITED, block_tables, trace_blocks
        from .environment import commit, environment

        found = trace_blocks(batch, stage, public)
        records = [{"kind": "environment", **environment(), "commit": commit(), "batch": batch, "stage": stage}]
        records += [*found, CITED]
        with record_file(output) as keep:
            for record in records:
                keep(record)
        for table in block_tables(records):
            show(table)

    @bench.command("cpu")
    def cpu_command(
        batch: Annotated[int, typer.Option(min=1)] = 1,
        steps: Annotated[int, typer.Option(min=1, help="Euler's, at each stage.")] = 4,
        rounds: Annotated[int, typer.Option(min=1, help="Turns; in each every variant runs once.")] = 7,
        shape: Annotated[Literal["cpu", "tiny"], typer.Option(help="tiny tries the command out.")] = "cpu",
        compiled: Annotated[bool, typer.Option(help="With the compiled engine.")] = True,
        output: Output = None,
    ) -> None:
        """Time the whole cascade on a CPU, engine beside reference; nothing wrong gets a time."""
        from .cpu import cascade_calls, cascade_table, measure_cascade
        from .environment import commit, environment
        from .random_models import SHAPES

        head = {"kind": "environment", **environment(), "commit": commit(), "processor": processor()}
        head |= {"load": os.getloadavg()[0], "shape": shape, "batch": batch, "steps": steps, "rounds": rounds}
        records: list[dict[str, Any]] = []
        with record_file(output) as keep:
            calls, truth = cascade_calls(SHAPES[shape], batch, steps, compiled)
            for record in itertools.chain([head], measure_cascade(calls, truth, rounds)):
                records.append(record)
                keep(record)
            keep({"kind": "end", "load": os.getloadavg()[0]})
        show(cascade_table(records))
        if wrong := [f"{r['variant']}: {r['fault']}" for r in records if "fault" in r]:
            console.print("\n".join(["wrong results:", *wrong]), style="red", highlight=False)
            raise typer.Exit(1)


@contextlib.contextmanager
def record_file(path: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What writes a record as a line of JSON at once: a run that is cut short keeps what it has measured."""
    with contextlib.nullcontext() if path is None else path.open("x", encoding="utf-8") as file:

        def keep(record: dict[str, Any]) -> None:
            if file is not None:
                print(json.dumps(record), file=file, flush=True)

        yield keep


def processor() -> str:
    """The CPU's name, where the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
