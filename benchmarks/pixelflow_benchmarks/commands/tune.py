"""``pixelflow bench tune``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm.auto import tqdm

from .options import Quiet, console, known, new_lines, show

if TYPE_CHECKING:
    import torch


def command(
    op: Annotated[list[str] | None, typer.Option(help="Only this operation or kernel; may be repeated.")] = None,
    device: Annotated[str, typer.Option(help="cuda, cuda:1, ...")] = "cuda",
    stage: Annotated[list[int] | None, typer.Option(help="Only this stage, 0 to 3; may be repeated.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images; with guidance each counts twice.")] = 16,
    repeats: Annotated[int, typer.Option(min=3, help="Measurements of each configuration.")] = 11,
    budget_seconds: Annotated[float, typer.Option(min=0, help="Begin no further kernel after this long.")] = math.inf,
    jobs: Annotated[int, typer.Option(min=1, help="Threads that compile.")] = 8,
    output: Annotated[Path | None, typer.Option(help="JSON lines to write; a new file.")] = None,
    measured: Annotated[Path | None, typer.Option("--from", help="Measure nothing: choose from such a file.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Write the choices into the GPU's table.")] = False,
    quiet: Quiet = False,
) -> None:
    """Measure launch configurations on this GPU and propose those that are clearly faster.

    A configuration decides the order of sums and therefore the bits: outputs that are not bitwise PyTorch's may change
    in their last places with a table. Every candidate is checked before it is timed. Only --write changes the table.
    """
    from pixelflow_benchmarks.suites.kernels.case import STAGE_SIDES
    from pixelflow_benchmarks.suites.tuning.choose import choose, merged, tuning_table
    from pixelflow_benchmarks.suites.tuning.tunables import KERNELS, OPERATIONS
    from pixelflow_kernels import configs

    known(op=(op or [], (*OPERATIONS, *KERNELS)), stage=(stage or [], range(len(STAGE_SIDES))))
    if measured is None:
        found = _tune(op or (), _gpu(device), stage, batch, repeats, budget_seconds, jobs)
        first, records = next(found), []  # before the file, which is not made for an interrupt or an error here
        with new_lines(output) as file:
            try:
                for record in tqdm(chain([first], found), unit="configuration", delay=2, disable=quiet):
                    records.append(record)
                    if file is not None:
                        print(json.dumps(record), file=file, flush=True)
            except KeyboardInterrupt:
                console.print("interrupted: chosen from what was measured so far", style="yellow")
    else:
        records = [json.loads(line) for line in measured.read_text("utf-8").splitlines()]
    if not records or records[0].get("kind") != "environment" or "arch" not in records[0]:
        raise ValueError(f"from: got {measured}, expected JSON lines that `bench tune --output` wrote")
    choices = choose(records)
    show(tuning_table(choices, records[0]["gpu"]))
    if left_out := [r["kernel"] for r in records if r["kind"] == "left out"]:
        console.print(f"no time for: {', '.join(left_out)}", style="yellow")
    path = configs.FOLDER / f"sm_{records[0]['arch']}.json"
    if write and any(choice.changed for choice in choices):
        configs.write_table(merged(configs.read_table(path) if path.is_file() else {}, choices), path)
        console.print(f"written: {path}")


def _gpu(device: str) -> torch.device:
    from pixelflow_engine.arguments import place

    where = place(device)
    if where.type != "cuda":
        raise ValueError(
            f"device: got {device!r}, expected a GPU: configurations are measured on the one that they are for"
        )
    return where


def _tune(
    op: Iterable[str],
    where: torch.device,
    stage: list[int] | None,
    batch: int,
    repeats: int,
    budget: float,
    jobs: int,
) -> Iterator[dict[str, Any]]:
    """Yield all records of a run; wrong arguments are refused before the first."""
    import torch

    from pixelflow_benchmarks.harness.environment import environment, state
    from pixelflow_benchmarks.suites.kernels.case import STAGE_SIDES
    from pixelflow_benchmarks.suites.tuning.measure import tune
    from pixelflow_benchmarks.suites.tuning.tunables import tunables
    from pixelflow_kernels.configs import arch_of

    wanted = tunables(op, stage or range(len(STAGE_SIDES)), batch, torch.bfloat16, where)
    yield {"kind": "environment", **environment(where), "arch": arch_of(where), "batch": batch, **state(where)}
    yield from tune(wanted, where, repeats, jobs=jobs, budget=budget)
    yield {"kind": "end", **state(where)}
