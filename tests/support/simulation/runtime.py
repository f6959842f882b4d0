"""The simulated device's runtime, as ``torch.cuda`` shows it: streams, events, graphs, memory, and what waits.

Everything is done at once, in the order in which it is submitted, so streams and events have nothing to order.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from support.recording import RefusedError, _Graph, _Outside, _Record
from support.waits import waits

from .residents import Storages

TOTAL = 80 << 30
NAME = "simulated device"
HostGenerator = torch.Generator


class SimulatedGenerator(HostGenerator):
    """A generator of the device."""

    def __new__(cls, device: Any = "cuda") -> SimulatedGenerator:
        return super().__new__(cls, "cpu")

    device = torch.device("cuda", 0)


class _GeneratorType(type):
    """Makes generators of both devices under the name ``torch.Generator``."""

    def __call__(cls, device: Any = "cpu") -> HostGenerator:
        return SimulatedGenerator() if torch.device(device).type == "cuda" else HostGenerator(device)

    def __instancecheck__(cls, x: object) -> bool:
        return isinstance(x, HostGenerator)


class Generator(metaclass=_GeneratorType):
    """Stands for ``torch.Generator``."""


class Autocast(torch.autocast):
    """Of the device, whose operations are the CPU's."""

    def __init__(self, device_type: str, *arguments: Any, **options: Any) -> None:
        super().__init__("cpu", *arguments, **options)


class Stream:
    """A stream; whatever is submitted to it is done already."""

    runtime: ClassVar[Runtime]
    cuda_stream = 0
    device = torch.device("cuda", 0)

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        """Nothing is left to wait for."""
        assert isinstance(other, Stream)

    def wait_event(self, event: Event) -> None:
        """Nothing is left to wait for."""
        assert event.at is not None, "an event that was never recorded"

    def synchronize(self) -> None:
        """Nothing is left to wait for."""
        self.runtime.wait("synchronize")

    def query(self) -> bool:
        """Everything is done."""
        self.runtime.refuse("query")
        return True


class Event:
    """An event, which has passed once it is recorded.

    The mode for errors does not know of events, but nobody may ask for one while a graph is captured.
    """

    runtime: ClassVar[Runtime]

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.timing, self.at = enable_timing, None

    def record(self, stream: Stream | None = None) -> None:
        """Take the time."""
        self.at: float | None = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing is left to wait for."""
        self.runtime.refuse("an event's synchronize")

    def wait(self, stream: Stream | None = None) -> None:
        """Nothing is left to wait for."""

    def query(self) -> bool:
        """It has passed."""
        self.runtime.refuse("an event's query")
        return True

    def elapsed_time(self, other: Event) -> float:
        """Milliseconds between two events that take the time."""
        assert self.timing
        assert other.timing
        assert self.at is not None
        assert other.at is not None
        self.runtime.refuse("an event's elapsed_time")
        return max(1000 * (other.at - self.at), 1e-3)


class _Capturing(_Record):
    """Records, and remembers what memory held that is not the graph's, since a capture executes nothing."""

    def __init__(self, device: Storages) -> None:
        super().__init__()
        self.device = device
        self.before: list[tuple[Tensor, Tensor]] = []
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if waits(func, args, kwargs or {}, self.device.__contains__) is not None:
            return func(*args, **(kwargs or {}))  # refused there, if it is a tensor of the device
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[i] if i < len(args) else (kwargs or {}).get(argument.name)
                for x in value if isinstance(value, (list, tuple)) else [value]:
                    if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self._seen:
                        self._seen.add(x.untyped_storage()._cdata)
                        whole = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
                        self.before.append((whole, whole.clone()))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def refuse(self, func: Any, args: Any, kwargs: Any) -> None:
        """Nothing: whoever runs the operation knows where its tensors are."""

    def restore(self) -> None:
        """Undo what the recorded operations did to that memory."""
        for whole, before in self.before:
            whole.copy_(before)


class _Recorded(_Graph):
    """A graph whose results remain until it is replayed again, as they do while no other graph shares their memory."""

    captured = False

    def _poison(self) -> None:
        if not self.captured:
            super()._poison()


