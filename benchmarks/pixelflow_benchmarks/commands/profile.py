"""``pixelflow bench profile``."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer.core import TyperCommand

from .options import Device, Repeats, console, finish, known, place_of, show


class KeyValueCommand(TyperCommand):
    """A command whose options may also be written as ``stage=3``."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Turn words such as ``stage=3`` into options; every option here takes a value. See :class:`click.Command`."""
        names = {option for parameter in self.params for option in parameter.opts}
        words = [
            f"--{word}" if f"--{word.partition('=')[0]}" in names and "=" in word and before not in names else word
            for before, word in zip(["", *args], args, strict=False)
        ]
        return super().parse_args(ctx, words)


def command(
    device: Device = "auto",
    shape: Annotated[
        Literal["xl", "cpu", "tiny"] | None, typer.Option(help="By default xl on a GPU, cpu elsewhere.")
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="As in bench stages; may be repeated. triton/graphs on a GPU, torch/eager elsewhere."),
    ] = None,
    stage: Annotated[int, typer.Option(min=0, help="Of the cascade.")] = 3,
    batch: Annotated[int | None, typer.Option(min=1, help="16 on a GPU, 1 elsewhere.")] = None,
    steps: Annotated[int, typer.Option(min=2, help="Euler's, in the profiled run.")] = 3,
    repeats: Repeats = 5,
    top: Annotated[int, typer.Option(min=1, help="Kernels in the table; the records have all.")] = 12,
    output: Annotated[
        Path | None, typer.Option(help="A new folder for traces and records; by default profile-DATE-TIME here.")
    ] = None,
) -> None:
    """Profile a stage: a trace to open, its longest kernels, and the time of each class of them beside its floor.

    Options may also be written as in `profile stage=3 batch=4`.
    """
    import torch
    import torch._dynamo

    from pixelflow_benchmarks.harness.ceilings import measure_ceilings
    from pixelflow_benchmarks.harness.results import recording
    from pixelflow_benchmarks.opponents.random_models import SHAPES, random_weights
    from pixelflow_benchmarks.suites.profile.measure import PROFILED, measure_profiles
    from pixelflow_benchmarks.suites.profile.table import profile_tables
    from pixelflow_benchmarks.suites.stages.opponents import Opponents
    from pixelflow_benchmarks.suites.stages.problem import StageProblem

    where = place_of(device)
    on_gpu = where.type == "cuda"
    shape = shape or ("xl" if on_gpu else "cpu")
    config, dtype = SHAPES[shape], torch.bfloat16 if on_gpu else torch.float32
    wanted = list(dict.fromkeys(variant or ["triton/graphs" if on_gpu else "torch/eager"]))
    known(variant=(wanted, PROFILED), stage=([stage], range(config.scheduler.num_stages)))
    problem = StageProblem(
        config=config,
        stage=stage,
        batch=batch or (16 if on_gpu else 1),
        steps=steps,
        solver="euler",
        dtype=dtype,
        device=where,
    )
    folder = _new_folder(output or Path(f"profile-{datetime.now():%Y%m%d-%H%M%S}"))
    head = {"shape": shape, "dtype": str(dtype).removeprefix("torch.")}
    with (
        recording(folder / "profile.jsonl", "profile", where, **head) as keep,
        # Many models of one class are compiled here, which exceeds the default limit; sampling compiles only one.
        torch._dynamo.config.patch(recompile_limit=64),
    ):
        ceilings = measure_ceilings(where, dtype)
        keep(ceilings.record())
        opponents = Opponents(config, random_weights(config, where, dtype), dtype, None)
        try:
            keep.all(measure_profiles(problem, wanted, opponents, ceilings, repeats, folder))
        finally:
            opponents.close()
    for table in profile_tables(keep.run, top):
        show(table)
    for record in keep.run.of_kind("measurement"):
        if record["right"]:
            console.print(f"trace: {folder / record['trace']}", highlight=False, soft_wrap=True)
    finish(keep.run)


def _new_folder(path: Path) -> Path:
    """Create the folder.

    Raises:
        ValueError: it is a file, or a folder that is not empty.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"output: got {path}, where something is already, expected the name of a new folder")
    path.mkdir(parents=True, exist_ok=True)
    return path
