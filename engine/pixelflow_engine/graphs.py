"""Capture of launches into CUDA graphs, and the contract of the tensors that a graph reads."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from .errors import CaptureError

Launch = Callable[[], None]
"""A fixed list of launches over tensors that stay where they are; it waits for nothing and decides nothing."""


FAILED: list[torch.cuda.CUDAGraph] = []
"""Graphs whose captures failed: an allocator may ask one of them whose memory is whose as long as the process lives."""


class Capture(Protocol):
    """Makes graphs that share one pool of memory."""

    def capture(self, launch: Launch) -> Launch:
        """Run ``launch`` to warm up, record it, and return what replays it on the caller's stream.

        What it reads and writes changes by the warm-up, so values are loaded afterwards.

        Raises:
            CaptureError: it cannot be recorded; nothing is left behind.
        """
        ...

    def leave(self) -> object:
        """What the caller's stream was given so far, for :meth:`follow`."""
        ...

    def follow(self, left: object) -> None:
        """Let the caller's stream go on after that, whichever stream it is; the host does not wait."""
        ...

    def close(self) -> None:
        """Release all graphs and their memory when what runs is done; replaying one is an error from then on."""
        ...


class CudaCapture:
    """CUDA graphs on one device.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Whoever replays a graph holds it. One that nobody can replay any more is gone at once, with its memory.
        self.graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self.pool = torch.cuda.graph_pool_handle()

    def capture(self, launch: Launch) -> Launch:
        """See :class:`Capture`. Kernels compile and libraries make their handles while warming up."""
        if not self.graphs:
            self.pool = torch.cuda.graph_pool_handle()  # one whose last graph has gone cannot be had again
        graph = torch.cuda.CUDAGraph()
        # A capture that fails leaves its stream as the current one; the caller's comes back all the same.
        stay = torch.cuda.stream(torch.cuda.current_stream(self.device))
        with reported(), torch.cuda.device(self.device), stay:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(side):
                    for _ in range(2):
                        launch()
            finally:  # whoever mends what a failure left must come after what was launched before it
                torch.cuda.current_stream().wait_stream(side)
            try:
                # Other threads may go on using the device: their calls do not end this capture.
                with torch.cuda.graph(graph, pool=self.pool, stream=side, capture_error_mode="thread_local"):
                    launch()
            except BaseException:
                self._give_up(graph)
                raise
        self.graphs.add(graph)
        return graph.replay

    def _give_up(self, graph: torch.cuda.CUDAGraph) -> None:
        """Tell PyTorch's allocator of the end of a capture that failed: it would go on filling this pool for it.

        The allocator of pinned memory cannot be told, and refuses another capture into the same pool: the next one has
        a pool of its own, and graphs that are there keep theirs.
        """
        graph.reset()
        FAILED.append(graph)
        device = torch.cuda.current_device()
        pool, self.pool = self.pool, torch.cuda.graph_pool_handle()
        try:
            torch._C._cuda_endAllocateToPool(device, pool)
        except RuntimeError:
            return  # it has been told
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
            torch.cuda.synchronize(self.device)  # any stream may be replaying one
        for graph in list(self.graphs):
            graph.reset()
        self.graphs.clear()


@contextmanager
def reported() -> Iterator[None]:
    """What goes wrong while capturing, but for lack of memory, as a :class:`CaptureError` with the first reason.

    An operation that cannot be captured ends the capture, and that is an error once more.
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
        buffer: what the graph reads.
        value: what it is to read next.
        name: of both, for errors.
        dtype: of the value, where it is not the buffer's: the copy is a cast then, in the same launch.

    Raises:
        ValueError: its shape, type or device is another; the message names both.
    """
    if value.shape != buffer.shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {tuple(buffer.shape)} as captured")
    if value.dtype != (dtype or buffer.dtype):
        raise ValueError(f"{name}: got {value.dtype}, expected {dtype or buffer.dtype} as captured")
    if value.device != buffer.device:
        raise ValueError(f"{name}: got device {value.device}, expected {buffer.device} as captured")
    buffer.copy_(value)
