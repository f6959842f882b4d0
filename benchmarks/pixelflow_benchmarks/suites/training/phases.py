"""The parts of a training step, and how long each takes.

A step names its parts as it runs. If only whole steps are timed the names are ignored, and nothing waits between parts.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch

from pixelflow_benchmarks.harness.timing import wait_for

PHASES = ("batch", "forward", "backward", "clip", "optimizer", "ema")
"""From images to a batch on the device; losses; gradients; clipping by their norm; new weights; averaged weights."""
OTHER = "other"
"""The rest of a step, which belongs to none of the phases."""


class Phases(Protocol):
    """Receiver of the parts of a step.

    Attributes:
        timed: whether parts are timed; otherwise a step in another process need not report them.
    """

    timed: bool

    def __call__(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Return a context in which a part of the step, one of :data:`PHASES`, is run."""
        ...

    def took(self, seconds: Mapping[str, float], whole: float) -> None:
        """Add a step that was timed elsewhere.

        Args:
            seconds: seconds by phase.
            whole: seconds of the whole step.
        """
        ...


class Untimed:
    """Ignores the parts of a step, see :class:`Phases`."""

    timed = False

    def __call__(self, name: str) -> contextlib.AbstractContextManager[None]:
        """See :class:`Phases`."""
        return contextlib.nullcontext()

    def took(self, seconds: Mapping[str, float], whole: float) -> None:
        """See :class:`Phases`."""


UNTIMED = Untimed()


class PhaseClock:
    """Adds up the times of the parts of steps, see :class:`Phases`.

    On CUDA the parts are delimited by events, so that nothing waits between them. The time of a part is what passes on
    the device until it is done, including time in which the device waits for the host.

    Args:
        device: device on which the steps run.

    Attributes:
        seconds: seconds by phase, over all steps.
        whole: seconds of all steps.
    """

    timed = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.whole = 0.0
        self._parts: list[tuple[str, Callable[[], float]]] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """See :class:`Phases`.

        Raises:
            ValueError: ``name`` is not one of :data:`PHASES`.
        """
        if name not in PHASES:
            raise ValueError(f"phase: got {name!r}, expected one of {', '.join(PHASES)}")
        since = self._watch()
        yield
        self._parts.append((name, since()))

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Time the step that runs inside, with the device idle before and after.

        A step that is timed elsewhere names no parts, and its time here is not added.
        """
        wait_for(self.device)
        since = self._watch()
        yield
        elapsed = since()
        wait_for(self.device)
        if self._parts:
            self.took(self._sums(), elapsed())

    def took(self, seconds: Mapping[str, float], whole: float) -> None:
        """See :class:`Phases`."""
        for name, value in seconds.items():
            self.seconds[name] += value
        self.whole += whole

    def shares(self) -> dict[str, float]:
        """Return the share of each phase, and of the rest, in the time of whole steps; they add up to one."""
        found = {name: value / self.whole for name, value in self.seconds.items()}
        return found | {OTHER: 1 - sum(found.values())}

    def _sums(self) -> dict[str, float]:
        sums = dict.fromkeys(PHASES, 0.0)
        for name, elapsed in self._parts:
            sums[name] += elapsed()
        self._parts.clear()
        return sums

    def _watch(self) -> Callable[[], Callable[[], float]]:
        """Start a stopwatch and return a function that stops it.

        That function returns another one, which gives the seconds in between; on a GPU, call it once the device is
        idle.
        """
        if self.device.type != "cuda":
            began = time.perf_counter()
            return lambda: _constant(time.perf_counter() - began)
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream = torch.cuda.current_stream(self.device)
        first.record(stream)

        def stop() -> Callable[[], float]:
            last.record(stream)
            return lambda: first.elapsed_time(last) / 1000

        return stop


def _constant(value: float) -> Callable[[], float]:
    return lambda: value
