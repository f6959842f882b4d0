"""Capture of launches into CUDA graphs, and checked copies into the tensors that a graph reads."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from .errors import CaptureError

Launch = Callable[[], None]
"""A fixed list of launches over tensors with fixed addresses; it neither waits for the device nor branches on its
values."""


FAILED: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture failed. They are kept until the process ends, because an allocator may still ask one of them
which memory it owns."""


class Capture(Protocol):
    """Captures graphs that share one memory pool."""

    def capture(self, launch: Launch) -> Launch:
        """Run ``launch`` to warm up, record it, and return a function that replays it on the caller's stream.

        The warm-up changes the tensors that ``launch`` writes, so values must be loaded afterwards.

        Raises:
            CaptureError: ``launch`` cannot be captured; no partial graph is left behind.
        """
        ...

    def leave(self) -> object:
        """A marker for everything submitted to the caller's stream so far, for :meth:`follow`."""
        ...

    def follow(self, left: object) -> None:
        """Make the caller's stream wait for that marker, whichever stream it is from; the host does not wait."""
        ...

    def close(self) -> None:
        """Release all graphs and their memory once running work is done; replaying one afterwards is an error."""
        ...


class CudaCapture:
    """CUDA graphs on one device.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # The replay functions hold the graphs. A graph that can no longer be replayed is freed at once, with its
        # memory.
        self.graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self.pool = torch.cuda.graph_pool_handle()
        self.side: torch.cuda.Stream | None = None

    def capture(self, launch: Launch) -> Launch:
        """See :class:`Capture`. The warm-up also compiles kernels and creates library handles."""
        if not self.graphs:
            self.pool = torch.cuda.graph_pool_handle()  # a pool cannot be reused once its last graph is gone
        graph = torch.cuda.CUDAGraph()
        # A failed capture leaves its own stream current; this context restores the caller's stream in any case.
        stay = torch.cuda.stream(torch.cuda.current_stream(self.device))
        with reported(), torch.cuda.device(self.device), stay:
            # One stream for all captures: cuBLAS keeps a workspace for each stream, and the graphs take turns anyway.
            side = self.side = self.side or torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(side):
                    for _ in range(2):
                        launch()
            finally:  # also on failure: cleanup must be ordered after the launches so far
                torch.cuda.current_stream().wait_stream(side)
            try:
                # Other threads may keep using the device: with "thread_local", their calls do not invalidate this
                # capture.
                with torch.cuda.graph(graph, pool=self.pool, stream=side, capture_error_mode="thread_local"):
                    launch()
            except BaseException:
                self._give_up(graph)
                raise
        self.graphs.add(graph)
        return graph.replay

    def _give_up(self, graph: torch.cuda.CUDAGraph) -> None:
        """Tell PyTorch's caching allocator that a failed capture has ended.

        Otherwise it would keep allocating from this pool. The allocator of pinned memory cannot be told, and refuses
        another capture into the same pool. The next capture therefore gets a new pool; existing graphs keep theirs.
        """
        graph.reset()
        FAILED.append(graph)
        self.side = None  # in case the capture did not end there
        device = torch.cuda.current_device()
        pool, self.pool = self.pool, torch.cuda.graph_pool_handle()
        try:
            torch._C._cuda_endAllocateToPool(device, pool)
        except RuntimeError:
            return  # the allocator already knows
        torch._C._cuda_releasePool(device, pool)

    def leave(self) -> torch.cuda.Event:
        """See :class:`Capture`."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def follow(self, left: object) -> None:
        """See :class:`Capture`."""
        assert isinstance(left, torch.cuda.Event)
        torch.cuda.current_stream(self.device).wait_event(left)

    def close(self) -> None:
        """See :class:`Capture`."""
        if self.graphs:
            torch.cuda.synchronize(self.device)  # any stream may be replaying a graph
        for graph in list(self.graphs):
            graph.reset()
        self.graphs.clear()


@contextmanager
def reported() -> Iterator[None]:
    """Convert errors during capture, except out-of-memory errors, to :class:`CaptureError` with the original reason.

    An operation that cannot be captured raises, and ending the capture then raises again; the first error is the
    reason.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason: BaseException = error
        while isinstance(reason.__context__, RuntimeError):
            reason = reason.__context__
        if isinstance(reason, torch.cuda.OutOfMemoryError):
            raise reason from None
        first_line = (str(reason).splitlines() or [type(reason).__name__])[0]
        raise CaptureError(f"graphs: a step could not be captured: {first_line}") from error


def load_(buffer: Tensor, value: Tensor, name: str, dtype: torch.dtype | None = None) -> None:
    """Copy a value into a tensor that a graph reads.

    Args:
        buffer: the tensor that the graph reads.
        value: its next value.
        name: name of the value in error messages.
        dtype: expected dtype of ``value`` if it differs from the buffer's; the copy then casts, in the same launch.

    Raises:
        ValueError: shape, dtype or device differ; the message states both.
    """
    if value.shape != buffer.shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {tuple(buffer.shape)} as captured")
    if value.dtype != (dtype or buffer.dtype):
        raise ValueError(f"{name}: got {value.dtype}, expected {dtype or buffer.dtype} as captured")
    if value.device != buffer.device:
        raise ValueError(f"{name}: got device {value.device}, expected {buffer.device} as captured")
    buffer.copy_(value)
