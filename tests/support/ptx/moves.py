"""Instructions of single threads that move values: conversions, moves, loads and stores."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import arithmetic
from .errors import EmulationError
from .instructions import TYPES, Read, address_of, bits, computes, instruction, reader, registers_of
from .machine import Bools, Machine, Step
from .memory import UNSIGNED, Array
from .text import Address, Instruction, Name, Register, Vector

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


@instruction("ld")
def _load(at: Instruction) -> Step:
    kind = at.opcode[-1]
    dtype = TYPES[kind]
    targets = registers_of(at.operands[0])
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
