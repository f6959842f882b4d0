"""What a step of training consists of, and how long each part takes.

A step names its parts as it goes. Where only the whole step is timed nobody listens, and nothing waits between parts.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch

from pixelflow_benchmarks.harness.timing import wait_for

PHASES = ("batch", "forward", "backward", "clip", "optimizer", "ema")
"""From images to a batch on the device; losses; gradients; their norm; new weights; averaged weights."""
OTHER = "other"
"""What of a step belongs to none of them."""


class Phases(Protocol):
    """Who is told what a step does.

    Attributes:
        timed: whether anybody wants to know; a step in another process need not tell otherwise.
    """

    timed: bool

    def __call__(self, name: str) -> contextlib.AbstractContextManager[None]:
        """A part of the step, one of :data:`PHASES`, is done inside."""
        ...

    def took(self, seconds: Mapping[str, float], whole: float) -> None:
        """A step was timed elsewhere: its parts, and all of it."""
        ...


class Untimed:
    """Nobody listens, see :class:`Phases`."""

    timed = False

    def __call__(self, name: str) -> contextlib.AbstractContextManager[None]:
        """See :class:`Phases`."""
        return contextlib.nullcontext()

    def took(self, seconds: Mapping[str, float], whole: float) -> None:
        """See :class:`Phases`."""


UNTIMED = Untimed()


class PhaseClock:
    """Adds up the parts of steps, see :class:`Phases`.

    On CUDA events stand between the parts, so nothing waits there: a part is what passes on the device until it is
    done, also where the device waits for the host.

    Args:
        device: where the steps run.
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
            ValueError: no step has such a part.
        """
        if name not in PHASES:
            raise ValueError(f"phase: got {name!r}, expected one of {', '.join(PHASES)}")
        since = self._watch()
        yield
        self._parts.append((name, since()))

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A step is done inside; the device is idle before and after. A step that is timed elsewhere adds nothing."""
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
        """Of the whole steps: each part's share and that of what is in none; they add up to one."""
        found = {name: value / self.whole for name, value in self.seconds.items()}
        return found | {OTHER: 1 - sum(found.values())}

    def _sums(self) -> dict[str, float]:
        sums = dict.fromkeys(PHASES, 0.0)
        for name, elapsed in self._parts:
            sums[name] += elapsed()
        self._parts.clear()
        return sums

    def _watch(self) -> Callable[[], Callable[[], float]]:
        """Starts now; called, it stops and gives what tells the seconds between, on a GPU once it is idle."""
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
