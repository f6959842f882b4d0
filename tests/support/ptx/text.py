"""PTX text to instructions: the subset that Triton's compiler writes."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from .errors import EmulationError


@dataclass(frozen=True, slots=True)
class Register:
    """A virtual register; ``bits`` is 1 for a predicate."""

    index: int
    bits: int


@dataclass(frozen=True, slots=True)
class Immediate:
    """A constant: the bits of a floating-point one, or a whole number of any sign."""

    value: int


@dataclass(frozen=True, slots=True)
class Name:
    """A special register such as ``%tid.x``, a label, or a variable."""

    text: str


@dataclass(frozen=True, slots=True)
class Vector:
    """``{a, b, ...}``; a part that is not used is None."""

    parts: tuple[Operand | None, ...]


@dataclass(frozen=True, slots=True)
class Address:
    """``[base + offset]``."""

    base: Register | Name
    offset: int


Operand = Register | Immediate | Name | Vector | Address


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: the opcode's parts, e.g. ``("ld", "global", "v4", "b32")``.
        operands: in the order of the text.
        guard: the predicate register under which it executes, and whether that is negated; None if unconditional.
        where: line of the PTX, its text, and the Python line it was compiled from, for messages.
    """

    opcode: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: tuple[Register, bool] | None
    where: str


@dataclass
class Program:
    """A kernel's instructions in basic blocks.

    Attributes:
        name: of the kernel.
        parameters: names and PTX types (``"u64"``) of the parameters.
        registers: number of virtual registers.
        threads: threads per program.
        blocks: instructions between labels, branches and barriers.
        labels: label -> index of its block.
        tables: label of a branch table -> its labels.
        undefined: registers that nothing writes. LLVM has some, where it works on pairs and needs only one of them.
    """

    name: str = ""
    parameters: list[tuple[str, str]] = field(default_factory=list)
    registers: int = 0
    threads: int = 0
    blocks: list[list[Instruction]] = field(default_factory=lambda: [[]])
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    undefined: list[Register] = field(default_factory=list)

    def uses(self, name: str) -> bool:
        """Return whether some opcode begins so."""
        return any(at.opcode[0] == name for block in self.blocks for at in block)


ENDS = ("bra", "brx", "ret", "exit", "trap")
_STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_REGISTERS = re.compile(r"\.reg\s+\.(pred|[a-z](\d+))\s+%(\w+)<(\d+)>")
_OPERANDS = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
_HALF = re.compile(r"\{ \.reg \.b32 (\w+); (mov\.b64 \{\S+, \S+\}, %\w+;) \}")
_FILE = re.compile(r"\.loc\s.*//\s*(\S+)")


def parse(text: str) -> Program:
    """Read one kernel.

    Raises:
        EmulationError: the text has a form that is not known here.
    """
    program = Program()
    head, body = _split(text)
    program.name = re.search(r"\.entry\s+(\w+)", head)[1]  # type: ignore[index]
    program.parameters = [(n, t) for t, n in re.findall(r"\.param\s+\.(\w+)[^,)]*?\s(\w+)\s*[,)\n]", head)]
    program.threads = int(re.search(r"\.reqntid\s+(\d+)", head)[1])  # type: ignore[index]
    registers = _registers(body)
    program.registers = len(registers)
    for number, line, python in _statements(body):
        _add(program, registers, line, f"{line!r} (line {number} of the body, {python})")
    if program.blocks[-1]:
        program.blocks.append([])
    program.undefined = _unwritten(program, registers.values())
    return program


def _unwritten(program: Program, registers: Iterable[Register]) -> list[Register]:
    targets = [at.operands[0] for block in program.blocks for at in block if at.operands]
    written = {part for x in targets for part in (x.parts if isinstance(x, Vector) else (x,))}
    return [register for register in registers if register not in written]


def _split(text: str) -> tuple[str, str]:
    start = text.index(".visible .entry")
    opening = text.index("\n{", start)
    return text[start:opening], text[opening + 2 : text.index("\n}", opening)]


def _registers(body: str) -> dict[str, Register]:
    found: dict[str, Register] = {}
    for kind, bits, prefix, count in _REGISTERS.findall(body):
        for i in range(int(count)):
            found[f"%{prefix}{i}"] = Register(len(found), 1 if kind == "pred" else int(bits))
    return found


def _statements(body: str) -> Iterator[tuple[int, str, str]]:
    """Yield labels and instructions, with their line and the Python line they come from."""
    python, pending, first = "?", "", 0
    for number, raw in enumerate(body.splitlines(), start=1):
        if source := _FILE.search(raw):
            python = source[1]
        line = raw.partition("//")[0].strip()
        if half := _HALF.fullmatch(line):  # libdevice names the part that it does not use
            line = re.sub(rf"\b{half[1]}\b", "_", half[2])
        if not line or line.startswith((".loc", ".reg", ".file", ".pragma", "}")):
            continue
        first = first if pending else number
        pending = f"{pending} {line}".strip()
        if pending.endswith((";", ":")):
            yield first, pending, python
            pending = ""
    if pending:
        raise EmulationError(f"statement without an end: {pending!r}")


def _add(program: Program, registers: dict[str, Register], line: str, where: str) -> None:
    if label := re.fullmatch(r"(\$\w+):", line):
        if program.blocks[-1]:
            program.blocks.append([])
        program.labels[label[1]] = len(program.blocks) - 1
        return
    if table := re.fullmatch(r"(\$\w+):\s*\.branchtargets\s+(.*);", line):
        program.tables[table[1]] = [name.strip() for name in table[2].split(",")]
        return
    match = _STATEMENT.fullmatch(line.rstrip(";").strip())
    if match is None:
        raise EmulationError(f"not understood: {where}")
    negated, guard, opcode, rest = match.groups()
    instruction = Instruction(
        opcode=tuple(re.split(r"\.|::", opcode)),
        operands=tuple(_operand(word, registers) for word in _OPERANDS.findall(rest)),
        guard=None if guard is None else (registers[guard], bool(negated)),
        where=where,
    )
    program.blocks[-1].append(instruction)
    if instruction.opcode[0] in ENDS or instruction.opcode[:2] == ("bar", "sync"):
        program.blocks.append([])


def _operand(text: str, registers: dict[str, Register]) -> Operand:
    if text.startswith("{"):
        parts = [part.strip() for part in text[1:-1].split(",")]
        return Vector(tuple(None if part == "_" else _operand(part, registers) for part in parts))
    if text.startswith("["):
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        found = registers.get(base, Name(base))
        return Address(found, int(offset, 0) if offset else 0)
    if text in registers:
        return registers[text]
    if match := re.fullmatch(r"0[fd]([0-9A-Fa-f]+)", text):
        return Immediate(int(match[1], 16))
    if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", text):
        return Immediate(int(text.rstrip("U"), 0))
    return Name(text)


def float_bits(value: float, kind: str) -> int:
    """Return the bits of a float as a parameter of PTX type ``"f32"`` or ``"f64"``."""
    codes = {"f32": ("<f", "<I"), "f64": ("<d", "<Q")}[kind]
    return int(struct.unpack(codes[1], struct.pack(codes[0], value))[0])
