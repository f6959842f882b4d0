"""What a device can do at best, measured in the same run: the ceilings that a kernel's figures are a fraction of."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .timing import time_calls


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured rates of a device.

    Attributes:
        bytes_per_second: read and written by a copy too large for the cache.
        flops_per_second: of a large square matrix product in ``dtype``; a multiplication and an addition are two.
        dtype: of the product.
    """

    bytes_per_second: float
    flops_per_second: float
    dtype: torch.dtype


def measure_ceilings(
    device: torch.device, dtype: torch.dtype, copy_bytes: int = 2**30, side: int = 8192, rounds: int = 10
) -> Ceilings:
    """Measure both ceilings.

    Args:
        device: where.
        dtype: of the matrix product.
        copy_bytes: size of the copied tensor; smaller on a CPU.
        side: of the square matrices.
        rounds: see :func:`~pixelflow_benchmarks.timing.time_calls`.
    """
    source = torch.empty(copy_bytes, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=device).to(dtype)
    b = torch.randn(side, side, device=device).to(dtype)
    out = torch.empty_like(a)
    timings = time_calls(
        {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(a, b, out=out)}, device, rounds
    )
    return Ceilings(
        bytes_per_second=2 * copy_bytes / timings["copy"].median,
        flops_per_second=2 * side**3 / timings["product"].median,
        dtype=dtype,
    )
