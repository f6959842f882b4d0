"""Hardware ceilings: the best rates that a device reaches in the same run, against which other figures are compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .timing import REPEATS, Call, time_calls

GPU_SIZES, CPU_SIZES = (2**30, 8192), (2**27, 1024)
"""Bytes that are copied, more than any cache holds, and the side of the matrices that are multiplied."""


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured rates of a device.

    Attributes:
        bytes_per_second: bytes read plus bytes written, by a copy too large for the cache.
        flops_per_second: of a large square matrix product in ``dtype``; a multiply-add counts as two operations.
        dtype: type of the product.
    """

    bytes_per_second: float
    flops_per_second: float
    dtype: torch.dtype

    def floor(self, flops: float, bytes_moved: float) -> float:
        """Return the seconds that products and memory traffic take at these rates, one after the other."""
        return flops / self.flops_per_second + bytes_moved / self.bytes_per_second

    def record(self) -> dict[str, object]:
        """Return the record that is written to a result file."""
        return {
            "kind": "ceilings",
            "bytes_per_second": self.bytes_per_second,
            "flops_per_second": self.flops_per_second,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def measure_ceilings(device: torch.device, dtype: torch.dtype, repeats: int = REPEATS) -> Ceilings:
    """Measure both ceilings, with the copy's buffers larger than any cache.

    Args:
        device: device to measure.
        dtype: type of the matrix product.
        repeats: see :func:`~pixelflow_benchmarks.harness.timing.time_calls`.
    """
    copied, side = GPU_SIZES if device.type == "cuda" else CPU_SIZES
    source = torch.empty(copied, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=device).to(dtype)
    b = torch.randn(side, side, device=device).to(dtype)
    out = torch.empty_like(a)
    # The driver may hand a copy to the device's copy engines, a pointwise kernel never uses them: the faster one counts
    values, negated = source.view(torch.float32), target.view(torch.float32)
    copies: dict[str, Call] = {
        "copy": lambda: target.copy_(source),
        "kernel": lambda: torch.neg(values, out=negated),
    }
    calls: dict[str, Call] = {**copies, "product": lambda: torch.mm(a, b, out=out)}
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        # oneDNN is the alternative to MKL on a CPU. Which one is faster depends on the processor's vendor.
        calls["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    timings = time_calls(calls, device, repeats)
    copy = min(timings.pop(name).median for name in copies)
    return Ceilings(
        bytes_per_second=2 * copied / copy,
        flops_per_second=2 * side**3 / min(timing.median for timing in timings.values()),
        dtype=dtype,
    )
