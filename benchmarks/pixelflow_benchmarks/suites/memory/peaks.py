"""The peak of a run as PyTorch's allocator counts it, and what the system sees or the graphs' pool holds."""

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
    """Release unreferenced memory and return the bytes that remain allocated on a GPU; 0 for a CPU.

    Of cuBLAS's workspaces, of which PyTorch keeps one for each stream that multiplied, that of the current stream
    remains. Those of streams on which earlier variants captured are released: otherwise a variant whose captures are
    given the same streams would not be charged for theirs. No graph that was captured before may be replayed again.
    """
    gc.collect()
    if device.type != "cuda":
        return 0
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        one = torch.ones(16, 16, device=device)
        _ = one @ one  # allocates this stream's workspace, which must not be attributed to a variant
        del one, _
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device)


def peak_of(run: Callable[[], object], device: torch.device, before: int, pool: Pool | None) -> dict[str, int]:
    """Measure the peak of one run, beyond what was allocated before.

    Args:
        run: the run; a GPU runs it once, a CPU a second time for the system's figure.
        device: device that it runs on.
        before: what :func:`settle` returned before the first run.
        pool: memory pool that its graphs share.

    Returns:
        ``activations``, and further fields of a ``memory`` record.
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
        # What a replay uses lies in the pool, of which the allocator counts only what tensors hold.
        held, used = pool_sizes(pool)
        found |= {"activations": activations + held - used, "pool_bytes": held}
    return found


def pool_sizes(pool: Pool) -> tuple[int, int]:
    """Return the bytes that a graph pool holds, and how many of them belong to tensors."""
    segments = [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) == tuple(pool)]
    return sum(s["total_size"] for s in segments), sum(s["allocated_size"] for s in segments)


def resident_peak(run: Callable[[], object]) -> int | None:
    """Return by how many bytes the process's resident memory grew at most during a run; None if that is unknown."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # memory that was released earlier must not count as resident
    try:
        (PROCESS / "clear_refs").write_text("5")  # resets the peak
        before = _resident("VmRSS")
        run()
        return max(_resident("VmHWM") - before, 0)
    except (OSError, KeyError):
        return None


def _resident(field: str) -> int:
    lines = (line.split() for line in (PROCESS / "status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if words[-1] == "kB"}[field] * 1024
