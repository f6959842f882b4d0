"""Parser for machine-code listings (SASS): instructions, control flow between them, and loops.

Loops are derived from the control-flow graph, not from backward branches alone: the compiler moves waiting paths out of
line, and their branch back into the middle of a loop is not a loop itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
_TARGET = re.compile(r"\b0x([0-9a-f]+)\s*$")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: its address, name with modifiers, operands, and whether it is predicated (``guarded``)."""

    address: int
    name: str
    operands: str
    guarded: bool

    @property
    def target(self) -> int | None:
        """The branch target: the address at the end of the operands, or None."""
        found = _TARGET.search(self.operands.strip())
        return int(found[1], 16) if found else None


def parse(text: str) -> list[Instruction]:
    """Parse the output of ``cuobjdump -sass`` for a single function into instructions."""
    return [
        Instruction(int(address, 16), name, operands.strip(), bool(guard))
        for address, guard, name, operands in _LINE.findall(text)
    ]


def loops(instructions: list[Instruction]) -> list[frozenset[int]]:
    """Find all natural loops, each as the set of its instructions' indices; loops that share a head are merged."""
    follows = _successors(instructions)
    dominators = _dominators(follows)
    precedes: list[list[int]] = [[] for _ in follows]
    for i in dominators:
        for j in follows[i]:
            precedes[j].append(i)
    bodies: dict[int, set[int]] = {}
    for tail, known in dominators.items():
        for head in follows[tail]:
            # The padding after a program is a branch to itself, but it is unreachable and so has no dominators.
            if known >> head & 1:
                bodies.setdefault(head, {head}).update(_reaching(tail, head, precedes))
    return [frozenset(body) for _, body in sorted(bodies.items())]


def _successors(instructions: list[Instruction]) -> list[list[int]]:
    index = {instruction.address: i for i, instruction in enumerate(instructions)}
    # BSYNC reconverges the threads of the preceding BSSY on the same barrier and continues at that BSSY's target.
    joins: dict[str, list[int]] = {}
    for instruction in instructions:
        if instruction.name.startswith("BSSY") and instruction.target in index:
            joins.setdefault(instruction.operands.split(",")[0], []).append(index[instruction.target])
    result = []
    for i, instruction in enumerate(instructions):
        family, *modifiers = instruction.name.split(".")
        after: list[int] = []
        falls = True
        if family in ("BRA", "JMP"):
            if instruction.target in index:
                after.append(index[instruction.target])
            # A second operand (BRA P0, ...; BRA.U UP0, ...) or divergence (BRA.DIV, BRA.CONV) makes it conditional too.
            falls = instruction.guarded or "," in instruction.operands or "DIV" in modifiers or "CONV" in modifiers
        elif family == "BSYNC":
            after += joins.get(instruction.operands.split(",")[0], [])
        elif family in ("EXIT", "RET"):
            falls = instruction.guarded or "," in instruction.operands
        if falls and i + 1 < len(instructions):
            after.append(i + 1)
        result.append(sorted(set(after)))
    return result


def _dominators(follows: list[list[int]]) -> dict[int, int]:
    """Map each reachable instruction to its dominators, the instructions on every path to it, as bits of an integer."""
    if not follows:
        return {}
    order, seen, stack = [], {0}, [(0, iter(follows[0]))]
    while stack:
        node, rest = stack[-1]
        for after in rest:
            if after not in seen:
                seen.add(after)
                stack.append((after, iter(follows[after])))
                break
        else:
            order.append(node)
            stack.pop()
    order.reverse()
    precedes: dict[int, list[int]] = {node: [] for node in order}
    for node in order:
        for after in follows[node]:
            precedes[after].append(node)
    everything = (1 << len(follows)) - 1
    known = dict.fromkeys(order, everything)
    known[0] = 1
    changed = True
    while changed:
        changed = False
        for node in order[1:]:
            common = everything
            for before in precedes[node]:
                common &= known[before]
            common |= 1 << node
            changed |= common != known[node]
            known[node] = common
    return known


def _reaching(tail: int, head: int, precedes: list[list[int]]) -> Iterable[int]:
    """Return all instructions from which ``tail`` is reachable without passing ``head``, including both of them."""
    found, todo = {head, tail}, [tail] if tail != head else []
    while todo:
        for before in precedes[todo.pop()]:
            if before not in found:
                found.add(before)
                todo.append(before)
    return found
