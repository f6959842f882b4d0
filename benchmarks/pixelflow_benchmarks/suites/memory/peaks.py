"""The peak of a run: by the allocator's own account, beside it what the system, or the graphs' pool, holds."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

from .live import allocator_peak

Pool = tuple[int, int]

PROCESS = Path("/proc/self")


def settle(device: torch.device) -> int:
    """Release what nobody holds; the bytes that are left on a GPU."""
    gc.collect()
    if device.type != "cuda":
        return 0
    with torch.cuda.device(device):
        one = torch.ones(16, 16, device=device)
        _ = one @ one  # the library's workspace is nobody's in particular
        del one, _
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device)


def peak_of(run: Callable[[], object], device: torch.device, before: int, pool: Pool | None) -> dict[str, int]:
    """The peak of one run, beside what lay there before.

    Args:
        run: on a GPU it runs once; on a CPU a second time for the system's figure.
        device: where.
        before: what :func:`settle` gave before the run was made ready.
        pool: that its graphs share.

    Returns:
        ``activations``, and fields of a record of memory.
    """
    if device.type != "cuda":
        found = {"activations": allocator_peak(run)}
        if (grown := resident_peak(run)) is not None:
            found["resident_bytes"] = grown
        return found
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    activations = torch.cuda.max_memory_allocated(device) - before
    found = {"activations": activations, "reserved_bytes": torch.cuda.max_memory_reserved(device)}
    if pool is not None:
        # What a replay uses lies in the pool, and the allocator counts of it only what is held by tensors.
        held, used = pool_sizes(pool)
        found |= {"activations": activations + held - used, "pool_bytes": held}
    return found


def pool_sizes(pool: Pool) -> tuple[int, int]:
    """Bytes that a graph pool holds, and those of them that tensors hold."""
    segments = [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) == tuple(pool)]
    return sum(s["total_size"] for s in segments), sum(s["allocated_size"] for s in segments)


def resident_peak(run: Callable[[], object]) -> int | None:
    """By how many bytes the process grew at most during a run, for the system; None where the system does not tell."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what was released before must not be taken for what is there
    try:
        (PROCESS / "clear_refs").write_text("5")  # the peak begins anew
        before = _resident("VmRSS")
        run()
        return max(_resident("VmHWM") - before, 0)
    except (OSError, KeyError):
        return None


def _resident(field: str) -> int:
    lines = (line.split() for line in (PROCESS / "status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if words[-1] == "kB"}[field] * 1024
