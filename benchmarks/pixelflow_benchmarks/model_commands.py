"""The commands of ``pixelflow bench`` about the model, where ``kernels`` and ``tune`` are about single kernels."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
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
        head = {"kind": "environment", **environment(), "commit": commit(), "batch": batch, "stage": stage}
        records: list[dict[str, Any]] = [head, *found, CITED]
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

        head: dict[str, Any] = {"kind": "environment", **environment(), "commit": commit(), "processor": processor()}
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

    @bench.command("stages")
    def stages_command(
        device: Annotated[str, typer.Option(help="cuda, cuda:1, ...; cpu tries the command out.")] = "cuda",
        shape: Annotated[Literal["xl", "tiny"], typer.Option(help="tiny tries the command out.")] = "xl",
        dtype: Annotated[Literal["bfloat16", "float32"], typer.Option()] = "bfloat16",
        variant: Annotated[list[str] | None, typer.Option(help="Only this opponent; may be repeated.")] = None,
        batch: Annotated[list[int] | None, typer.Option(min=1, help="1, 4, 16, 32; may be repeated.")] = None,
        stage: Annotated[list[int] | None, typer.Option(help="Only this stage; may be repeated.")] = None,
        solver: Annotated[list[str] | None, typer.Option(help="euler, dopri5; may be repeated.")] = None,
        steps: Annotated[int | None, typer.Option(min=2, help="Euler's; by default few where they are long.")] = None,
        rounds: Annotated[int, typer.Option(min=1, help="Turns; in each every variant runs once.")] = 5,
        budget_seconds: Annotated[float, typer.Option(help="After that long no further problem is begun.")] = 480,
        public: Annotated[Path | None, typer.Option(help="Checkout of the published code, as an opponent.")] = None,
        output: Output = None,
    ) -> None:
        """Time the stages of the model, engine beside reference; nothing wrong gets a time."""
        import torch
        import torch._dynamo

        from pixelflow_engine.arguments import place

        from .ceilings import measure_ceilings
        from .environment import clocks, commit, environment
        from .random_models import SHAPES, random_weights
        from .stage_tables import absent, stage_table
        from .stages import VARIANTS, Opponents, measure_stages, tasks

        where, what, config = place(device), getattr(torch, dtype), SHAPES[shape]
        count = config.scheduler.num_stages
        wanted = [name for name in VARIANTS if public is not None or name != "public"] if variant is None else variant
        solvers: list[Any] = solver or ["euler", "dopri5"]
        known(variant=(wanted, VARIANTS), solver=(solvers, ("euler", "dopri5")), stage=(stage or [], range(count)))
        work = tasks(config, wanted, stage or range(count), batch or [16, 1, 4, 32], solvers, steps, what, where)
        on_gpu = where.type == "cuda"
        records: list[dict[str, Any]] = []
        with record_file(output) as write:

            def keep(record: dict[str, Any]) -> None:
                records.append(record)
                write(record)

            head = {"kind": "environment", **environment(where), "commit": commit(), "shape": shape, "dtype": dtype}
            keep({**head, "budget_seconds": budget_seconds, **clocks(where)})
            ceilings = measure_ceilings(where, what, 2**30 if on_gpu else 2**24, 8192 if on_gpu else 256)
            rates = {"bytes_per_second": ceilings.bytes_per_second, "flops_per_second": ceilings.flops_per_second}
            keep({"kind": "ceilings", **rates})
            opponents = Opponents(config, random_weights(config, where, what), what, public)
            try:
                # Many models of one class are compiled here, a sampling has one: its limit would be reached too soon.
                with torch._dynamo.config.patch(recompile_limit=64):
                    for record in measure_stages(work, opponents, ceilings, rounds, budget_seconds):
                        keep(record)
            finally:
                opponents.close()
            keep({"kind": "end", **clocks(where)})
        show(stage_table(records))
        for reason, names in absent(records).items():
            console.print(f"absent: {', '.join(names)}: {reason}", highlight=False)
        if wrong := [f"{r['variant']}: {r['fault']}" for r in records if "fault" in r]:
            console.print("\n".join(["wrong results:", *wrong]), style="red", highlight=False)
            raise typer.Exit(1)

    @bench.command("distance")
    def distance_command(
        model: Annotated[str, typer.Option(help="Checkpoint or bundled model, class-conditional.")] = "digits",
        images: Annotated[int, typer.Option(min=1, help="Images; classes in turn.")] = 20,
        steps: Annotated[int, typer.Option(min=2, help="Euler's, at each stage.")] = 10,
        device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
        output: Output = None,
    ) -> None:
        """Compare velocities and images of every way of running a model with float64, at equal noise."""
        from pixelflow_engine import load_checkpoint
        from pixelflow_engine.arguments import place

        from .distance import VARIANTS, distance_table, measure_distance
        from .environment import commit, environment

        where, checkpoint = place(device), load_checkpoint(model)
        if (classes := checkpoint.config.model.num_classes) == 0:
            raise ValueError(f"model: got {model!r}, expected one with classes")
        head: dict[str, Any] = {"kind": "environment", **environment(where), "commit": commit()}
        head |= {"model": model, "images": images, "steps": steps}
        records = [head]
        labels = [i % classes for i in range(images)]
        with record_file(output) as keep:
            keep(head)
            for record in measure_distance(checkpoint, labels, steps, where, VARIANTS):
                records.append(record)
                keep(record)
        show(distance_table(records))
        for record in records:
            if "absent" in record:
                console.print(f"absent: {record['variant']}: {record['absent']}", highlight=False)

    @bench.command("compare")
    def compare_command(
        before: Annotated[Path, typer.Argument(help="JSON lines of bench kernels, stages or cpu.")],
        after: Annotated[Path, typer.Argument(help="The same of another version.")],
    ) -> None:
        """Compare two result files, measurement by measurement; leaves with 1 where something is slower."""
        from .compare import compare, compare_table, different_surroundings

        old, new = ([json.loads(line) for line in path.read_text().splitlines()] for path in (before, after))
        changes, gone, added = compare(old, new)
        show(compare_table(changes))
        for said, names in (("only before", gone), ("only after", added)):
            if names:
                console.print(f"{said}: {'; '.join(names)}", highlight=False)
        for difference in different_surroundings(old, new):
            console.print(f"differs, {difference}", highlight=False)
        if any(change.verdict == "slower" for change in changes):
            raise typer.Exit(1)


def known(**asked: tuple[Sequence[Any], Sequence[Any]]) -> None:
    """Refuse names that nothing has.

    Raises:
        ValueError: naming the option, what came and what was expected.
    """
    for option, (given, names) in asked.items():
        for value in given:
            if value not in names:
                raise ValueError(f"{option}: got {value!r}, expected one of {', '.join(map(str, names))}")


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
