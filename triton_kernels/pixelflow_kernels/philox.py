"""Counter-based standard normals: reference implementation in plain PyTorch.

Philox4x32-10 (Salmon et al., SC 2011) maps (key, counter) to four 32-bit words. The key is a 64-bit seed, the counter
is (position, stage, purpose, 0). The Box-Muller transform maps the words to four normals. A number therefore depends
only on seed, stage, purpose and position, never on the batch. Logarithm, sine and cosine are polynomials of separately
rounded float32 products and sums; division and square root are correctly rounded. Any device with IEEE 754 rounding
and without fused multiply-adds therefore draws the same bits. ``cascade/normals.py`` is the kernel implementation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SAMPLING = 0
TRAINING = 1
"""Values of the counter's purpose word; other values are free for other uses of the same seeds."""

_MASK32 = 0xFFFFFFFF


def seed_tensor(seeds: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Return seeds from 0 to 2^64 - 1 as ``[n]`` int64 with the same 64 bits."""
    return torch.tensor([seed - (seed >> 63 << 64) for seed in seeds], dtype=torch.int64, device=device)


def counter_normals(seeds: Tensor, stage: int, count: int, purpose: int = SAMPLING) -> Tensor:
    """Draw four standard normals per counter, with the same bits on every device.

    Args:
        seeds: ``[n]`` int64; all 64 bits are used.
        stage: index of the stage that the normals are for.
        count: number of counters per seed; they run from 0 to ``count - 1``.
        purpose: purpose word, 0 to 2^32 - 1.

    Returns:
        ``[n, count, 4]`` float32. No value exceeds 5.77 in magnitude, because the uniforms have 24 bits.
    """
    position = torch.arange(count, dtype=torch.int64, device=seeds.device)[None]
    return normals_at(seeds[:, None], position, torch.full_like(position, stage), purpose)


def normals_at(seeds: Tensor, positions: Tensor, stages: Tensor, purpose: int) -> Tensor:
    """Draw four standard normals for each of arbitrary counters.

    The int64 tensors ``seeds``, ``positions`` and ``stages`` broadcast to ``[...]``; the result is ``[..., 4]``.
    """
    zero = torch.zeros_like(positions)
    key = (seeds & _MASK32, seeds >> 32 & _MASK32)
    words = torch.stack(philox4x32((positions, stages, zero + purpose, zero), key))
    pairs = torch.stack(box_muller(words[0::2], words[1::2]), dim=-1)  # [2, ..., 2]; one call, faster for few counters
    return pairs.movedim(0, -2).flatten(-2)


@functools.cache
def compiled_normals_at() -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
    """Return :func:`normals_at` compiled by ``torch.compile`` on its first call: the same bits, in fewer passes."""
    return torch.compile(normals_at, dynamic=True, fullgraph=True)


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor], rounds: int = 10) -> tuple[Tensor, ...]:
    """Philox4x32: map four counter words and two key words to four random words, all 0..2^32 - 1 in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Return the high and low words of a 32x32-bit product; the int64 product wraps, which preserves its bits."""
    product = a * b
    return (product >> 32) & _MASK32, product & _MASK32


def box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Transform two random words (int64, 0..2^32 - 1) into two independent float32 normals (Box-Muller).

    ``u = (2k + 1) / 2^24`` with 23 random bits is exact and never 0 or 1. The angle is a multiple of pi/2 from the top
    two bits of the word, plus an angle within +-pi/4 from the next 23 bits; the origin of the angle does not matter.
    """
    u = (2 * (radius_word >> 9) + 1).to(torch.float32) * 2.0**-24
    # Through float64: on a CPU, torch's float32 square root is MKL's, which is off by one unit in the last place for a
    # fifth of all numbers. The root of a float32 is never so close to the midpoint between two float32 numbers that a
    # float64 root, even one that is off by one unit, would round to the wrong one.
    radius = torch.sqrt((-2.0 * _log(u)).double()).float()
    offset = (2 * ((angle_word >> 7) & 0x7FFFFF) + 1).to(torch.float32) * 2.0**-24 - 0.5
    sin, cos = _sin_cos(offset * (math.pi / 2))
    quarter = angle_word >> 30
    swapped = (quarter & 1) == 1
    x, y = torch.where(swapped, sin, cos), torch.where(swapped, cos, sin)
    x = torch.where((quarter == 1) | (quarter == 2), -x, x)
    y = torch.where(quarter >= 2, -y, y)
    return radius * x, radius * y


def _log(u: Tensor) -> Tensor:
    """Natural logarithm of float32 in (0, 1), within 2 ulp.

    ``u = 2^e m`` with sqrt(1/2) <= m < sqrt(2); ``log u = e ln 2 + 2 artanh((m - 1) / (m + 1))``.
    """
    bits = u.view(torch.int32)
    # Subtracting the bits of sqrt(1/2) moves the exponent's boundary from 1 to sqrt(1/2).
    exponent = (bits - 0x3F3504F3) >> 23
    m = (bits - (exponent << 23)).view(torch.float32)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    series = _horner(z, (1 / 11, 1 / 9, 1 / 7, 1 / 5, 1 / 3))
    logarithm = 2.0 * s + 2.0 * (s * (z * series))
    return exponent.to(torch.float32) * math.log(2) + logarithm


def _sin_cos(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine within +-pi/4 by their Taylor series, within 2 ulp."""
    z = x * x
    sin = x + x * (z * _horner(z, (1 / 362880, -1 / 5040, 1 / 120, -1 / 6)))
    cos = 1.0 + z * _horner(z, (-1 / 3628800, 1 / 40320, -1 / 720, 1 / 24, -1 / 2))
    return sin, cos


def _horner(z: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Evaluate a polynomial by Horner's rule, highest power first; each product and sum is rounded separately."""
    total = torch.full_like(z, coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * z + coefficient
    return total
