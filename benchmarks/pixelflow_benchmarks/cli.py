"""``pixelflow eval`` and ``pixelflow bench``. What needs an extra is imported when a command runs."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from . import model_commands
from .tables import TextTable, kernel_table, quality_table, tuning_table

if TYPE_CHECKING:
    import torch

console = Console()
evaluate = typer.Typer(no_args_is_help=True, help="Measure the quality of generated images.")
bench = typer.Typer(no_args_is_help=True)


@evaluate.command("digits")
def evaluate_digits_command(
    model: Annotated[str, typer.Option(help="Checkpoint or bundled model.")] = "digits",
    count: Annotated[int, typer.Option(min=200, help="Images per setting and repeat.")] = 1000,
    repeats: Annotated[int, typer.Option(min=1, help="Disjoint sets of seeds.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1)] = 100,
    only: Annotated[str | None, typer.Option(help="Only settings whose name contains this.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON lines to write; a new file.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Score generated digits: class agreement, Frechet distances, signs of copying."""
    try:
        import scipy  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError("eval needs scikit-learn and scipy: the extra `eval` (in a clone: make setup)") from error
    from pixelflow_engine import PixelFlowEngine

    from . import digits

    settings = tuple(s for s in digits.SETTINGS if only is None or only in s.name)
    if not settings:
        raise ValueError(f"only: got {only!r}, expected a part of one of: {'; '.join(s.name for s in digits.SETTINGS)}")
    engine = PixelFlowEngine.from_pretrained(model)
    records = []
    # Line by line as they come: an evaluation that is cut short keeps what it has measured.
    with contextlib.nullcontext() if output is None else output.open("x", encoding="utf-8") as file:
        for record in digits.evaluate_digits(engine, count, repeats, batch_size, settings, quiet):
            records.append(record)
            if file is not None:
                print(json.dumps(record), file=file, flush=True)
    show(quality_table(records))


@evaluate.command("table")
def table_command(results: Annotated[Path, typer.Argument(help="JSON lines of an evaluation.")]) -> None:
    """Print the results of an evaluation as a Markdown table, as the README carries it."""
    print(quality_table([json.loads(line) for line in results.read_text().splitlines()]).markdown(), end="")


@bench.callback()
def _bench() -> None:
    """Measure speed."""


@bench.command("kernels")
def bench_kernels_command(
    op: Annotated[list[str] | None, typer.Option(help="Only this operation; may be repeated.")] = None,
    device: Annotated[str, typer.Option(help="cuda, cuda:1, ...; cpu tries the command out.")] = "cuda",
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], typer.Option()] = "bfloat16",
    batch: Annotated[int, typer.Option(min=1, help="Images; with guidance each counts twice.")] = 16,
    stage: Annotated[list[int] | None, typer.Option(help="Only this stage, 0 to 3; may be repeated.")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Measurements of each variant.")] = 15,
    output: Annotated[Path | None, typer.Option(help="JSON lines to write; a new file.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Time every kernel beside PyTorch, at the sizes of the published model; nothing wrong gets a speed."""
    import torch

    from pixelflow_engine.arguments import place

    from . import kernel_cases
    from .ceilings import measure_ceilings
    from .environment import clocks, environment
    from .kernels import measure

    where, what = place(device), getattr(torch, dtype)
    stages = tuple(stage) if stage else tuple(range(len(kernel_cases.STAGE_SIDES)))
    cases = kernel_cases.all_cases(tuple(op) if op else kernel_cases.OPS, stages, batch, what, where)
    records: list[dict[str, Any]] = []
    with contextlib.nullcontext() if output is None else output.open("x", encoding="utf-8") as file:

        def keep(record: dict[str, Any]) -> None:
            records.append(record)
            if file is not None:
                print(json.dumps(record), file=file, flush=True)

        keep({"kind": "environment", **environment(where), "dtype": dtype, "batch": batch, **clocks(where)})
        on_gpu = where.type == "cuda"
        ceilings = measure_ceilings(where, what, 2**30 if on_gpu else 2**26, 8192 if on_gpu else 512, rounds)
        keep(
            {
                "kind": "ceilings",
                "bytes_per_second": ceilings.bytes_per_second,
                "flops_per_second": ceilings.flops_per_second,
            }
        )
        for record in tqdm(measure(cases, ceilings, where, rounds), unit="variant", delay=2, disable=quiet):
            keep(record)
        keep({"kind": "end", **clocks(where)})
    show(kernel_table(records))
    wrong = [f"{r['case']} {r['variant']}: {'; '.join(r['faults'])}" for r in records if r.get("faults")]
    if wrong:
        console.print("\n".join(["wrong results:", *wrong]), style="red", highlight=False)
        raise typer.Exit(1)


@bench.command("tune")
def bench_tune_command(
    op: Annotated[list[str] | None, typer.Option(help="Only this operation or kernel; may be repeated.")] = None,
    device: Annotated[str, typer.Option(help="cuda, cuda:1, ...")] = "cuda",
    stage: Annotated[list[int] | None, typer.Option(help="Only this stage, 0 to 3; may be repeated.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images; with guidance each counts twice.")] = 16,
    rounds: Annotated[int, typer.Option(min=3, help="Measurements of each configuration.")] = 11,
    budget_seconds: Annotated[float, typer.Option(min=0, help="Begin no further kernel after this long.")] = math.inf,
    jobs: Annotated[int, typer.Option(min=1, help="Threads that compile.")] = 8,
    output: Annotated[Path | None, typer.Option(help="JSON lines to write; a new file.")] = None,
    measured: Annotated[Path | None, typer.Option("--from", help="Measure nothing: choose from such a file.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Write the choices into the GPU's table.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Measure launch configurations on this GPU and propose what is clearly faster.

    A configuration decides the order of sums, and so bits: outputs that are not bitwise PyTorch's may change in their
    last places with a table. Every candidate is checked before it is timed; nothing is changed without --write.
    """
    from pixelflow_kernels import configs

    from .tuning import choose, merged

    if measured is None:
        where, records = _gpu(device), []
        with contextlib.nullcontext() if output is None else output.open("x", encoding="utf-8") as file:
            found = _tune(op or (), where, stage, batch, rounds, budget_seconds, jobs)
            try:
                for record in tqdm(found, unit="configuration", delay=2, disable=quiet):
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
    rounds: int,
    budget: float,
    jobs: int,
) -> Iterator[dict[str, Any]]:
    """All records of a run; a wrong argument is refused before the first."""
    import torch

    from pixelflow_kernels.configs import arch_of

    from .environment import clocks, environment
    from .tuning import tune
    from .tuning_cases import STAGE_SIDES, tunables

    wanted = tunables(op, stage or range(len(STAGE_SIDES)), batch, torch.bfloat16, where)
    yield {"kind": "environment", **environment(where), "arch": arch_of(where), "batch": batch, **clocks(where)}
    yield from tune(wanted, where, rounds, jobs=jobs, budget=budget)
    yield {"kind": "end", **clocks(where)}


def show(text: TextTable) -> None:
    """Print a table; in a narrow terminal its cells fold at blanks."""
    table = Table(*text.header, title=text.title, padding=(0, 0))
    for row in text.rows:
        table.add_row(*row)
    console.print(table)


model_commands.register(bench, show, console)
