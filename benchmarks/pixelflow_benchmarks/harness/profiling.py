"""PyTorch's profiler of CPU operators, used as a source of figures."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.profiler import profile


@contextlib.contextmanager
def cpu_profile(memory: bool = False) -> Iterator[profile]:
    """Profile the code in the context.

    Args:
        memory: whether to record allocations and frees as well.

    Yields:
        The profiler, whose events are available after the context exits.
    """
    # Torch 2.13 logs every start and stop to stderr, between the tables, at every level but this one. The variable is
    # read when the profiler is first used.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=memory, acc_events=True) as found:
        yield found
