"""How long calls take on a device, side by side, with cold caches.

On a GPU each variant is captured: a CUDA graph of several calls, each after a read of more than the L2 cache holds, and
beside it a graph of the reads alone. Their difference is the time of the calls without the host's share and without
what an event costs; a short kernel timed by two events around it would show the launch instead. Before the first event
the device has work, so that it waits for no launch between both. The reads leave clean lines behind: a cache full of
zeros just written would be written back on the measured kernel's time. Variants take turns, so that a clock that sags
hits all of them alike.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
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
"""Measurements of each call, unless less time is given."""

TURNS_SECONDS = 60.0
"""After which no further turn of long runs is begun, see :func:`end_of_turns`."""

UNROLL = 10
"""Calls in one graph."""

RESOLUTION = 0.5e-6
"""Seconds that an event of CUDA tells apart: of a replay, less is not told from nothing."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call, measured several times.

    Attributes:
        turns: in the order of measuring; a place among them is the same turn for all that were measured together.
        captured: the calls were replayed from a CUDA graph; otherwise the host's time is part of the figure.
    """

    turns: tuple[float, ...]
    captured: bool = False

    @property
    def median(self) -> float:
        """Of the turns."""
        return statistics.median(self.turns)

    def spread(self) -> dict[str, float]:
        """As a result file has it, see :func:`spread`."""
        return spread(self.turns)

    def times_faster_than(self, other: Timing) -> dict[str, float]:
        """The other's time over this one's, turn by turn: a machine that others use disturbs both alike."""
        return spread([b / a for a, b in zip(self.turns, other.turns, strict=False)])


def spread(values: Sequence[float]) -> dict[str, float]:
    """``median``, ``low`` and ``high`` (a fifth of the values lies below, a fifth above), ``repeats``."""
    low, median, high = np.percentile(values, (20, 50, 80)).tolist()
    return {"median": median, "low": low, "high": high, "repeats": len(values)}


def time_calls(variants: Mapping[str, Call], device: torch.device, repeats: int = REPEATS) -> dict[str, Timing]:
    """Time short calls on ``device``.

    Args:
        variants: calls by name, each already correct; they are called several times.
        device: CUDA, or a CPU, where calls are timed one by one with warm caches.
        repeats: measurements of each; at least 3.

    Raises:
        ValueError: fewer than 3 repeats.
    """
    if repeats < 3:
        raise ValueError(f"repeats: got {repeats}, expected at least 3")
    if device.type != "cuda":
        return _time_on_host(variants, repeats)
    with torch.cuda.device(device):
        return _time_on_gpu(variants, device, repeats)


@dataclass(slots=True)
class Runs:
    """Long runs that were timed in turns.

    Attributes:
        timings: by name.
        failed: who raised meanwhile, and what.
    """

    timings: dict[str, Timing] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def time_runs(
    variants: Mapping[str, Call], device: torch.device, repeats: int = REPEATS, deadline: float = math.inf
) -> Runs:
    """Time runs that take long beside a launch: wall time, the device idle before and after each.

    Args:
        variants: runs by name, each already correct and warm.
        device: where they run.
        repeats: turns; in each every variant runs once.
        deadline: after which no turn is begun, on the clock of ``time.perf_counter``; there is one turn at least.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    failed: dict[str, str] = {}
    for turn in range(repeats):
        if turn > 0 and time.perf_counter() > deadline:
            break
        for name in list(seconds):
            try:
                seconds[name].append(seconds_of(variants[name], device)[0])
            except Exception as error:  # the others are measured all the same
                failed[name] = first_line(error)
                del seconds[name]
    return Runs({name: Timing(tuple(values)) for name, values in seconds.items()}, failed)


def end_of_turns(deadline: float) -> float:
    """Until when turns are begun that begin now: a minute, and no longer than to the deadline of the whole."""
    return min(deadline, time.perf_counter() + TURNS_SECONDS)


def seconds_of(run: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Wall time of one run, and what it returns."""
    wait_for(device)
    began = time.perf_counter()
    found = run()
    wait_for(device)
    return time.perf_counter() - began, found


def graphs_compiled() -> int:
    """How many graphs torch.compile has made so far in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def wait_for(device: torch.device) -> None:
    """Until a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a table."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


def _time_on_host(variants: Mapping[str, Call], repeats: int) -> dict[str, Timing]:
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        call()
    for _ in range(repeats):
        for name, call in variants.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _time_on_gpu(variants: Mapping[str, Call], device: torch.device, repeats: int) -> dict[str, Timing]:
    flush = make_flush(device)
    capture = CudaCapture(device)
    idle = capture.capture(_unrolled(lambda: None, flush))
    replays: dict[str, Call] = {}  # they keep their graphs, and graphs their memory
    captured = dict.fromkeys(variants, True)
    for name, call in variants.items():
        try:
            replays[name] = capture.capture(_unrolled(call, flush))
        except CaptureError:  # a call that waits for the device cannot be captured
            torch.cuda.synchronize(device)
            replays[name], captured[name] = _unrolled(call, flush), False
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(-2, repeats):  # the first two warm up
        alone = _elapsed(idle, ahead=idle)
        for name, replay in replays.items():
            value = (_elapsed(replay, ahead=idle) - alone) / UNROLL
            if turn >= 0:
                seconds[name].append(max(value, RESOLUTION / UNROLL))
    capture.close()
    return {name: Timing(tuple(values), captured[name]) for name, values in seconds.items()}


def make_flush(device: torch.device) -> Call:
    """A call that reads more than the L2 cache of a CUDA device holds."""
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
    """Seconds between two events around a replay.

    Args:
        replay: what is launched.
        ahead: keeps the device busy while both events and the replay are launched: on an idle device the first event
            passes at once, and the time would be that until the host has launched the rest.
    """
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    ahead()
    began.record()
    replay()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1000
