"""PyTorch's profiler of a CPU's operators, as a source of figures."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.profiler import profile


@contextlib.contextmanager
def cpu_profile(memory: bool = False) -> Iterator[profile]:
    """Profile what runs inside.

    Args:
        memory: whether what the allocator gives out and takes back is recorded too.

    Yields:
        the profiler, whose events are there once the context is left.
    """
    # Torch 2.13 announces every start and stop on stderr, amid the tables, at every level but this one. It is read when
    # the profiler is first used.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=memory, acc_events=True) as found:
        yield found
