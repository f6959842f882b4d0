"""Times of calls on a device, measured side by side, with cold caches on a GPU.

On a GPU each variant is captured as a CUDA graph of several calls, each preceded by a read of more than the L2 cache
holds. A second graph holds the reads alone. The difference of the two times is that of the calls, without the host's
launch overhead and without the cost of an event; two events around a single short kernel would measure the launch.
Before the first event the device is given work, so that it does not wait for a launch between the events. The cache is
flushed by reads because they leave clean lines: freshly written zeros would be written back during the measured kernel.
Variants take turns, so that a drop of the clock affects all of them alike.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from pixelflow_engine.errors import CaptureError
from pixelflow_engine.graphs import CudaCapture

T = TypeVar("T")
Call = Callable[[], object]

REPEATS = 20
"""Default number of measurements of each call."""

TURNS_SECONDS = 60.0
"""Seconds after which no further turn of long runs is begun, see :func:`end_of_turns`."""

TURNS_SHARE = 1 / 6
"""Share of the time that is left to a command which the turns of one case may take."""

UNROLL = 10
"""Number of calls in one graph."""

RESOLUTION = 0.5e-6
"""Resolution of CUDA events in seconds: a shorter replay cannot be told from nothing."""


LACKS_MEMORY = ("MemoryError", "out of memory", "not enough memory", "allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Words of errors that are a lack of memory: Python's, a GPU's allocator's, a CPU's two, cuBLAS's."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call, measured several times.

    Attributes:
        turns: in the order of measurement; entries with the same index in timings measured together are of one turn.
        captured: whether the calls were replayed from a CUDA graph; if not, the figure includes the host's time.
    """

    turns: tuple[float, ...]
    captured: bool = False

    @property
    def median(self) -> float:
        """Median over the turns."""
        return statistics.median(self.turns)

    def spread(self) -> dict[str, float]:
        """Return the spread that is written to a result file, see :func:`spread`."""
        return spread(self.turns)

    def times_faster_than(self, other: Timing) -> dict[str, float]:
        """Return the spread of the other's time over this one's, turn by turn: load on the machine hits both."""
        return spread([b / a for a, b in zip(self.turns, other.turns, strict=False)])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return ``median``, ``low`` and ``high`` (the 20th and 80th percentile) and ``repeats``, the number of values."""
    low, median, high = np.percentile(values, (20, 50, 80)).tolist()
    return {"median": median, "low": low, "high": high, "repeats": len(values)}


def time_calls(
    variants: Mapping[str, Call],
    device: torch.device,
    repeats: int = REPEATS,
    failed: dict[str, str] | None = None,
) -> dict[str, Timing]:
    """Time short calls on ``device``.

    Args:
        variants: calls by name, each already known to be correct; every one is called several times.
        device: a CUDA device; or a CPU, where calls are timed one by one with warm caches.
        repeats: number of measurements of each call; at least 3.
        failed: receives, by name, the first line of the error of each call that raises; such a call has no timing, and
            the others are timed nevertheless. Without it the error is raised.

    Returns:
        Timings by name.

    Raises:
        ValueError: fewer than 3 repeats.
    """
    if repeats < 3:
        raise ValueError(f"repeats: got {repeats}, expected at least 3")
    if device.type != "cuda":
        return _time_on_host(variants, repeats, failed)
    with torch.cuda.device(device):
        return _time_on_gpu(variants, device, repeats, failed)


@dataclass(slots=True)
class Runs:
    """Result of timing long runs in turns.

    Attributes:
        timings: by name.
        failed: first line of the error of each variant that raised, by name; these have no timing.
    """

    timings: dict[str, Timing] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def time_runs(
    variants: Mapping[str, Call], device: torch.device, repeats: int = REPEATS, deadline: float = math.inf
) -> Runs:
    """Time runs that are long compared with a launch: wall time, the device idle before and after each.

    Args:
        variants: runs by name, each already known to be correct, and warm.
        device: where they run.
        repeats: number of turns; in each turn every variant runs once.
        deadline: ``time.perf_counter()`` after which no further turn is begun; the first turn always runs.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    failed: dict[str, str] = {}
    for turn in range(repeats):
        if turn > 0 and time.perf_counter() > deadline:
            break
        for name in list(seconds):
            try:
                seconds[name].append(seconds_of(variants[name], device)[0])
            except Exception as error:  # the other variants are measured nevertheless
                failed[name] = first_line(error)
                del seconds[name]
    return Runs({name: Timing(tuple(values)) for name, values in seconds.items()}, failed)


