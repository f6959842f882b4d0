"""Sample images with PixelFlow, train it and measure it."""

# Training and benchmarks add their subcommands through the entry-point group ``pixelflow.commands``. Modules that need
# torch are imported when a command runs, so that ``--help`` and ``--version`` respond at once.

from __future__ import annotations

import contextlib
import platform
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from .config import ModelConfig
    from .events import StageReport, StepEvent

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console()

N = TypeVar("N", int, float)
Dtype = Literal["float32", "bfloat16", "float16", "float64"]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar and no table.")]
Model = Annotated[str, typer.Option(help="Checkpoint folder or file, or the name of a bundled model.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto is a GPU if there is one.")]


def main() -> None:
    """Run the command line; errors that the user can fix are printed on one line, without a traceback."""
    for entry_point in sorted(metadata.entry_points(group="pixelflow.commands"), key=lambda e: e.name):
        command = entry_point.load()
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=entry_point.name)
        else:
            app.command(entry_point.name)(command)
    try:
        app()
    except Exception as error:
        from .errors import BackendUnavailableError, CaptureError, ConvergenceError

        ours = (BackendUnavailableError, CaptureError, ConvergenceError)
        theirs = (ValueError, OSError, ImportError, FloatingPointError, MemoryError)
        if not isinstance(error, (*theirs, *ours)) and type(error).__name__ != "OutOfMemoryError":  # torch's
            raise
        print("\n".join([f"pixelflow: {error}", *getattr(error, "__notes__", ())]), file=sys.stderr)
        sys.exit(2)


