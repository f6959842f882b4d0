"""What instructions are made of: reading operands, writing results, and the table of all that are known.

Each entry of ``INSTRUCTIONS`` makes an instruction a step, a function of the machine's state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .errors import EmulationError
from .machine import Machine, Step
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


def expect(at: Instruction, *names: str) -> None:
    """Refuse an instruction that is none of these."""
    if ".".join(at.opcode) not in names:
        raise EmulationError(f"unknown instruction {'.'.join(at.opcode)}")


def registers_of(operand: Operand) -> list[Register]:
    """Return a register, or all of a vector, as a list."""
    parts = operand.parts if isinstance(operand, Vector) else (operand,)
    found = [x for x in parts if isinstance(x, Register)]
    if len(found) != len(parts):
        raise EmulationError(f"expected registers, got {operand}")
    return found


def address_of(operand: Operand, kind: str) -> Read:
    """Return a function that computes an address."""
    if not isinstance(operand, Address):
        raise EmulationError(f"expected an address, got {operand}")
    read = reader(operand.base, kind)
    offset = TYPES[kind].type(operand.offset & ((1 << 8 * TYPES[kind].itemsize) - 1))
    return lambda machine: read(machine) + offset
