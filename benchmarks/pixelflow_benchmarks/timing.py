"""How long calls take on a device, side by side, with cold caches.

On a GPU each variant is captured: a CUDA graph of several calls, each after a read of more than the L2 cache holds, and
beside it a graph of the reads alone. Their difference is the time of the calls without the host's share and without
what an event costs; a short kernel timed by two events around it would show the launch instead. The reads leave clean
lines behind: a cache full of zeros just written would be written back on the measured kernel's time. Variants take
turns, so that a clock that sags hits all of them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Call = Callable[[], object]

UNROLL = 10
"""Calls in one graph."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call.

    Attributes:
        median, low, high: over the rounds; low and high are the quartiles.
        rounds: how often it was measured.
        captured: the calls were replayed from a CUDA graph; otherwise the host's time is part of the figure.
    """

    median: float
    low: float
    high: float
    rounds: int
    captured: bool


def time_calls(variants: Mapping[str, Call], device: torch.device, rounds: int = 15) -> dict[str, Timing]:
    """Time every variant on ``device``.

    Args:
        variants: calls by name, each already correct; they are called several times.
        device: CUDA, or a CPU, where calls are timed one by one with warm caches.
        rounds: measurements of each; at least 3.

    Raises:
        ValueError: fewer than 3 rounds.
    """
    if rounds < 3:
        raise ValueError(f"rounds: got {rounds}, expected at least 3")
    if device.type != "cuda":
        return _time_on_host(variants, rounds)
    with torch.cuda.device(device):
        return _time_on_gpu(variants, device, rounds)


def _time_on_host(variants: Mapping[str, Call], rounds: int) -> dict[str, Timing]:
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        call()
    for _ in range(rounds):
        for name, call in variants.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return {name: summary(values, captured=False) for name, values in seconds.items()}


def _time_on_gpu(variants: Mapping[str, Call], device: torch.device, rounds: int) -> dict[str, Timing]:
    flush = make_flush(device)
    idle = _capture(lambda: None, flush, UNROLL)
    replays: dict[str, Call] = {}
    graphs = [idle]  # kept: a graph's memory lives as long as it does
    for name, call in variants.items():
        try:
            graph = _capture(call, flush, UNROLL)
        except RuntimeError:  # a call that waits for the device cannot be captured
            torch.cuda.synchronize(device)
            replays[name] = _eagerly(call, flush, UNROLL)
        else:
            graphs.append(graph)
            replays[name] = graph.replay
    captured = {name: getattr(replay, "__self__", None) in graphs for name, replay in replays.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(-2, rounds):  # the first two warm up
        alone = _elapsed(idle.replay)
        for name, replay in replays.items():
            value = (_elapsed(replay) - alone) / UNROLL
            if round_ >= 0:
                seconds[name].append(value)
    return {name: summary(values, captured[name]) for name, values in seconds.items()}


def make_flush(device: torch.device) -> Call:
    """A call that reads more than the L2 cache of a CUDA device holds."""
    properties = torch.cuda.get_device_properties(device)
    values = max(2 * properties.L2_cache_size, 64 * 2**20) // 4
    buffer, largest = torch.zeros(values, device=device), torch.zeros((), device=device)

    def flush() -> Tensor:
        return torch.amax(buffer, dim=0, out=largest)

    return flush


def _capture(call: Call, flush: Call, unroll: int) -> torch.cuda.CUDAGraph:
    """A graph of ``unroll`` times flush and call; first both run outside of it, so that all is compiled and loaded."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            flush()
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(unroll):
            flush()
            call()
    return graph


def _eagerly(call: Call, flush: Call, unroll: int) -> Call:
    def run() -> None:
        for _ in range(unroll):
            flush()
            call()

    return run


def _elapsed(replay: Call) -> float:
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began.record()
    replay()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1000


def summary(seconds: list[float], captured: bool) -> Timing:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(seconds, n=4)
    return Timing(median, low, high, len(seconds), captured)
