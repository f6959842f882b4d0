"""Instructions of single threads: arithmetic, conversions, moves, loads and stores.

Each entry of ``INSTRUCTIONS`` makes an instruction a step, a function of the machine's state.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from . import arithmetic
from .errors import EmulationError
from .machine import Bools, Machine, Step
from .memory import UNSIGNED, Array
from .text import Address, Immediate, Instruction, Name, Operand, Register, Vector

Builder = Callable[[Instruction], Step]
Read = Callable[[Machine], Array]
INSTRUCTIONS: dict[str, Builder] = {}

TYPES: dict[str, Any] = {
    **{f"{kind}{bits}": np.dtype(f"{code}{bits // 8}") for bits in (8, 16, 32, 64) for kind, code in
       (("u", "u"), ("b", "u"), ("s", "i"))},
    "f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype(bool),
}  # fmt: skip


def instruction(*names: str) -> Callable[[Builder], Builder]:
    """Decorator that enters a builder for opcodes that begin so."""

    def enter(builder: Builder) -> Builder:
        INSTRUCTIONS.update(dict.fromkeys(names, builder))
        return builder

    return enter


def reader(operand: Operand, kind: str) -> Read:
    """Return a function that reads an operand as a PTX type."""
    dtype = TYPES[kind]
    if isinstance(operand, Register):
        index, wide = operand.index, max(operand.bits // 8, 1)

        def read(machine: Machine) -> Array:
            value = machine.registers[index]
            if value is None:
                raise EmulationError("a register is read before it is written")
            if wide > dtype.itemsize:
                value = value.astype(UNSIGNED[dtype.itemsize])
            elif wide < dtype.itemsize:
                raise EmulationError(f"a register of {8 * wide} bits is read as {kind}")
            return value.view(dtype)

        return read
    if isinstance(operand, Immediate):
        if kind == "pred":
            value = np.bool_(operand.value != 0)
        else:
            size = dtype.itemsize
            value = UNSIGNED[size](operand.value & ((1 << 8 * size) - 1)).view(dtype)
        return lambda machine: value
    if isinstance(operand, Name):
        name = operand.text
        if name.startswith("%"):
            return lambda machine: machine.special[name].view(dtype)
        if name == "global_smem":
            zero = dtype.type(0)
            return lambda machine: zero
    raise EmulationError(f"{operand} cannot be read as {kind}")


def bits(value: Array, register: Register) -> Array:
    """Return a result as a register's bits, sign- or zero-extended by its type."""
    value = np.asarray(value)
    if register.bits == 1:
        return value
    wanted = UNSIGNED[register.bits // 8]
    if value.itemsize * 8 == register.bits:
        return value.view(wanted)
    extended = value.astype(np.dtype(f"{value.dtype.kind}{register.bits // 8}"))
    return extended.view(wanted)


def computes(function: Callable[..., Array], kind: str, at: Instruction, kinds: tuple[str, ...] | None = None) -> Step:
    """A step that writes ``function`` of the operands, read as ``kind`` or as ``kinds``, to the first operand."""
    target = at.operands[0]
    if not isinstance(target, Register):
        raise EmulationError(f"expected a register, got {target}")
    sources = [reader(x, k) for x, k in zip(at.operands[1:], kinds or [kind] * len(at.operands), strict=False)]
    guard = at.guard

    def step(machine: Machine) -> None:
        result = function(*(read(machine) for read in sources))
        machine.put(target, bits(result, target), machine.active(guard))

    return step


# --- arithmetic --------------------------------------------------------------------------------------------


def _halves(function: Callable[..., Array], kind: str) -> Callable[..., Array]:
    """A function of float32 or float64 values, applied to 16-bit values or pairs of them, and rounded."""
    widen, narrow = {
        "bf16": (arithmetic.from_bfloat16, arithmetic.bfloat16_bits),
        "f16": (arithmetic.from_float16, _half_bits),
    }[kind.removesuffix("x2")]

    def single(*operands: Array) -> Array:
        return narrow(arithmetic.narrowed_odd(function(*map(widen, operands))))

    def pair(*operands: Array) -> Array:
        low = single(*(x.astype(np.uint16) for x in operands)).astype(np.uint32)
        high = single(*((x >> np.uint32(16)).astype(np.uint16) for x in operands)).astype(np.uint32)
        return low | (high << np.uint32(16))

    return pair if kind.endswith("x2") else single


def _half_bits(x: Array) -> Array:
    """float32, rounded to odd from a wider value, to float16."""
    return arithmetic.float16_bits(x)


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
        return computes(_both(_fused("f32", "ftz" in at.opcode) if name == "fma" else _PLAIN[name]), "b64", at)
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


def _both(function: Callable[..., Array]) -> Callable[..., Array]:
    """A function of float32 values, applied to pairs of them in 64 bits."""

    def pair(*operands: Array) -> Array:
        low, high = (
            function(*((x >> np.uint64(shift)).astype(np.uint32).view(np.float32) for x in operands))
            for shift in (0, 32)
        )
        words = (np.asarray(x).view(np.uint32).astype(np.uint64) for x in (low, high))
        return next(words) | (next(words) << np.uint64(32))

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
    _expect(at, "ex2.approx.ftz.f32")
    return computes(arithmetic.exp2_approximate, "f32", at)


@instruction("rsqrt")
def _rsqrt(at: Instruction) -> Step:
    _expect(at, "rsqrt.approx.ftz.f32", "rsqrt.approx.f64")
    if at.opcode[-1] == "f64":
        return computes(lambda x: 1.0 / np.sqrt(x), "f64", at)
    return computes(arithmetic.rsqrt_approximate, "f32", at)


@instruction("rcp")
def _reciprocal(at: Instruction) -> Step:
    _expect(at, "rcp.approx.ftz.f64")
    return computes(arithmetic.reciprocal_gross, "f64", at)


def _expect(at: Instruction, *names: str) -> None:
    if ".".join(at.opcode) not in names:
        raise EmulationError(f"unknown instruction {'.'.join(at.opcode)}")


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
    _expect(at, "prmt.b32")

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


# --- conversions and moves ---------------------------------------------------------------------------------


_CONVERSIONS: dict[str, tuple[Callable[..., Array], tuple[str, ...]]] = {
    "cvt.f32.bf16": (arithmetic.from_bfloat16, ("b16",)),
    "cvt.f64.bf16": (lambda x: arithmetic.from_bfloat16(x).astype(np.float64), ("b16",)),
    "cvt.f32.f16": (arithmetic.from_float16, ("b16",)),
    "cvt.f64.f16": (lambda x: arithmetic.from_float16(x).astype(np.float64), ("b16",)),
    "cvt.f64.f32": (lambda x: x.astype(np.float64), ("f32",)),
    "cvt.rn.f32.f64": (arithmetic.float32, ("f64",)),
    "cvt.rn.bf16.f32": (arithmetic.bfloat16_bits, ("f32",)),
    "cvt.rn.f16.f32": (arithmetic.float16_bits, ("f32",)),
    "cvt.rn.bf16.f64": (lambda x: arithmetic.bfloat16_bits(arithmetic.narrowed_odd(x)), ("f64",)),
    "cvt.rn.f16.f64": (lambda x: arithmetic.float16_bits(arithmetic.narrowed_odd(x)), ("f64",)),
    "cvt.rna.tf32.f32": (arithmetic.tf32, ("f32",)),
    "cvt.rn.bf16x2.f32": (lambda a, b: _packed(arithmetic.bfloat16_bits, a, b), ("f32", "f32")),
    "cvt.rn.f16x2.f32": (lambda a, b: _packed(arithmetic.float16_bits, a, b), ("f32", "f32")),
}


def _packed(narrow: Callable[[Array], Array], high: Array, low: Array) -> Array:
    return (narrow(high).astype(np.uint32) << np.uint32(16)) | narrow(low).astype(np.uint32)


@instruction("cvt")
def _convert(at: Instruction) -> Step:
    name = ".".join(at.opcode)
    if name in _CONVERSIONS:
        function, kinds = _CONVERSIONS[name]
        return computes(function, "", at, kinds)
    to, source = at.opcode[-2:]
    if source[0] in "us" and to[0] == "f" and at.opcode[1] == "rn":
        return computes(lambda x: x.astype(TYPES[to]), source, at)
    if source[0] in "us" and to[0] in "us" and len(at.opcode) == 3:
        return computes(lambda x: x.astype(TYPES[to]), source, at)
    raise EmulationError(f"unknown instruction {name}")


@instruction("mov")
def _move(at: Instruction) -> Step:
    kind = at.opcode[-1]
    target, source = at.operands
    if isinstance(target, Vector):
        return _split(at, target, reader(source, kind))
    if isinstance(source, Vector):
        return _join(at, source)
    return computes(lambda x: x, kind, at)


def _split(at: Instruction, target: Vector, read: Read) -> Step:
    parts = [(i, x) for i, x in enumerate(target.parts) if isinstance(x, Register)]

    def step(machine: Machine) -> None:
        value, active = read(machine), machine.active(at.guard)
        for i, register in parts:
            shifted = value >> value.dtype.type(i * register.bits)
            machine.put(register, shifted.astype(UNSIGNED[register.bits // 8]), active)

    return step


def _join(at: Instruction, source: Vector) -> Step:
    target = at.operands[0]
    assert isinstance(target, Register)
    width = target.bits // len(source.parts)
    reads = [reader(x, f"b{width}") for x in source.parts if x is not None]
    wide = UNSIGNED[target.bits // 8]

    def step(machine: Machine) -> None:
        total = wide(0)
        for i, read in enumerate(reads):
            total = total | (read(machine).astype(wide) << wide(i * width))
        machine.put(target, np.asarray(total), machine.active(at.guard))

    return step


# --- loads and stores --------------------------------------------------------------------------------------


def address_of(operand: Operand, kind: str) -> Read:
    """Return a function that computes an address."""
    if not isinstance(operand, Address):
        raise EmulationError(f"expected an address, got {operand}")
    read = reader(operand.base, kind)
    offset = TYPES[kind].type(operand.offset & ((1 << 8 * TYPES[kind].itemsize) - 1))
    return lambda machine: read(machine) + offset


@instruction("ld")
def _load(at: Instruction) -> Step:
    kind = at.opcode[-1]
    dtype = TYPES[kind]
    targets = _registers(at.operands[0])
    if at.opcode[1] == "param":
        return _parameter(at, targets[0], kind)
    space, width, guard = at.opcode[1], dtype.itemsize, at.guard
    address = address_of(at.operands[1], "u64" if space == "global" else "u32")

    def step(machine: Machine) -> None:
        active = machine.active(guard)
        where = machine.full(address(machine), active)
        found = _fetch(machine, space, where, width, len(targets), active)
        for register, value in zip(targets, found, strict=True):
            result = bits(value.view(dtype), register)
            if active is not None:
                spread = np.zeros(machine.count, result.dtype)
                spread[active] = result
                result = spread
            machine.put(register, result, active)

    return step


def _fetch(machine: Machine, space: str, where: Array, width: int, count: int, active: Bools | None) -> list[Array]:
    if space == "global":
        threads, epochs = machine.full(machine.thread, active), machine.full(machine.epochs, active)
        return machine.memory.load(where, width, count, threads, epochs)
    if space == "shared":
        indices = machine.shared.indices(where, machine.full(machine.local, active), width * count) // width
        elements = machine.shared.elements(width)
        return [elements[indices + i] for i in range(count)]
    raise EmulationError(f"unknown memory {space}")


def _registers(operand: Operand) -> list[Register]:
    parts = operand.parts if isinstance(operand, Vector) else (operand,)
    found = [x for x in parts if isinstance(x, Register)]
    if len(found) != len(parts):
        raise EmulationError(f"expected registers, got {operand}")
    return found


def _parameter(at: Instruction, target: Register, kind: str) -> Step:
    operand = at.operands[1]
    if not isinstance(operand, Address) or not isinstance(operand.base, Name) or operand.offset:
        raise EmulationError(f"expected a parameter, got {operand}")
    name = operand.base.text
    size = TYPES[kind].itemsize

    def step(machine: Machine) -> None:
        value = UNSIGNED[size](machine.parameters[name] & ((1 << 8 * size) - 1))
        machine.put(target, bits(value.view(TYPES[kind]), target), machine.active(at.guard))

    return step


@instruction("st")
def _store(at: Instruction) -> Step:
    kind, space = at.opcode[-1], at.opcode[1]
    width = TYPES[kind].itemsize
    address = address_of(at.operands[0], "u64" if space == "global" else "u32")
    source = at.operands[1]
    parts = source.parts if isinstance(source, Vector) else (source,)
    reads = [reader(x, f"b{8 * width}") for x in parts if x is not None]

    def step(machine: Machine) -> None:
        active = machine.active(at.guard)
        where = machine.full(address(machine), active)
        values = [machine.full(read(machine), active) for read in reads]
        if space == "global":
            threads, epochs = machine.full(machine.thread, active), machine.full(machine.epochs, active)
            machine.memory.store(where, width, values, threads, epochs)
            return
        programs = machine.full(machine.local, active)
        indices = machine.shared.indices(where, programs, width * len(values)) // width
        elements = machine.shared.elements(width)
        for i, value in enumerate(values):
            elements[indices + i] = value

    if space not in ("global", "shared"):
        raise EmulationError(f"unknown memory {space}")
    return step
