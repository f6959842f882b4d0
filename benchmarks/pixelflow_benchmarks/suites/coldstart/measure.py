"""Cold starts in interleaved rounds: in each round every variant runs once, in a new process."""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixelflow_benchmarks.harness.results import Record
from pixelflow_benchmarks.harness.timing import spread

from .job import ChildError, Job, cold_start, run_process, seconds_of_process
from .variants import COMMAND, EMPTY, Variant

COMMANDS = {
    "pixelflow --help": (["-c", "from pixelflow_engine.cli import main; main()", "--help"], "generate"),
    'python -c "import pixelflow_engine"': (["-c", "import pixelflow_engine"], ""),
}
"""Commands that are timed as well: arguments of the Python interpreter, and a text that the output must contain."""

TOTAL = "until the first image"

Start = Callable[[Job, Path], dict[str, Any]]
Check = Callable[[str, Tensor], str | None]


class Starts:
    """Results of one variant so far.

    Attributes:
        seconds: by phase, one value per round.
        more: the other values that the last process reported.
        fault: why the variant is not started again; None while nothing is wrong.
    """

    def __init__(self, variant: str) -> None:
        self.variant = variant
        self.seconds: dict[str, list[float]] = {}
        self.more: dict[str, Any] = {}
        self.fault: str | None = None
        self._image: Tensor | None = None

    def note(self, seconds: dict[str, float]) -> None:
        """Add the seconds of one round."""
        for phase, value in seconds.items():
            self.seconds.setdefault(phase, []).append(value)

    def wrong(self, first: Tensor, second: Tensor, check: Check) -> str | None:
        """Return what is wrong with a process's two images, or None; all images of a variant must be bitwise equal."""
        if self._image is None:
            if found := check(self.variant, first):
                return found
            self._image = first
        for name, image in (("first", first), ("second", second)):
            if not torch.equal(image, self._image):
                differ = int((image != self._image).sum())
                return f"{differ} of {image.numel()} values of the {name} image differ from the first process's"
        return None

    def records(self) -> Iterator[Record]:
        """Yield a measurement for each phase, or a single one with the fault if something was wrong."""
        head = {"kind": "measurement", "variant": self.variant}
        if self.fault is not None:
            yield {**head, "case": TOTAL, "right": False, "fault": self.fault}
            return
        for phase, values in self.seconds.items():
            record = {**head, "case": phase, "right": True, "per": "process", "seconds": spread(values)}
            yield record | (self.more if phase == "first image" else {})


def measure_cold_starts(
    variants: Sequence[Variant],
    job: Callable[[Variant, Path], Job],
    check: Check,
    folder: Path,
    repeats: int,
    *,
    commands: bool = True,
    deadline: float = math.inf,
    start: Start = cold_start,
) -> Iterator[Record]:
    """Start every variant once in each round.

    Args:
        variants: variants, ordered by :func:`~.variants.in_order`.
        job: makes the job of a variant that writes its images to the given file.
        check: returns what is wrong with a variant's image, or None.
        folder: folder for temporary files.
        repeats: number of rounds.
        commands: whether :data:`COMMANDS` are timed too.
        deadline: time after which no process but the first is started, on the clock of ``time.perf_counter``.
        start: runs a job.

    Yields:
        A ``measurement`` of each variant and phase, in seconds per process; ``absent`` for a variant with a filled
        cache if the variant that fills it failed.
    """
    found = {variant.name: Starts(variant.name) for variant in variants}
    plain = Starts(COMMAND)
    for turn in range(repeats):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            for number, variant in enumerate(variants):
                if (turn, number) > (0, 0) and time.perf_counter() > deadline:
                    break
                filler = found.get(variant.engine + EMPTY)
                if found[variant.name].fault is None and (filler is None or filler.fault is None):
                    _turn(variant, found[variant.name], job, check, Path(place), start)
        if time.perf_counter() > deadline:
            break
        if commands and plain.fault is None:
            _commands(plain)
    for variant in variants:
        starts, filler = found[variant.name], found.get(variant.engine + EMPTY)
        if variant.cache == "filled" and filler is not None and filler.fault is not None:
            yield {"kind": "absent", "variant": variant.name, "reason": f"no cache was filled: {filler.fault}"}
        else:
            yield from starts.records()
    if commands:
        yield from plain.records()


def read_files_once() -> None:
    """Import torch, the engine and the compilers once in an untimed process, so that their files are in the page cache.

    The engine is named, because its package is lazy; Inductor imports Triton where it is installed.
    """
    program = "from pixelflow_engine import PixelFlowEngine; import torch._inductor.compile_fx"
    run_process([sys.executable, "-c", program], {})


def _turn(
    variant: Variant, starts: Starts, job: Callable[[Variant, Path], Job], check: Check, place: Path, start: Start
) -> None:
    images = place / "images.pt"
    try:
        answer = start(job(variant, images), place / variant.engine.replace(", ", "-"))
        first, second = torch.load(images, weights_only=True)
        starts.fault = starts.wrong(first, second, check)
    except ChildError as error:
        starts.fault = str(error)
        return
    finally:
        images.unlink(missing_ok=True)
    starts.note(answer["seconds"])
    starts.more = {key: value for key, value in answer.items() if key != "seconds"}


def _commands(plain: Starts) -> None:
    for name, (arguments, expected) in COMMANDS.items():
        try:
            plain.note({name: seconds_of_process([sys.executable, *arguments], expected)})
        except ChildError as error:
            plain.fault = f"{name}: {error}"
            return
