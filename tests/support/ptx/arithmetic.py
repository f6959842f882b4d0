"""Arithmetic as PTX defines it, on NumPy arrays: roundings, conversions, minima; and worst-case approximations."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]

F32, F64, U16, U32, U64 = np.float32, np.float64, np.uint16, np.uint32, np.uint64


def flushed(x: Array) -> Array:
    """float32 with denormals replaced by zeros of their sign (``.ftz``)."""
    return np.where(np.abs(x) < np.finfo(F32).tiny, np.copysign(F32(0), x), x)


def to_odd(exact: Array, error: Array) -> Array:
    """float64 ``exact + error``, rounded to odd, for a ``exact`` that is that sum to the nearest.

    A second rounding to a type of at most 51 bits is then that of the exact sum (Boldo and Melquiond, 2008).
    """
    bits = exact.view(np.int64) if exact.ndim else np.asarray(exact).view(np.int64)
    # Towards zero first, if the nearest is the farther one from zero; then the last bit says "inexact".
    inexact = (error != 0) & np.isfinite(exact)
    beyond = inexact & (np.signbit(exact) != np.signbit(error)) & (exact != 0)
    bits = np.where(beyond, bits - 1, bits)
    return np.where(inexact, bits | 1, bits).view(F64)


def fused(a: Array, b: Array, c: Array) -> Array:
    """``a b + c`` of float32 or narrower values as float64 rounded to odd, to be rounded once more.

    The product of two such values is exact in float64; the sum's error is Knuth's.
    """
    product = a.astype(F64) * b.astype(F64)
    addend = c.astype(F64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    return to_odd(np.asarray(total), np.where(np.isfinite(total), error, 0.0))


def fused_double(a: Array, b: Array, c: Array) -> Array:
    """``a b + c`` of float64, to within a unit in the last place: Dekker's product and Knuth's sum."""
    product = a * b
    halves = []
    for x in (a, b):
        scaled = x * F64(134217729.0)  # 2^27 + 1
        high = scaled - (scaled - x)
        halves.append((high, x - high))
    (ah, al), (bh, bl) = halves
    lost = ((ah * bh - product) + ah * bl + al * bh) + al * bl
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part) + lost
    return np.where(np.isfinite(error), total + error, total)


def float32(x: Array) -> Array:
    """float64 to float32, to the nearest."""
    return np.asarray(x).astype(F32)


def narrowed_odd(x: Array) -> Array:
    """float64 to float32, rounded to odd: may be rounded once more, to 16 bits."""
    x = np.asarray(x)
    near = x.astype(F32)
    back = near.astype(F64)
    bits = near.view(np.int32)
    inexact = (back != x) & ~np.isnan(x)
    bits = np.where(inexact & (np.abs(back) > np.abs(x)), bits - 1, bits)
    return np.where(inexact, bits | 1, bits).view(F32)


def bfloat16_bits(x: Array) -> Array:
    """float32 to the bits of bfloat16, to the nearest; NaN is 0x7FFF."""
    bits = np.asarray(x).view(U32)
    rounded = (bits + (U32(0x7FFF) + ((bits >> U32(16)) & U32(1)))) >> U32(16)
    return np.where(np.isnan(x), U32(0x7FFF), rounded).astype(U16)


def from_bfloat16(bits: Array) -> Array:
    """Bits of bfloat16 to float32."""
    return (np.asarray(bits).astype(U32) << U32(16)).view(F32)


def float16_bits(x: Array) -> Array:
    """float32 to the bits of float16, to the nearest; NaN is 0x7FFF."""
    return np.where(np.isnan(x), U16(0x7FFF), np.asarray(x).astype(np.float16).view(U16))


def from_float16(bits: Array) -> Array:
    """Bits of float16 to float32."""
    return np.asarray(bits).view(np.float16).astype(F32)


def tf32(x: Array) -> Array:
    """float32 to the nearest tf32, ties away from zero (``cvt.rna``)."""
    bits = np.asarray(x).view(U32)
    return np.where(np.isfinite(x), (bits + U32(0x1000)) & U32(0xFFFFE000), bits)


def maximum(a: Array, b: Array, *, nan: bool = False) -> Array:
    """The larger one; a NaN loses, or wins with ``nan``; +0 is larger than -0."""
    found = np.maximum(a, b) if nan else np.fmax(a, b)
    kind = {4: U32, 8: U64}[found.itemsize]
    return np.where(a == b, (np.asarray(a).view(kind) & np.asarray(b).view(kind)).view(found.dtype), found)


def minimum(a: Array, b: Array, *, nan: bool = False) -> Array:
    """The smaller one; a NaN loses, or wins with ``nan``; -0 is smaller than +0."""
    return -maximum(-a, -b, nan=nan)


def disturbed(x: Array, exact: Array, relative: float) -> Array:
    """float32 of ``exact`` (float64), off by up to a relative error; how much and which way, the operand's bits say."""
    mixed = (np.asarray(x).view(U32) * U32(2654435761)) >> U32(8)
    share = mixed.astype(F64) / (1 << 23) - 1.0
    return float32(exact * (1.0 + relative * share))


def exp2_approximate(x: Array) -> Array:
    """``ex2.approx.ftz.f32``: relative error 2^-22.5 or less, 0 and powers of two exact."""
    x = flushed(x)
    exact = np.exp2(x.astype(F64))
    return flushed(np.where(x == np.floor(x), float32(exact), disturbed(x, exact, 2.0**-22.5)))


def rsqrt_approximate(x: Array) -> Array:
    """``rsqrt.approx.ftz.f32``: relative error 2^-22.9 or less."""
    x = flushed(x)
    return flushed(disturbed(x, 1.0 / np.sqrt(x.astype(F64)), 2.0**-22.9))


def reciprocal_gross(x: Array) -> Array:
    """``rcp.approx.ftz.f64``: of the operand's upper 32 bits, to 32 bits; denormals count as zeros."""
    tiny, upper = np.finfo(F64).tiny, np.int64(-(1 << 32))
    x = (np.asarray(x).view(np.int64) & upper).view(F64)
    near = 1.0 / np.where(np.abs(x) < tiny, np.copysign(0.0, x), x)
    near = np.where(np.abs(near) < tiny, np.copysign(0.0, near), near)
    return np.where(np.isnan(x), np.nan, (near.view(np.int64) & upper).view(F64))


def divide_approximate(a: Array, b: Array) -> Array:
    """``div.full.f32``: two units in the last place, and 0 where the divisor is beyond 2^126."""
    exact = a.astype(F64) / b.astype(F64)
    return np.where((np.abs(b) > F32(2.0**126)) & np.isfinite(a), exact * 0.0, disturbed(a, exact, 2.0**-22.0)).astype(
        F32
    )