def end_of_turns(deadline: float) -> float:
    """Return the deadline for turns that begin now: in a minute, and a share of what is left to the whole command."""
    now = time.perf_counter()
    return now + min(TURNS_SECONDS, TURNS_SHARE * (deadline - now))


def seconds_of(run: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Return the wall time in seconds of one run, and what it returned."""
    wait_for(device)
    began = time.perf_counter()
    found = run()
    wait_for(device)
    return time.perf_counter() - began, found


def graphs_compiled() -> int:
    """Return how many graphs torch.compile has compiled so far in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def wait_for(device: torch.device) -> None:
    """Block until a GPU has finished its work; a no-op on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def first_line(error: BaseException) -> str:
    """Return the type and the first line of an error, short enough for a table."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


@contextlib.contextmanager
def _noted(name: str, timed: dict[str, Call], failed: dict[str, str] | None) -> Iterator[None]:
    """Note the error of a call and leave the call out from now on; with nowhere to note it, the error is raised."""
    try:
        yield
    except Exception as error:
        if failed is None:
            raise
        failed[name] = first_line(error)
        timed.pop(name, None)


def lacks_memory(said: str) -> bool:
    """Return whether an error, as told by :func:`first_line`, is a lack of memory."""
    return any(words in said for words in LACKS_MEMORY)


def _time_on_host(variants: Mapping[str, Call], repeats: int, failed: dict[str, str] | None) -> dict[str, Timing]:
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    timed = dict(variants)
    for turn in range(-1, repeats):  # the first warms up
        for name, call in list(timed.items()):
            with _noted(name, timed, failed):
                began = time.perf_counter()
                call()
                if turn >= 0:
                    seconds[name].append(time.perf_counter() - began)
    return {name: Timing(tuple(seconds[name])) for name in timed}


def _time_on_gpu(
    variants: Mapping[str, Call], device: torch.device, repeats: int, failed: dict[str, str] | None
) -> dict[str, Timing]:
    flush = make_flush(device)
    capture = CudaCapture(device)
    idle = capture.capture(_unrolled(lambda: None, flush))
    replays: dict[str, Call] = {}  # each replay keeps its graph alive, and the graph its memory
    captured = dict.fromkeys(variants, True)
    for name, call in variants.items():
        with _noted(name, replays, failed):
            try:
                replays[name] = capture.capture(_unrolled(call, flush))
            except (CaptureError, torch.OutOfMemoryError):  # the call waits for the device, or a graph lacks memory
                torch.cuda.synchronize(device)
                replays[name], captured[name] = _unrolled(call, flush), False
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(-2, repeats):  # the first two warm up
        alone = _elapsed(idle, ahead=idle)
        for name, replay in list(replays.items()):
            with _noted(name, replays, failed):
                value = (_elapsed(replay, ahead=idle) - alone) / UNROLL
                if turn >= 0:
                    seconds[name].append(max(value, RESOLUTION / UNROLL))
    capture.close()
    return {name: Timing(tuple(seconds[name]), captured[name]) for name in replays}


def make_flush(device: torch.device) -> Call:
    """Return a call that reads more than the L2 cache of a CUDA device holds."""
    properties = torch.cuda.get_device_properties(device)
    values = max(2 * properties.L2_cache_size, 64 * 2**20) // 4
    buffer, largest = torch.zeros(values, device=device), torch.zeros((), device=device)

    def flush() -> Tensor:
        return torch.amax(buffer, dim=0, out=largest)

    return flush


def _unrolled(call: Call, flush: Call) -> Callable[[], None]:
    def run() -> None:
        for _ in range(UNROLL):
            flush()
            call()

    return run


def _elapsed(replay: Call, ahead: Call) -> float:
    """Return the seconds between two events around a replay.

    Args:
        replay: what is measured.
        ahead: keeps the device busy while both events and the replay are launched. On an idle device the first event
            would pass at once, and the time would include the host's launch of the rest.
    """
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    ahead()
    began.record()
    replay()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1000
