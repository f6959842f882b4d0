"""Keeps freed memory in the process, where a step would otherwise fetch it from the system again, page by page."""

from __future__ import annotations

import ctypes
import os

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Options of glibc's ``mallopt``."""
LARGEST_FREE_TOP = 2**31 - 1
"""Bytes of free memory at the end of the heap from which on glibc returns it; the largest number ``mallopt`` takes."""
LARGEST_ON_HEAP = (2**30, 2**25)
"""Bytes of a tensor from which on it has a mapping of its own, which is returned when the tensor is freed; and the most
that an older glibc takes."""
OF_THE_USER = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")
"""Environment variables by which a user decides."""


def keep_freed_memory() -> bool:
    """Let glibc keep up to 2 GiB of freed memory for later tensors, in this process, until it ends.

    When a step on a CPU is done, all its activations are free. By default glibc then returns most of them to the
    system, and the next step takes a page fault for every 4 KiB. The peak rises a little.

    Returns:
        whether it does; not with another C library, or where an environment variable sets these options.
    """
    if any(name in os.environ for name in OF_THE_USER):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # not glibc
        return False
    keeps = mallopt(TRIM_THRESHOLD, LARGEST_FREE_TOP)
    return bool(keeps and any(mallopt(MMAP_THRESHOLD, size) for size in LARGEST_ON_HEAP))