class CUDAGraph:
    """A graph of recorded operations."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.recorded: _Recorded | None = None
        self.runtime: Runtime | None = None

    def replay(self) -> None:
        """Repeat the operations, of which none waits."""
        assert self.recorded is not None, "a graph that was reset, or never captured"
        assert self.runtime is not None
        mode, self.runtime.sync_debug_mode = self.runtime.sync_debug_mode, "default"
        try:
            self.recorded.replay()
        finally:
            self.runtime.sync_debug_mode = mode

    def reset(self) -> None:
        """Give up what it owns."""
        self.recorded = None


class Runtime:
    """What the doubles of ``torch.cuda`` share.

    Attributes:
        device: storages on the device.
        sync_debug_mode: whether waiting is an error: ``default`` or ``error``.
        streams: stack of the streams made current.
        capturing: whether a graph is being captured.
        limit: bytes that may be allocated.
    """

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.device = Storages()
        self.sync_debug_mode = "default"
        self.Stream, self.Event = (type(of.__name__, (of,), {"runtime": self}) for of in (Stream, Event))
        self.streams = [self.Stream()]
        self.capturing = False
        self.limit: float | None = None

    def reset(self) -> None:
        """Settings as in a new process, whatever a test has left."""
        self.sync_debug_mode, self.limit, self.streams = "default", None, self.streams[:1]

    def allocate(self, x: Tensor) -> None:
        """Move a tensor's storage to the device."""
        if self.limit is not None and self.device.bytes() + x.untyped_storage().nbytes() > self.limit:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {x.untyped_storage().nbytes()} bytes")
        self.device.add(x)

    def refuse(self, what: str) -> None:
        """Something is done that is an error while a graph is captured."""
        if self.capturing:
            raise RefusedError(f"operation not permitted when stream is capturing: {what}")

    def wait(self, what: str) -> None:
        """Something waits for the device."""
        self.refuse(what)
        if self.sync_debug_mode == "error":
            raise RuntimeError(f"called a synchronizing CUDA operation: {what}")

    def synchronize(self, device: Any = None) -> None:
        """``torch.cuda.synchronize``, of which the mode for errors does not know."""
        self.refuse("synchronize")

    @contextlib.contextmanager
    def stream(self, stream: Stream | None) -> Iterator[None]:
        """``torch.cuda.stream``."""
        before = list(self.streams)
        self.streams.append(stream or self.streams[-1])
        try:
            yield
        finally:
            self.streams[:] = before

    @contextlib.contextmanager
    def graph(
        self, graph: CUDAGraph, pool: Any = None, stream: Stream | None = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        """``torch.cuda.graph``."""
        assert not self.capturing, "a capture within a capture"
        record = _Capturing(self.device)
        self.streams.append(stream or self.Stream())
        self.capturing = True
        try:
            with record:
                yield
        finally:
            self.capturing = False
            self.streams.pop()
            with _disable_current_modes():
                record.restore()
        assert record.nodes, "an empty graph is warned of"
        with _disable_current_modes():
            graph.recorded = _Recorded(record, [slot.tensor() for slot in record.slots if isinstance(slot, _Outside)])
        graph.recorded.captured, graph.runtime = True, self

    def doubles(self) -> dict[str, Any]:
        """What stands for the names of ``torch.cuda``."""
        handles = itertools.count()
        properties = SimpleNamespace(
            name=NAME, major=self.arch // 10, minor=self.arch % 10, total_memory=TOTAL, multi_processor_count=132,
            L2_cache_size=50 << 20, shared_memory_per_block_optin=227 << 10, uuid="",
        )  # fmt: skip

        def nothing(*arguments: Any, **options: Any) -> None:
            return None

        def mode(name: str) -> None:
            self.sync_debug_mode = name

        def fraction(part: float, device: Any = None) -> None:
            self.limit = None if part >= 1 else part * TOTAL

        def allocated(device: Any = None) -> int:
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                return self.device.bytes()

        no_context: Callable[..., Any] = lambda *_: contextlib.nullcontext()  # noqa: E731
        return {
            "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
            "is_initialized": lambda: True, "_lazy_init": nothing, "set_device": nothing,
            "get_device_capability": lambda device=None: divmod(self.arch, 10),
            "get_device_properties": lambda device=None: properties, "get_device_name": lambda device=None: NAME,
            "device": no_context, "device_of": no_context,
            "Stream": self.Stream, "Event": self.Event, "stream": self.stream, "synchronize": self.synchronize,
            "current_stream": lambda device=None: self.streams[-1],
            "default_stream": lambda device=None: self.streams[0],
            "CUDAGraph": CUDAGraph, "graph": self.graph, "graph_pool_handle": lambda: (0, next(handles)),
            "is_current_stream_capturing": lambda: self.capturing, "set_sync_debug_mode": mode,
            "get_sync_debug_mode": lambda: self.sync_debug_mode,
            "memory_allocated": allocated, "memory_reserved": allocated, "max_memory_allocated": allocated,
            "mem_get_info": lambda device=None: (TOTAL - allocated(), TOTAL), "empty_cache": nothing,
            "reset_peak_memory_stats": nothing, "set_per_process_memory_fraction": fraction,
            "memory_snapshot": list,
            "manual_seed": nothing, "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        }  # fmt: skip

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Put the doubles in place of ``torch.cuda``'s."""
        for name, double in self.doubles().items():
            patch.setattr(torch.cuda, name, double)
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(torch, "autocast", Autocast)
        for name in ("range_push", "range_pop"):
            patch.setattr(torch.cuda.nvtx, name, lambda *_: None)
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            patch.setattr(torch._C, name, lambda *_: None, raising=False)
