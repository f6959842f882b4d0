"""What ends a basic block: branches, returns and barriers; and whole programs made executable."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import moves, scalar, warps  # noqa: F401  (they enter their instructions)
from .errors import EmulationError
from .instructions import INSTRUCTIONS, reader
from .machine import Machine, Step
from .memory import Array
from .text import ENDS, Immediate, Instruction, Name, Program

End = Callable[[Machine], tuple[str, Array]]
Block = tuple[list[Step], End]


def prepare(program: Program) -> list[Block]:
    """Return each block's steps and its end.

    Raises:
        EmulationError: an instruction is not known.
    """
    blocks = []
    for number, instructions in enumerate(program.blocks):
        last = instructions[-1] if instructions and _ends(instructions[-1]) else None
        body = instructions if last is None else instructions[:-1]
        blocks.append(([_located(at, _build) for at in body], _end(program, number, last)))
    return blocks


def _ends(at: Instruction) -> bool:
    return at.opcode[0] in ENDS or at.opcode[:2] == ("bar", "sync")


def _build(at: Instruction) -> Step:
    if at.opcode[0] not in INSTRUCTIONS:
        raise EmulationError(f"unknown instruction {'.'.join(at.opcode)}")
    return INSTRUCTIONS[at.opcode[0]](at)


def _located(at: Instruction, build: Callable[[Instruction], Step]) -> Step:
    """Build a step whose errors say where they happened."""
    try:
        step = build(at)
    except Exception as error:
        raise EmulationError(f"{error}, at {at.where}") from error

    def checked(machine: Machine) -> None:
        try:
            step(machine)
        except Exception as error:
            raise EmulationError(f"{error}, at {at.where}") from error

    return checked


def _end(program: Program, number: int, at: Instruction | None) -> End:
    following = np.int64(number + 1)
    done = np.int64(len(program.blocks))
    if at is None:
        return lambda machine: ("at", following)
    name = at.opcode[0]
    if name == "bar":
        if at.operands != (Immediate(0),) or at.guard is not None:
            raise EmulationError(f"unknown barrier, at {at.where}")
        return lambda machine: ("barrier", following)
    if name == "brx":
        return _table(program, at)
    if name == "bra":
        label = at.operands[0]
        assert isinstance(label, Name)
        target = np.int64(program.labels[label.text])
    elif name in ("ret", "exit"):
        target = done
    else:
        raise EmulationError(f"unknown instruction {'.'.join(at.opcode)}, at {at.where}")

    def go(machine: Machine) -> tuple[str, Array]:
        active = machine.active(at.guard)
        if active is None:
            return "at", target
        return "at", np.where(active, target, following)

    return go


def _table(program: Program, at: Instruction) -> End:
    index, label = at.operands
    assert isinstance(label, Name)
    targets = np.array([program.labels[name] for name in program.tables[label.text]], np.int64)
    read = reader(index, "u32")

    def go(machine: Machine) -> tuple[str, Array]:
        chosen = np.broadcast_to(read(machine), machine.count)
        return "at", targets[np.minimum(chosen, len(targets) - 1)]

    return go
