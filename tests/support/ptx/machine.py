"""Threads of some programs of a grid, executed a basic block at a time.

All threads that are at the same block run it together as NumPy arrays; where control flow diverges, the earliest block
of the text that some thread waits to run is next, so that threads meet again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from .errors import EmulationError
from .memory import UNSIGNED, Array, GlobalMemory, SharedMemory
from .text import Program, Register

Bools = NDArray[np.bool_]
Step = Callable[["Machine"], None]
WARP = 32


class Machine:
    """State of the threads.

    Attributes:
        registers: a register's bits for every thread as unsigned integers (bool for predicates); a single value where
            it is the same constant for all; None until it is written. A register that nothing writes has any bits.
        mask: threads that execute the current block; None for all.
        programs, threads: number of programs, and of threads in each.
        local: each thread's program, among those that are emulated together.
        thread: each thread's number within the grid.
        epochs: number of barriers that each thread has passed.
        group: threads that must run together: a warp, or four of them where the program has products of four warps.
    """

    def __init__(
        self,
        program: Program,
        parameters: Mapping[str, int],
        places: Sequence[tuple[int, int, int]],
        first: int,
        grid: tuple[int, int, int],
        shared: int,
        memory: GlobalMemory,
    ) -> None:
        self.parameters, self.memory = parameters, memory
        self.programs, self.threads = len(places), program.threads
        count = self.programs * self.threads
        self.registers: list[Array | None] = [None] * program.registers
        for register in program.undefined:
            self.registers[register.index] = _any_bits(count, register.bits)
        self.mask: Bools | None = None
        self.local = np.repeat(np.arange(self.programs), self.threads)
        self.thread = first * self.threads + np.arange(count)
        tid = np.tile(np.arange(self.threads, dtype=np.uint32), self.programs)
        axes = np.repeat(np.array(places, np.uint32), self.threads, axis=0)
        zero = np.uint32(0)
        self.special: dict[str, Array] = {
            "%tid.x": tid, "%tid.y": zero, "%tid.z": zero, "%laneid": tid % np.uint32(WARP),
            "%ntid.x": np.uint32(self.threads), "%ntid.y": np.uint32(1), "%ntid.z": np.uint32(1),
            **{f"%ctaid.{axis}": np.ascontiguousarray(axes[:, i]) for i, axis in enumerate("xyz")},
            **{f"%nctaid.{axis}": np.uint32(size) for axis, size in zip("xyz", grid, strict=True)},
        }  # fmt: skip
        self.group = WARP * (4 if program.uses("wgmma") else 1)
        self.shared = SharedMemory(self.programs, shared)
        self.epochs = np.zeros(count, np.int64)
        self.pending: list[tuple[Array, Array, Array, Array]] = []  # asynchronous copies
        self.committed = np.zeros(count, np.int64)

    @property
    def count(self) -> int:
        """Number of threads."""
        return len(self.thread)

    def active(self, guard: tuple[Register, bool] | None) -> Bools | None:
        """Return the threads that execute an instruction; None for all."""
        if guard is None:
            return self.mask
        predicate = self.registers[guard[0].index]
        if predicate is None:
            raise EmulationError("a predicate is read before it is written")
        predicate = ~predicate if guard[1] else predicate
        if self.mask is not None:
            predicate = predicate & self.mask
        return None if predicate.all() else np.broadcast_to(predicate, self.count)

    def put(self, register: Register, value: Array, active: Bools | None) -> None:
        """Write a register of the active threads."""
        if active is not None:
            before = self.registers[register.index]
            if before is None:
                before = np.full(self.count, ~value.dtype.type(0) if register.bits > 1 else False, value.dtype)
            value = np.where(active, value, before)
        self.registers[register.index] = value

    def full(self, value: Array, active: Bools | None) -> Array:
        """Return a value for each of the active threads."""
        value = np.broadcast_to(value, self.count)
        return value if active is None else value[active]


def _any_bits(count: int, bits: int) -> Array:
    """Bits that differ from thread to thread, so that a result which depends on them is wrong in most."""
    mixed = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(64 - bits)
    return mixed.astype(bool if bits == 1 else UNSIGNED[bits // 8])


def run(
    machine: Machine, blocks: Sequence[tuple[Sequence[Step], Callable[[Machine], tuple[str, Array]]]], order: int = 0
) -> None:
    """Execute until every thread has returned.

    Args:
        blocks: steps of each block, and what ends it: ``("at", next block of each thread)`` or ``("barrier", ...)``.
        order: 0 if all warps go on together; 1 if each group of warps goes as far as it can before the next one does,
            and -1 from the last group to the first.
    """
    done = len(blocks)
    at = np.zeros(machine.count, np.int64)
    waiting = np.zeros(machine.count, bool)
    while True:
        ready = ~waiting & (at < done)
        if not ready.any():
            if waiting.any():
                raise EmulationError("some threads wait at a barrier that others never reach")
            return
        if order:
            ready = _next_group(machine, ready, order)
        block = int(at[ready].min())
        here = ready & (at == block)
        machine.mask = None if here.all() else here
        steps, end = blocks[block]
        for step in steps:
            step(machine)
        kind, following = end(machine)
        at = np.where(here, following, at)
        if kind == "barrier":
            waiting |= here
            _release(machine, waiting, at >= done)


def _next_group(machine: Machine, ready: Bools, order: int) -> Bools:
    """Of the threads that are ready, those of each program's first group of warps, or last one."""
    size = min(machine.threads, machine.group)
    groups = ready.reshape(machine.programs, -1, size)
    some = groups.any(2)
    first = some.argmax(1) if order > 0 else some.shape[1] - 1 - some[:, ::-1].argmax(1)
    chosen = np.arange(some.shape[1]) == first[:, None]
    return (groups & chosen[:, :, None]).ravel()


def _release(machine: Machine, waiting: Bools, returned: Bools) -> None:
    """Let programs go on all of whose threads wait or have returned."""
    shape = (machine.programs, machine.threads)
    complete = (waiting | returned).reshape(shape).all(1)
    freed = np.repeat(complete, machine.threads) & waiting
    machine.epochs[freed] += 1
    waiting[freed] = False
