"""Instructions of single threads that compute: arithmetic, bits and comparisons."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from . import arithmetic
from .errors import EmulationError
from .instructions import TYPES, computes, expect, instruction
from .machine import Step
from .memory import UNSIGNED, Array
from .text import Instruction

# --- arithmetic --------------------------------------------------------------------------------------------


def _halves(function: Callable[..., Array], kind: str) -> Callable[..., Array]:
    """A function of float32 or float64 values, applied to 16-bit values or pairs of them, and rounded."""
    widen, narrow = {
        "bf16": (arithmetic.from_bfloat16, arithmetic.bfloat16_bits),
        "f16": (arithmetic.from_float16, arithmetic.float16_bits),
    }[kind.removesuffix("x2")]

    def single(*operands: Array) -> Array:
        return narrow(arithmetic.narrowed_odd(function(*map(widen, operands))))

    def pair(*operands: Array) -> Array:
        low = single(*(x.astype(np.uint16) for x in operands)).astype(np.uint32)
        high = single(*((x >> np.uint32(16)).astype(np.uint16) for x in operands)).astype(np.uint32)
        return low | (high << np.uint32(16))

    return pair if kind.endswith("x2") else single


def _sum(a: Array, b: Array) -> Array:
    return arithmetic.fused(a, np.ones_like(a), b)


def _difference(a: Array, b: Array) -> Array:
    return arithmetic.fused(a, np.ones_like(a), -b)


def _product(a: Array, b: Array) -> Array:
    return a.astype(np.float64) * b.astype(np.float64)


_SIXTEEN = {"add": _sum, "sub": _difference, "mul": _product, "fma": arithmetic.fused}
_PLAIN: dict[str, Callable[..., Array]] = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}


def _high(a: Array, b: Array) -> Array:
    wide = np.dtype(f"{a.dtype.kind}{a.itemsize * 2}")
    return ((a.astype(wide) * b.astype(wide)) >> wide.type(8 * a.itemsize)).astype(a.dtype)


def _wide(a: Array, b: Array) -> Array:
    wide = np.dtype(f"{a.dtype.kind}{a.itemsize * 2}")
    return a.astype(wide) * b.astype(wide)


@instruction("add", "sub", "mul", "fma", "mad")
def _arithmetic(at: Instruction) -> Step:
    name, kind = at.opcode[0], at.opcode[-1]
    if kind in ("bf16", "f16") and "f32" in at.opcode:
        return _mixed(name, kind, at)
    if kind == "f32x2":
        return computes(_both(_fused("f32", "ftz" in at.opcode) if name == "fma" else _PLAIN[name], "f32"), "b64", at)
    if kind in ("s16x2", "u16x2"):
        return computes(_both(_PLAIN[name], kind.removesuffix("x2")), "b32", at)
    if kind.removesuffix("x2") in ("bf16", "f16"):
        container = "b32" if kind.endswith("x2") else "b16"
        return computes(_halves(_SIXTEEN[name], kind), container, at)
    if name == "fma":
        return computes(_fused(kind, "ftz" in at.opcode), kind, at)
    if "ftz" in at.opcode:
        plain = _PLAIN[name]
        return computes(lambda a, b: arithmetic.flushed(plain(arithmetic.flushed(a), arithmetic.flushed(b))), kind, at)
    if "hi" in at.opcode and name == "mul":
        return computes(_high, kind, at)
    if "wide" in at.opcode:
        if name == "mul":
            return computes(_wide, kind, at)
        wide = f"{kind[0]}{2 * int(kind[1:])}"
        return computes(lambda a, b, c: _wide(a, b) + c, kind, at, (kind, kind, wide))
    if name == "mad" and "lo" in at.opcode:
        return computes(lambda a, b, c: a * b + c, kind, at)
    if "hi" in at.opcode or name == "mad":
        raise EmulationError(f"unknown instruction {'.'.join(at.opcode)}")
    return computes(_PLAIN[name], kind, at)


def _fused(kind: str, flush: bool) -> Callable[..., Array]:
    if kind == "f64" and not flush:
        return arithmetic.fused_double
    if not flush:
        return lambda a, b, c: arithmetic.float32(arithmetic.fused(a, b, c))
    flushed = arithmetic.flushed
    return lambda a, b, c: flushed(arithmetic.float32(arithmetic.fused(flushed(a), flushed(b), flushed(c))))


def _mixed(name: str, kind: str, at: Instruction) -> Step:
    """float32 operations whose first operand, or both factors, have 16 bits."""
    widen = {"bf16": arithmetic.from_bfloat16, "f16": arithmetic.from_float16}[kind]
    if name == "fma":
        fused = _fused("f32", flush=False)
        return computes(lambda a, b, c: fused(widen(a), widen(b), c), "", at, ("b16", "b16", "f32"))
    plain = _PLAIN[name]
    return computes(lambda a, c: plain(widen(a), c), "", at, ("b16", "f32"))


def _both(function: Callable[..., Array], kind: str) -> Callable[..., Array]:
    """A function of values of this type, applied to pairs of them in twice the bits."""
    dtype = TYPES[kind]
    half, whole = UNSIGNED[dtype.itemsize], UNSIGNED[2 * dtype.itemsize]
    bits = whole(8 * dtype.itemsize)

    def pair(*operands: Array) -> Array:
        low = function(*(x.astype(half).view(dtype) for x in operands))
        high = function(*((x >> bits).astype(half).view(dtype) for x in operands))
        low, high = (np.asarray(x).view(half).astype(whole) for x in (low, high))
        return low | (high << bits)

    return pair


@instruction("div")
def _divide(at: Instruction) -> Step:
    kind = at.opcode[-1]
    if at.opcode[1:] == ("full", "f32"):
        return computes(arithmetic.divide_approximate, kind, at)
    if at.opcode[1] == "rn":
        return computes(operator.truediv, kind, at)
    if kind[0] in "su":
        return computes(_quotient, kind, at)
    raise EmulationError(f"unknown instruction {'.'.join(at.opcode)}")


def _quotient(a: Array, b: Array) -> Array:
    """Whole numbers, towards zero."""
    if (b == 0).any():
        raise EmulationError("division by zero")
    found = np.abs(a) // np.abs(b) if a.dtype.kind == "i" else a // b
    return np.where((a < 0) != (b < 0), -found, found).astype(a.dtype) if a.dtype.kind == "i" else found


@instruction("rem")
def _remainder(at: Instruction) -> Step:
    return computes(lambda a, b: a - _quotient(a, b) * b, at.opcode[-1], at)


@instruction("sqrt")
def _root(at: Instruction) -> Step:
    if at.opcode[1] != "rn":
        raise EmulationError(f"unknown instruction {'.'.join(at.opcode)}")
    return computes(np.sqrt, at.opcode[-1], at)


@instruction("ex2")
def _exp2(at: Instruction) -> Step:
    expect(at, "ex2.approx.ftz.f32")
    return computes(arithmetic.exp2_approximate, "f32", at)


@instruction("rsqrt")
def _rsqrt(at: Instruction) -> Step:
    expect(at, "rsqrt.approx.ftz.f32", "rsqrt.approx.f64")
    if at.opcode[-1] == "f64":
        return computes(lambda x: 1.0 / np.sqrt(x), "f64", at)
    return computes(arithmetic.rsqrt_approximate, "f32", at)


@instruction("rcp")
def _reciprocal(at: Instruction) -> Step:
    expect(at, "rcp.approx.ftz.f64")
    return computes(arithmetic.reciprocal_gross, "f64", at)


@instruction("min", "max")
def _extreme(at: Instruction) -> Step:
    largest, kind, nan = at.opcode[0] == "max", at.opcode[-1], "NaN" in at.opcode
    if kind[0] == "f":
        function = arithmetic.maximum if largest else arithmetic.minimum
        return computes(lambda a, b: function(a, b, nan=nan), kind, at)
    return computes(np.maximum if largest else np.minimum, kind, at)


@instruction("neg")
def _negate(at: Instruction) -> Step:
    if "ftz" in at.opcode:
        return computes(lambda x: arithmetic.flushed(-x), at.opcode[-1], at)
    return computes(operator.neg, at.opcode[-1], at)


@instruction("abs")
def _absolute(at: Instruction) -> Step:
    if "ftz" in at.opcode:
        return computes(lambda x: arithmetic.flushed(np.abs(x)), at.opcode[-1], at)
    return computes(np.abs, at.opcode[-1], at)


# --- bits --------------------------------------------------------------------------------------------------


_LOGIC = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


@instruction(*_LOGIC)
def _logic(at: Instruction) -> Step:
    return computes(_LOGIC[at.opcode[0]], at.opcode[-1], at)


@instruction("not")
def _complement(at: Instruction) -> Step:
    return computes(operator.invert, at.opcode[-1], at)


@instruction("popc")
def _ones(at: Instruction) -> Step:
    kind = at.opcode[-1]

    def ones(a: Array) -> Array:
        total = np.zeros(np.shape(a), np.uint32)
        for i in range(TYPES[kind].itemsize * 8):
            total = total + ((a >> a.dtype.type(i)) & a.dtype.type(1)).astype(np.uint32)
        return total

    return computes(ones, kind, at)


@instruction("shl", "shr")
def _shift(at: Instruction) -> Step:
    kind, left = at.opcode[-1], at.opcode[0] == "shl"
    width = TYPES[kind].itemsize * 8

    def shift(a: Array, by: Array) -> Array:
        beyond, by = by >= width, np.minimum(by, np.uint32(width - 1)).astype(a.dtype)
        if left:
            return np.where(beyond, a.dtype.type(0), a << by)
        return a >> by if kind[0] == "s" else np.where(beyond, a.dtype.type(0), a >> by)

    return computes(shift, kind, at, (kind, "u32"))


@instruction("bfe")
def _field(at: Instruction) -> Step:
    """Bit fields; the operands of Triton are constants."""
    kind = at.opcode[-1]
    width = TYPES[kind].itemsize * 8

    def extract(a: Array, start: Array, length: Array) -> Array:
        first, size = int(start), int(length)
        if not 0 < size <= width - first:
            raise EmulationError(f"bfe of {size} bits from bit {first}")
        up = a.dtype.type(width - first - size)
        return (a << up) >> a.dtype.type(width - size)

    return computes(extract, kind, at, (kind, "u32", "u32"))


@instruction("prmt")
def _permute(at: Instruction) -> Step:
    """Picks four bytes of two words; a selector's highest bit replicates the byte's sign."""
    expect(at, "prmt.b32")

    def pick(a: Array, b: Array, selector: Array) -> Array:
        both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        result = np.uint32(0)
        for i in range(4):
            choice = (selector >> np.uint32(4 * i)) & np.uint32(15)
            byte = ((both >> ((choice & np.uint32(7)) * np.uint32(8)).astype(np.uint64)) & np.uint64(255)).astype(
                np.uint32
            )
            sign = np.where(byte & np.uint32(0x80), np.uint32(255), np.uint32(0))
            result = result | (np.where(choice & np.uint32(8), sign, byte) << np.uint32(8 * i))
        return np.asarray(result, np.uint32)

    return computes(pick, "b32", at)


# --- comparisons -------------------------------------------------------------------------------------------


_COMPARE: dict[str, Callable[..., Any]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge,
    "nan": lambda a, b: np.isnan(a) | np.isnan(b), "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
}  # fmt: skip


@instruction("setp")
def _compare(at: Instruction) -> Step:
    name, kind = at.opcode[1], at.opcode[-1]
    if len(at.opcode) != 3:
        raise EmulationError(f"unknown instruction {'.'.join(at.opcode)}")
    if kind[0] == "f" and name not in ("nan", "num"):
        # With a NaN, an ordered comparison is false and an unordered one true.
        unordered = name.endswith("u") and name != "u"
        base = _COMPARE[name.removesuffix("u") if unordered else name]
        return computes(lambda a, b: np.where(np.isnan(a) | np.isnan(b), unordered, base(a, b)).astype(bool), kind, at)
    return computes(lambda a, b: np.asarray(_COMPARE[name](a, b)), kind, at)


@instruction("selp")
def _select(at: Instruction) -> Step:
    kind = at.opcode[-1]
    return computes(lambda a, b, p: np.where(p, a, b).astype(a.dtype), kind, at, (kind, kind, "pred"))
