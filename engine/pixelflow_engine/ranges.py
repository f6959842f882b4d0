"""Named ranges for profilers: ``stage 3``, ``step 7``, ``block 12``, as Nsight Systems and torch.profiler show them.

    with ranges_shown(), torch.profiler.profile() as profiler:
        engine(class_labels=[3])

Ranges measure host time: they begin and end where launches are issued, and profilers relate device work to them.
Compiled code contains none. No Python runs while a CUDA graph is replayed: a step's range then encloses the replay of
the whole step, and blocks appear once, where the step is captured.
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
    """Emit the engine's ranges in this thread, to torch.profiler and, if there is a GPU, to NVTX."""
    with ranges_told(_profiler_and_nvtx if torch.cuda.is_available() else record_function):
        yield


@contextmanager
def ranges_told(show: Show) -> Iterator[None]:
    """Emit the engine's ranges in this thread to a custom sink: ``show(name)`` is entered around each named section."""
    token = _SHOW.set(show)
    try:
        yield
    finally:
        _SHOW.reset(token)


def named(*words: object) -> AbstractContextManager[object]:
    """A range such as ``named("step", 7)``.

    Without :func:`ranges_shown` or :func:`ranges_told` this is a no-op, and the name is not even built.
    """
    if torch.compiler.is_compiling():
        return NOTHING
    show = _SHOW.get()
    return NOTHING if show is None else show(" ".join(map(str, words)))


@contextmanager
def _profiler_and_nvtx(name: str) -> Iterator[None]:
    """Emit to both. Only for CUDA builds: elsewhere the NVTX functions raise."""
    torch.cuda.nvtx.range_push(name)
    try:
        with record_function(name):
            yield
    finally:
        torch.cuda.nvtx.range_pop()
