"""Named ranges for profilers: ``stage 3``, ``step 7``, ``block 12``, as Nsight Systems and torch.profiler show them.

    with ranges_shown(), torch.profiler.profile() as profiler:
        engine(class_labels=[3])

A range is of the host's time: it begins and ends where launches are issued, and profilers find out what ran on the
device because of it. Inside compiled code there are none. While a CUDA graph is replayed no Python runs: a step's range
is then around the replay of the whole step, and blocks are seen once, where the step is captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch.profiler import record_function

Show = Callable[[str], AbstractContextManager[object]]

NOTHING = nullcontext()

_SHOW: ContextVar[Show | None] = ContextVar("pixelflow_engine.ranges", default=None)


@contextmanager
def ranges_shown() -> Iterator[None]:
    """Inside, in this thread, the engine's ranges are there: torch.profiler's, and NVTX's where there is a GPU."""
    with ranges_told(_profiler_and_nvtx if torch.cuda.is_available() else record_function):
        yield


@contextmanager
def ranges_told(show: Show) -> Iterator[None]:
    """Inside, in this thread, somebody else hears of the ranges: ``show(name)`` is entered around what a name is of."""
    token = _SHOW.set(show)
    try:
        yield
    finally:
        _SHOW.reset(token)


def named(*words: object) -> AbstractContextManager[object]:
    """A range of that name, like ``named("step", 7)``; outside of :func:`ranges_shown` nothing, not even the name."""
    if torch.compiler.is_compiling():
        return NOTHING
    show = _SHOW.get()
    return NOTHING if show is None else show(" ".join(map(str, words)))


@contextmanager
def _profiler_and_nvtx(name: str) -> Iterator[None]:
    """A build without CUDA has no NVTX: its functions raise there."""
    torch.cuda.nvtx.range_push(name)
    try:
        with record_function(name):
            yield
    finally:
        torch.cuda.nvtx.range_pop()
