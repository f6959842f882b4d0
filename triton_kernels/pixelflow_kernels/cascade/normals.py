"""Counter-based normals as device functions: Philox4x32-10 and a Box-Muller transform made of products and sums.

The bits are those of ``pixelflow_kernels.philox``, which documents each step. They are the same on every device if
nothing is fused, so kernels that call these functions are compiled with ``enable_fp_fusion=False``. Division and square
root are correctly rounded; fused multiply-adds remain only in their internal refinement.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import math

import triton
import triton.language as tl

from .law import DEVIATION_SCALE, MEAN_SCALE

# Globals that a kernel reads must be constexpr. The purposes equal those of ``pixelflow_kernels.philox``.
SAMPLING: tl.constexpr = tl.constexpr(0)
TRAINING: tl.constexpr = tl.constexpr(1)
_ULP: tl.constexpr = tl.constexpr(2.0**-24)
_LN2: tl.constexpr = tl.constexpr(math.log(2))
_HALF_PI: tl.constexpr = tl.constexpr(math.pi / 2)
_DEVIATION_SCALE: tl.constexpr = tl.constexpr(DEVIATION_SCALE)
_MEAN_SCALE: tl.constexpr = tl.constexpr(MEAN_SCALE)


@triton.jit
def _multiply(a, FACTOR: tl.constexpr):
    """Return the high and low words of a 32x32-bit product."""
    product = a.to(tl.uint64) * FACTOR
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox(position, stage, PURPOSE: tl.constexpr, key_low, key_high):
    """Generate four random words (uint32) for the counter ``(position, stage, PURPOSE, 0)``."""
    c0 = position
    c1 = tl.zeros_like(position) + stage
    c2 = tl.zeros_like(position) + PURPOSE
    c3 = tl.zeros_like(position)
    k0, k1 = key_low, key_high
    for _ in tl.static_range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _log(u):
    """Natural logarithm of float32 in (0, 1)."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    m = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    s = tl.div_rn(m - 1.0, m + 1.0)
    z = s * s
    series = (1 / 11) * z + 1 / 9
    series = series * z + 1 / 7
    series = series * z + 1 / 5
    series = series * z + 1 / 3
    return exponent.to(tl.float32) * _LN2 + (2.0 * s + 2.0 * (s * (z * series)))


@triton.jit
def _sin_cos(x):
    """Sine and cosine within +-pi/4."""
    z = x * x
    sin = (1 / 362880) * z + -1 / 5040
    sin = sin * z + 1 / 120
    sin = sin * z + -1 / 6
    cos = (-1 / 3628800) * z + 1 / 40320
    cos = cos * z + -1 / 720
    cos = cos * z + 1 / 24
    cos = cos * z + -1 / 2
    return x + x * (z * sin), 1.0 + z * cos


@triton.jit
def box_muller(radius_word, angle_word):
    """Transform two random words into two independent normals (float32)."""
    u = ((radius_word >> 9) * 2 + 1).to(tl.int32).to(tl.float32) * _ULP
    radius = tl.sqrt_rn(-2.0 * _log(u))
    offset = (((angle_word >> 7) & 0x7FFFFF) * 2 + 1).to(tl.int32).to(tl.float32) * _ULP - 0.5
    sin, cos = _sin_cos(offset * _HALF_PI)
    quarter = angle_word >> 30
    swapped = (quarter & 1) == 1
    x, y = tl.where(swapped, sin, cos), tl.where(swapped, cos, sin)
    # Quarters 1 and 2 lie to the left, 2 and 3 below. Triton's minus loses the sign of 0, but x and y are never 0.
    x = tl.where((quarter == 1) | (quarter == 2), -x, x)
    y = tl.where(quarter >= 2, -y, y)
    return radius * x, radius * y


@triton.jit
def normals(position, stage, PURPOSE: tl.constexpr, seed):
    """Draw four normals for each position (int32) of the image with this seed (int64)."""
    key_low, key_high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    w0, w1, w2, w3 = philox(position.to(tl.uint32), stage, PURPOSE, key_low, key_high)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return z0, z1, z2, z3


@triton.jit
def correlate(z0, z1, z2, z3):
    """Give the four independent normals of a 2x2 block the covariance of block noise."""
    # In pairs: LLVM in Triton 3.8.0 adds a chain of four in another order.
    mean = ((z0 + z1) + (z2 + z3)) * 0.25
    shared = _MEAN_SCALE * mean
    n0 = _DEVIATION_SCALE * (z0 - mean) + shared
    n1 = _DEVIATION_SCALE * (z1 - mean) + shared
    n2 = _DEVIATION_SCALE * (z2 - mean) + shared
    n3 = _DEVIATION_SCALE * (z3 - mean) + shared
    return n0, n1, n2, n3
