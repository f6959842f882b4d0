"""Timing of stages without a host-device synchronization between them."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Marks points in time and measures, later, the time between them.

    Attributes:
        ahead: whether the host runs ahead of the marked work, so that reading a device value has to wait for it.
    """

    @property
    def ahead(self) -> bool: ...  # noqa: D102

    def mark(self) -> Any:
        """Mark the current point; does not wait."""
        ...

    def seconds(self, begun: Any, ended: Any) -> float:
        """Seconds between two marks; waits for the later one."""
        ...


class HostClock:
    """Clock for devices whose work is done when the call returns."""

    ahead = False

    def mark(self) -> float:
        """See :class:`Clock`."""
        return time.perf_counter()

    def seconds(self, begun: float, ended: float) -> float:
        """See :class:`Clock`."""
        return ended - begun


class StreamClock:
    """Clock for CUDA: marks are events on the caller's current stream.

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
    """The clock for a device."""
    return StreamClock(device) if device.type == "cuda" else HostClock()
