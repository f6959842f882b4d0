"""A GPU that is two clocks, the host's and the device's: what launches, events and graphs cost where there is none.

It has the rules that time on a GPU obeys: a launch costs the host time and is done by the device in its order, never
before it was launched; an event passes when what was launched before it is done; whoever waits, waits for the device; a
graph is launched at once, which takes the host the longer the more is in it; nothing may wait while one is captured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

LAUNCH = 5e-6
"""Seconds of the host for a kernel or an event."""
GRAPH, NODE = 20e-6, 2e-6
"""Seconds of the host for a graph, and for each kernel in it."""


@dataclass
class FakeGpu:
    """Both clocks, in seconds.

    Attributes:
        host, device: now, and when all that was launched is done.
        cold: the cache was flushed since the last kernel.
        kept: kernels of the graph that is being captured.
        broken: whether something that may not be captured has ended that capture.
        pools: that graphs were given, one each.
        ended: pools of failed captures that the allocator was told of; that of pinned memory cannot be told.
        current: the streams that were made current, the last of which is.
    """

    host: float = 0.0
    device: float = 0.0
    cold: bool = False
    kept: list[Callable[[], float]] | None = None
    broken: bool = False
    pools: list[object] = field(default_factory=list)
    ended: list[object] = field(default_factory=list)
    current: list[object] = field(default_factory=list)

    def launch(self, seconds: Callable[[], float]) -> None:
        """A kernel of that duration, which is asked for when it begins."""
        if self.kept is not None:
            self.kept.append(seconds)
            return
        self.host += LAUNCH
        self.device = max(self.device, self.host) + seconds()

    def kernel(self, cold: float, warm: float) -> None:
        """A kernel that is faster where the cache holds what it reads."""

        def seconds() -> float:
            found, self.cold = (cold if self.cold else warm), False
            return found

        self.launch(seconds)

    def flush(self, seconds: float = 40e-6) -> None:
        """A read of more than the cache holds."""

        def flushed() -> float:
            self.cold = True
            return seconds

        self.launch(flushed)

    def wait(self, device: object = None) -> None:
        """Until the device is done."""
        if self.kept is not None:
            self.broken = True
            raise RuntimeError("operation not permitted when stream is capturing")
        self.host = max(self.host, self.device)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put it in the place of ``torch.cuda``, as far as events and graphs go."""
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing
                self.at: float | None = None

            def record(self, stream: object = None) -> None:
                gpu.host += LAUNCH
                self.at = max(gpu.host, gpu.device)

            def synchronize(self) -> None:
                assert self.at is not None
                gpu.host = max(gpu.host, self.at)

            def elapsed_time(self, other: Event) -> float:
                assert self.at is not None
                assert other.at is not None
                assert gpu.host >= other.at, "an event that has not passed has no time"
                return (other.at - self.at) * 1000

        class Graph:
            def __init__(self) -> None:
                self.kernels: list[Callable[[], float]] | None = None

            def replay(self) -> None:
                assert self.kernels is not None, "a graph that was reset, or never captured"
                gpu.host += GRAPH + NODE * len(self.kernels)
                gpu.device = max(gpu.device, gpu.host)
                for seconds in self.kernels:
                    gpu.device += seconds()

            def reset(self) -> None:
                self.kernels = None

        @contextlib.contextmanager
        def graph(made: Graph, pool: object, stream: object, capture_error_mode: str) -> Iterator[None]:
            assert current[-1] is not stream, "a capture has a stream of its own"
            assert capture_error_mode == "thread_local", "other threads may use the device meanwhile"
            gpu.wait()
            if pool in recording:
                raise RuntimeError("already recording to this pool of pinned memory")
            gpu.pools.append(pool)
            gpu.kept, gpu.broken = [], False
            current.append(stream)
            try:
                yield
            finally:
                kernels, gpu.kept = gpu.kept, None
                if gpu.broken:  # the stream stays current, and pinned memory goes on being recorded
                    recording.append(pool)
                    raise RuntimeError("operation failed due to a previous error during capture")
                made.kernels = kernels
                current.pop()

        class Stream:
            def wait_stream(self, other: object) -> None:
                return None

        current, recording = self.current, list[object]()
        current.append(Stream())

        @contextlib.contextmanager
        def use(stream: object) -> Iterator[None]:
            before = len(current)
            current.append(stream)
            try:
                yield
            finally:
                del current[before:]

        handles = iter(range(1000))
        named: dict[str, Any] = {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": graph,
            "Stream": Stream,
            "stream": use,
            "current_stream": lambda device=None: current[-1],
            "synchronize": self.wait,
            "device": lambda device: contextlib.nullcontext(),
            "current_device": lambda: 0,
            "graph_pool_handle": lambda: (0, next(handles)),
        }
        for name, value in named.items():
            monkeypatch.setattr(torch.cuda, name, value)
        told = lambda device, pool: self.ended.append(pool)  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", told, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: None, raising=False)