def _version(asked: bool) -> None:
    if asked:
        print(f"pixelflow-engine {metadata.version('pixelflow-engine')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    """Sample images with PixelFlow, train it and measure it."""


@app.command()
def generate(
    output: Annotated[str, typer.Option(help="*.png, *.npz, *.npy, or a folder ending in /.")],
    model: Model = "digits",
    class_label: Annotated[list[int] | None, typer.Option(help="Repeat for several images.")] = None,
    images_per_label: Annotated[int, typer.Option(min=1, help="Images of each class label.")] = 1,
    images: Annotated[int | None, typer.Option(min=1, help="Images of a model without classes.")] = None,
    steps: Annotated[str, typer.Option(help="Steps of every stage, or of each: 10,10,10.")] = "10",
    guidance_scale: Annotated[
        float | None, typer.Option(help="Largest guidance weight; 1 is none. [default: 2.4 with classes]")
    ] = None,
    guidance_schedule: Annotated[str, typer.Option(help="stagewise, constant, or a weight per stage.")] = "stagewise",
    solver: Annotated[Literal["euler", "heun", "ab2", "dopri5"], typer.Option()] = "euler",
    shift: Annotated[float, typer.Option(help="Time shift of fixed steps.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the first image; the others count up.")] = 0,
    noise: Annotated[Literal["counter", "public"], typer.Option()] = "counter",
    height: Annotated[int | None, typer.Option(help="Pixels; the model's resolution by default.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; the model's resolution by default.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images sampled at once.")] = 64,
    device: Device = "auto",
    dtype: Annotated[Dtype, typer.Option()] = "float32",
    backend: Annotated[Literal["auto", "torch", "triton", "flash"], typer.Option()] = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="Compile the transformer's blocks first.")] = False,
    quiet: Quiet = False,
) -> None:
    """Sample images into a file or folder."""
    import numpy as np
    import torch

    from . import arguments, image_files
    from .engine import PixelFlowEngine

    image_files.check_output(output)
    place, weights = arguments.automatic(device), getattr(torch, dtype)
    engine = PixelFlowEngine.from_pretrained(model, place, weights, backend, compile=compile)
    labels = _labels(engine.config.model, class_label or [], images_per_label, images)
    count = images or 1 if labels is None else len(labels)
    if noise == "public" and count > batch_size:
        raise ValueError(f"batch-size: got {batch_size}, expected at least {count}: noise=public is one batch's stream")
    if noise == "public" and labels is None and count > 1:
        raise ValueError(f"images: got {count}, expected 1: noise=public has no seeds that say how many")
    seeds = arguments.per_image_seeds(seed, count)
    num_stages = engine.config.scheduler.num_stages
    per_stage = _numbers("steps", steps, int, "integers")
    rows_of_labels = images_per_label > 1 and len(class_label or []) > 1
    columns = images_per_label if rows_of_labels else None  # of a sheet
    reports = []
    batches = range(0, count, batch_size)
    with (
        _named_as_typed(),
        image_files.image_writer(output, count, columns) as write,
        CascadeBar(num_stages * len(batches), disable=quiet) as bar,
    ):
        for first in batches:
            chunk = slice(first, min(first + batch_size, count))
            result = engine(
                None if labels is None else labels[chunk],
                num_inference_steps=per_stage if len(per_stage) > 1 else per_stage[0],
                guidance_scale=guidance_scale,
                guidance_schedule=_schedule(guidance_schedule),
                solver=solver,
                shift=shift,
                seed=seeds[chunk] if noise == "counter" else seed,
                noise=noise,
                height=height,
                width=width,
                output_type="np",
                callback_on_step_end=bar.step,
            )
            write(np.asarray(result.images))
            reports.append(result.stages)
    if not quiet:
        console.print(stage_table([merge(stage) for stage in zip(*reports, strict=True)], count))
        files = image_files.image_files(output, count)
        where = files[0] if len(files) == 1 else f"{files[0].parent}/ ({len(files)} files)"
        console.print(f"wrote {where}", highlight=False, soft_wrap=True)


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("out/quickstart"),
    samples: Annotated[int, typer.Option(min=1, help="Images of each class.")] = 8,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Sample every class of the bundled model: a contact sheet, the cascade as an animation, and times."""
    import numpy as np

    from . import pictures
    from .arguments import automatic
    from .checkpoint import bundled_models
    from .engine import PixelFlowEngine
    from .image_files import save_png
    from .output import to_uint8

    # By path, not by name: a checkpoint named "digits" in the working directory would take precedence over the name.
    engine = PixelFlowEngine.from_pretrained(bundled_models()["digits"], automatic(device))
    output.mkdir(parents=True, exist_ok=True)
    classes = engine.config.model.num_classes
    labels = list(range(classes)) * samples
    resolution = engine.config.resolution
    recorder = pictures.CascadeRecorder(resolution, resolution, columns=classes, zoom=2)
    with CascadeBar(engine.config.scheduler.num_stages, disable=quiet) as bar:

        def on_step(event: StepEvent) -> None:
            bar.step(event)
            recorder(event)

        result = engine(labels, seed=seed, output_type="np", callback_on_step_end=on_step)
    sheet, animation = output / "digits.png", output / "cascade.webp"
    images = np.asarray(result.images)
    save_png(pictures.contact_sheet(to_uint8(images), classes, zoom=2), sheet)
    recorder.save(animation)
    if not quiet:
        console.print(stage_table(result.stages, len(labels)))
    console.print(f"{classes} classes, {samples} samples each: {sheet}", highlight=False, soft_wrap=True)
    console.print(f"the cascade, step by step:    {animation}", highlight=False, soft_wrap=True)


@app.command()
def doctor() -> None:
    """Show versions, devices, backends and bundled models, and the reason why something is unavailable."""
    import torch

    from . import backends
    from .checkpoint import bundled_models

    versions = Table("package", "version", title="versions")
    versions.add_row("python", platform.python_version())
    for name in ("pixelflow-engine", "torch", "triton", "numpy", "safetensors", "pillow", "flash-attn"):
        try:
            versions.add_row(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            versions.add_row(name, "not installed")
    devices = Table("device", "what it is", title="devices")
    devices.add_row("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        devices.add_row(f"cuda:{index}", f"{properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        devices.add_row("cuda", f"not available: torch is {built}, {torch.cuda.device_count()} devices found")
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    chosen = backends.choose("auto", where, dtype).name
    table = Table("backend", "available", "why", title=f"backends for {dtype} on {where} (auto takes {chosen})")
    for backend in backends.backends(where, dtype):
        table.add_row(backend.name, "yes" if backend.available else "no", backend.reason)
    for part in (versions, devices, table):
        console.print(part)
    console.print(f"bundled models: {', '.join(bundled_models()) or 'none'}")


@app.command("convert")
def convert_command(
    source: Annotated[Path, typer.Argument(help="A checkpoint in any form.")],
    destination: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[Literal["safetensors", "public"], typer.Option(help="Form to write.")] = "safetensors",
    weights: Annotated[Literal["auto", "ema", "model"], typer.Option(help="Of a training checkpoint.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the destination.")] = False,
    quiet: Quiet = False,
) -> None:
    """Convert a checkpoint between the published form and ours, without loss."""
    from .checkpoint import convert

    with contextlib.nullcontext() if quiet else console.status(f"converting {source}"):
        checkpoint = convert(source, destination, to=to, weights=weights, overwrite=overwrite)
    if quiet:
        return
    count = sum(tensor.numel() for tensor in checkpoint.state_dict.values())
    console.print(f"wrote {destination}: {count:,} parameters", highlight=False, soft_wrap=True)


class CascadeBar:
    """A progress bar over stages that advances with local time."""

    def __init__(self, total: int, disable: bool) -> None:
        form = "{l_bar}{bar}| {n:.1f}/{total} stages [{elapsed}<{remaining}]"
        # Not shown for runs of less than two seconds.
        self.bar = tqdm(total=total, disable=disable, delay=2, bar_format=form, leave=False)
        self.begun = 0

    def __enter__(self) -> CascadeBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def step(self, event: StepEvent) -> None:
        """Advance to the state of an event."""
        if event.step == 0:
            self.begun += 1
        self.bar.update(self.begun - 1 + event.tau - self.bar.n)


def stage_table(reports: tuple[StageReport, ...] | list[StageReport], images: int) -> Table:
    """A table with one row per stage."""
    table = Table("stage", "pixels", "tokens", "guidance", "steps", "evals", "seconds", "images/s")
    for column in table.columns:
        column.justify = "right"
    for r in reports:
        table.add_row(
            str(r.stage),
            f"{r.width} x {r.height}",
            str(r.tokens),
            f"{r.guidance_weight:.3g}",
            str(r.steps),
            str(r.evaluations),
            f"{r.seconds:.2f}",
            f"{images / r.seconds:.1f}",
        )
    return table


def merge(reports: tuple[StageReport, ...]) -> StageReport:
    """Merge a stage's reports from several batches: total evaluations and time, largest number of steps."""
    return replace(
        reports[0],
        steps=max(r.steps for r in reports),
        evaluations=sum(r.evaluations for r in reports),
        seconds=sum(r.seconds for r in reports),
    )


def _labels(model: ModelConfig, labels: list[int], per_label: int, images: int | None) -> list[int] | None:
    """Class of every image; None for a model without classes."""
    if model.num_classes > 0:
        if images is not None:
            raise ValueError(f"images: got {images}, expected none: a model with classes takes --class-label")
        if not labels:
            raise ValueError("class-label: got none, expected at least one")
        return [label for label in labels for _ in range(per_label)]
    if model.cross_attention_dim is not None:
        raise ValueError("model: got a text model, expected one without text: the command has no text encoder")
    if labels:
        raise ValueError(
            f"class-label: got {labels[0]}, expected none for a model without classes (--images says how many)"
        )
    if per_label != 1:
        raise ValueError(f"images-per-label: got {per_label}, expected none for a model without classes, but --images")
    return None


@contextlib.contextmanager
def _named_as_typed() -> Iterator[None]:
    """Name the option, not the engine's argument that an error is about."""
    try:
        yield
    except ValueError as error:
        argument, colon, said = str(error).partition(": ")
        name = argument.partition("[")[0]
        if not name.isidentifier():
            raise
        option = {"num_inference_steps": "steps", "class_labels": "class-label"}.get(name, name.replace("_", "-"))
        raise ValueError(f"{option}{colon}{said}") from error


def _numbers(name: str, value: str, kind: type[N], what: str) -> list[N]:
    try:
        return [kind(part) for part in value.split(",")]
    except ValueError:
        raise ValueError(f"{name}: got {value!r}, expected {what} separated by commas") from None


def _schedule(value: str) -> Literal["stagewise", "constant"] | list[float]:
    if value == "stagewise":
        return "stagewise"
    if value == "constant":
        return "constant"
    return _numbers("guidance-schedule", value, float, "stagewise, constant, or numbers")
