"""Times of stages without making the device wait between them."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Marks moments and tells, later, how far apart they were.

    Attributes:
        ahead: the host runs ahead of what it marks, so reading a value of the device waits for it.
    """

    @property
    def ahead(self) -> bool: ...  # noqa: D102

    def mark(self) -> Any:
        """This moment; waits for nothing."""
        ...

    def seconds(self, begun: Any, ended: Any) -> float:
        """Between two moments; waits for the later one."""
        ...


class HostClock:
    """Where work is done when its call returns."""

    ahead = False

    def mark(self) -> float:
        """See :class:`Clock`."""
        return time.perf_counter()

    def seconds(self, begun: float, ended: float) -> float:
        """See :class:`Clock`."""
        return ended - begun


class StreamClock:
    """Where work is put into a CUDA stream: the moments at which the caller's stream got there.

    Args:
        device: a CUDA device.
    """

    ahead = True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> torch.cuda.Event:
        """See :class:`Clock`."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, begun: torch.cuda.Event, ended: torch.cuda.Event) -> float:
        """See :class:`Clock`."""
        ended.synchronize()
        return begun.elapsed_time(ended) / 1000


def clock_of(device: torch.device) -> Clock:
    """The clock for what runs there."""
    return StreamClock(device) if device.type == "cuda" else HostClock()
