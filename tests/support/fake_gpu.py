"""A GPU simulated by two clocks, the host's and the device's: the time that launches, events and graphs take.

It follows the rules of time on a GPU: a launch costs host time, and the device executes launches in order, never before
they were launched; an event completes when everything launched before it is done; a wait lasts until the device is
done; a graph is launched at once, which takes host time that grows with its size; nothing may wait during a capture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

LAUNCH = 5e-6
"""Host seconds for launching a kernel or an event."""
GRAPH, NODE = 20e-6, 2e-6
"""Host seconds for launching a graph, and for each kernel in it."""


@dataclass
class FakeGpu:
    """Both clocks, in seconds.

    Attributes:
        host, device: the host's time now, and the time when the device has finished everything launched.
        cold: whether the cache was flushed since the last kernel.
        kept: kernels of the graph being captured; None outside a capture.
        broken: whether an operation that is not permitted has invalidated the capture.
        pools: memory pools of the captures, one each.
        ended: pools of failed captures that were reported to the device allocator; the allocator of pinned memory has
            no such call.
        current: stack of the streams made current; the last one is current.
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
        """Launch a kernel; ``seconds`` is called when it begins and returns its duration."""
        if self.kept is not None:
            self.kept.append(seconds)
            return
        self.host += LAUNCH
        self.device = max(self.device, self.host) + seconds()

    def kernel(self, cold: float, warm: float) -> None:
        """Launch a kernel that is faster if the cache holds its inputs."""

        def seconds() -> float:
            found, self.cold = (cold if self.cold else warm), False
            return found

        self.launch(seconds)

    def flush(self, seconds: float = 40e-6) -> None:
        """Launch a read of more than the cache holds."""

        def flushed() -> float:
            self.cold = True
            return seconds

        self.launch(flushed)

    def wait(self, device: object = None) -> None:
        """Wait until the device is done."""
        if self.kept is not None:
            self.broken = True
            raise RuntimeError("operation not permitted when stream is capturing")
        self.host = max(self.host, self.device)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Replace the parts of ``torch.cuda`` that concern events, streams and graphs."""
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
                if gpu.broken:  # the stream stays current, and pinned memory remains in recording
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
