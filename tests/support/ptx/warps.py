"""Instructions of whole warps: shuffles, matrix fragments and products; and asynchronous copies.

Fragment layouts are those of the PTX manual (9.7.14 for ``mma`` and ``ldmatrix``, 9.7.15 for ``wgmma``). Products are
summed in float64 and rounded once: the order and roundings of a tensor core are not specified.
"""

from __future__ import annotations

import re

import numpy as np

from . import arithmetic
from .errors import EmulationError
from .instructions import address_of, expect, instruction, reader, registers_of
from .machine import WARP, Bools, Machine, Step
from .memory import Array
from .text import Immediate, Instruction, Vector

LANE = np.arange(WARP)
GROUP, PAIR = LANE // 4, LANE % 4  # of a lane in a fragment: its row, and which pair of columns
COLUMNS = 2 * PAIR[:, None] + np.arange(2)  # (lane, 2)


def whole_warps(active: Bools | None, size: int = WARP) -> Bools | None:
    """Check that warps (or groups of ``size`` threads) execute as a whole; return which do, None for all."""
    if active is None:
        return None
    groups = active.reshape(-1, size)
    if (groups.any(1) != groups.all(1)).any():
        raise EmulationError("a warp-wide instruction is reached by a part of a warp")
    return groups[:, 0]


def _lanes(machine: Machine, value: Array) -> Array:
    return np.broadcast_to(value, machine.count).reshape(-1, WARP)


# --- shuffles ----------------------------------------------------------------------------------------------


@instruction("shfl")
def _shuffle(at: Instruction) -> Step:
    """``shfl.sync``; the clamp of Triton's shuffles spans the warp."""
    mode = at.opcode[2]
    if at.opcode[1] != "sync" or mode not in ("bfly", "idx") or at.operands[3] != Immediate(31):
        raise EmulationError(f"unknown instruction {'.'.join(at.opcode)}")
    target = registers_of(at.operands[0])[0]
    read, lane = reader(at.operands[1], "b32"), reader(at.operands[2], "u32")

    def step(machine: Machine) -> None:
        active = machine.active(at.guard)
        whole_warps(active)
        values, by = _lanes(machine, read(machine)), _lanes(machine, lane(machine)).astype(np.int64)
        source = LANE ^ by if mode == "bfly" else by & (WARP - 1)
        machine.put(target, np.take_along_axis(values, source, 1).ravel(), active)

    return step


@instruction("redux")
def _reduce(at: Instruction) -> Step:
    expect(at, "redux.sync.add.s32", "redux.sync.add.u32")
    target, read = registers_of(at.operands[0])[0], reader(at.operands[1], "u32")

    def step(machine: Machine) -> None:
        active = machine.active(at.guard)
        whole_warps(active)
        total = _lanes(machine, read(machine)).sum(1, dtype=np.uint32)
        machine.put(target, np.repeat(total, WARP), active)

    return step


@instruction("bar")
def _warp_barrier(at: Instruction) -> Step:
    """``bar.warp.sync``: threads of a warp run together anyway."""
    expect(at, "bar.warp.sync")

    def step(machine: Machine) -> None:
        whole_warps(machine.active(at.guard))

    return step


@instruction("fence")
def _fence(at: Instruction) -> Step:
    """Memory is always in order here."""
    return lambda machine: None


# --- matrices in shared memory -----------------------------------------------------------------------------


def _matrix_rows(machine: Machine, active: Bools | None, read: Array, count: int) -> tuple[Array, Array]:
    """Return indices (warp, count, 8 rows) of the rows, in units of 16 bytes, and which warps are active."""
    warps = whole_warps(active)
    addresses = _lanes(machine, read)[:, : 8 * count]
    programs = machine.local.reshape(-1, WARP)[:, : 8 * count]
    chosen = np.ones(len(addresses), bool) if warps is None else warps
    indices = machine.shared.indices(addresses[chosen].ravel(), programs[chosen].ravel(), 16) // 16
    return indices.reshape(-1, count, 8), chosen


@instruction("ldmatrix")
def _load_matrix(at: Instruction) -> Step:
    """8 x 8 matrices of 16 bits: lanes 8 i to 8 i + 7 give the rows of matrix i, register i gets its fragment."""
    count, transposed = int(at.opcode[4][1:]), "trans" in at.opcode
    targets, address = registers_of(at.operands[0]), address_of(at.operands[1], "u32")

    def step(machine: Machine) -> None:
        active = machine.active(at.guard)
        indices, chosen = _matrix_rows(machine, active, address(machine), count)
        matrices = np.zeros((len(chosen), count, 8, 8), np.uint16)
        matrices[chosen] = machine.shared.bytes.view(np.uint16).reshape(-1, 8)[indices]
        if transposed:
            matrices = matrices.swapaxes(-1, -2)
        for i, register in enumerate(targets):
            pairs = matrices[:, i, GROUP[:, None], COLUMNS].astype(np.uint32)
            machine.put(register, (pairs[..., 0] | (pairs[..., 1] << np.uint32(16))).ravel(), active)

    return step


@instruction("stmatrix")
def _store_matrix(at: Instruction) -> Step:
    count, transposed = int(at.opcode[4][1:]), "trans" in at.opcode
    address, sources = address_of(at.operands[0], "u32"), at.operands[1]
    assert isinstance(sources, Vector)
    reads = [reader(x, "b32") for x in sources.parts if x is not None]

    def step(machine: Machine) -> None:
        active = machine.active(at.guard)
        indices, chosen = _matrix_rows(machine, active, address(machine), count)
        matrices = np.empty((len(chosen), count, 8, 8), np.uint16)
        for i, read in enumerate(reads):
            matrices[:, i, GROUP[:, None], COLUMNS] = _pairs(_lanes(machine, read(machine)))
        if transposed:
            matrices = matrices.swapaxes(-1, -2)
        machine.shared.bytes.view(np.uint16).reshape(-1, 8)[indices] = matrices[chosen]

    return step


def _pairs(words: Array) -> Array:
    """Words to pairs of 16-bit values, the lower half first."""
    return np.stack([words & np.uint32(0xFFFF), words >> np.uint32(16)], -1).astype(np.uint16)


# --- products of a warp ------------------------------------------------------------------------------------


def _truncated(words: Array) -> Array:
    """tf32 operands: the last 13 bits are ignored."""
    return (words & np.uint32(0xFFFFE000)).view(np.float32)


_WIDEN = {"bf16": arithmetic.from_bfloat16, "f16": arithmetic.from_float16, "tf32": _truncated}


def _fragment_a(words: Array, kind: str) -> Array:
    """Four words (4, warp, lane) to A of m16: (warp, 16, K), K = 16 for 16-bit values and 8 for tf32."""
    if kind == "tf32":
        found = np.empty((words.shape[1], 16, 8), np.float64)
        for i, rows, columns in ((0, 0, 0), (1, 8, 0), (2, 0, 4), (3, 8, 4)):
            found[:, GROUP + rows, PAIR + columns] = _truncated(words[i])
        return found
    found = np.empty((words.shape[1], 16, 16), np.float64)
    for i, rows, columns in ((0, 0, 0), (1, 8, 0), (2, 0, 8), (3, 8, 8)):
        found[:, (GROUP + rows)[:, None], COLUMNS + columns] = _WIDEN[kind](_pairs(words[i]))
    return found


def _fragment_b(words: Array, kind: str) -> Array:
    """Two words (2, warp, lane) to B of n8: (warp, K, 8)."""
    if kind == "tf32":
        found = np.empty((words.shape[1], 8, 8), np.float64)
        for i, rows in ((0, 0), (1, 4)):
            found[:, PAIR + rows, GROUP] = _truncated(words[i])
        return found
    found = np.empty((words.shape[1], 16, 8), np.float64)
    for i, rows in ((0, 0), (1, 8)):
        found[:, COLUMNS + rows, GROUP[:, None]] = _WIDEN[kind](_pairs(words[i]))
    return found


@instruction("mma")
def _product(at: Instruction) -> Step:
    kind = at.opcode[7]
    expect(
        at,
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32",
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
    )
    targets = registers_of(at.operands[0])
    a, b, c = ([reader(x, "b32") for x in registers_of(operand)] for operand in at.operands[1:4])

    def step(machine: Machine) -> None:
        active = machine.active(at.guard)
        whole_warps(active)
        words = [np.stack([_lanes(machine, read(machine)) for read in reads]) for reads in (a, b, c)]
        product = _fragment_a(words[0], kind) @ _fragment_b(words[1], kind)
        for i, register in enumerate(targets):
            part = product[:, GROUP + 8 * (i // 2), 2 * PAIR + i % 2]
            total = (part + words[2][i].view(np.float32)).astype(np.float32)
            machine.put(register, total.view(np.uint32).ravel(), active)

    return step


# --- products of four warps --------------------------------------------------------------------------------

WARPGROUP = 4 * WARP


def _described(machine: Machine, descriptor: Array, program: Array, extent: int, across: bool, width: int) -> Array:
    """Return operands of a product in shared memory as bits: (warpgroup, extent, 32 bytes of K).

    Args:
        descriptor: matrix descriptor of each warpgroup, uint64.
        program: program of each warpgroup.
        extent: rows of A, or columns of B.
        across: whether neighbours in memory differ in that index (M or N) rather than in K.
        width: bytes of an element.
    """
    d = descriptor.astype(np.uint64)

    def field(first: int, size: int) -> Array:
        return ((d >> np.uint64(first)) & np.uint64((1 << size) - 1)).astype(np.int64)[:, None, None]

    start, leading, stride, mode = field(0, 14) << 4, field(16, 14) << 4, field(32, 14) << 4, field(62, 2)
    if (mode != mode[0]).any() or field(49, 3).any():
        raise EmulationError("wgmma: descriptors of several swizzles, or with a base offset")
    swizzle = {0: 0, 1: 3, 2: 2, 3: 1}[int(mode[0, 0, 0])]  # bits that are exchanged: 3 for rows of 128 bytes
    row = 16 << swizzle
    i, k = np.arange(extent)[:, None], np.arange(32 // width)
    if across and width != 2:
        raise EmulationError("wgmma: only 16-bit operands may be transposed")
    if across:
        along = row // 2  # elements of a row
        if swizzle == 0:
            leading, stride = stride, leading
        offsets = (i % along) * 2 + (i // along) * leading + (k % 8) * row + (k // 8) * stride
    elif swizzle == 0:
        offsets = (i % 8) * 16 + (i // 8) * stride + (k * width % 16) + (k * width // 16) * leading
    else:
        offsets = (i % 8) * row + (i // 8) * stride + k * width
    addresses = start + offsets
    addresses = addresses ^ (((addresses >> 7) & ((1 << swizzle) - 1)) << 4)
    programs = np.broadcast_to(program[:, None, None], addresses.shape)
    indices = machine.shared.indices(addresses.ravel(), programs.ravel(), width) // width
    return machine.shared.elements(width)[indices].reshape(addresses.shape)


@instruction("wgmma")
def _group_product(at: Instruction) -> Step:
    if at.opcode[1] in ("fence", "commit_group", "wait_group"):
        return _fence(at)
    kind = at.opcode[-1]
    shape = re.fullmatch(r"m64n(\d+)k(\d+)", at.opcode[4])
    width = 4 if kind == "tf32" else 2
    if at.opcode[1] != "mma_async" or shape is None or at.opcode[5:7] != ("f32", kind) or kind not in _WIDEN:
        raise EmulationError(f"unknown instruction {'.'.join(at.opcode)}")
    columns, depth = int(shape[1]), 32 // width
    targets = registers_of(at.operands[0])
    first, second, keep, *signs = at.operands[1:]
    from_registers = isinstance(first, Vector)
    if signs[:2] != [Immediate(1), Immediate(1)] or len(targets) != columns // 2:
        raise EmulationError(f"unknown form of wgmma: {at.operands[3:]}")
    transposed = [x == Immediate(1) for x in signs[2:]] or [False, False]
    read_a = [reader(x, "b32") for x in registers_of(first)] if from_registers else [reader(first, "u64")]
    read_b, kept = reader(second, "u64"), reader(keep, "pred")
    old = [reader(x, "f32") for x in targets]

    def uniform(machine: Machine, value: Array) -> Array:
        groups = np.broadcast_to(value, machine.count).reshape(-1, WARPGROUP)
        if (groups != groups[:, :1]).any():
            raise EmulationError("wgmma: operands differ within a warpgroup")
        return groups[:, 0]

    def step(machine: Machine) -> None:
        active = machine.active(at.guard)
        groups = whole_warps(active, WARPGROUP)
        chosen = np.flatnonzero(np.ones(machine.count // WARPGROUP, bool) if groups is None else groups)
        program = machine.local[::WARPGROUP][chosen]
        if from_registers:
            words = np.stack([_lanes(machine, read(machine)) for read in read_a])
            a = _fragment_a(words, kind).reshape(-1, 64, depth)[chosen]
        else:
            described = uniform(machine, read_a[0](machine))[chosen]
            a = _WIDEN[kind](_described(machine, described, program, 64, transposed[0], width))
        described = uniform(machine, read_b(machine))[chosen]
        b = _WIDEN[kind](_described(machine, described, program, columns, transposed[-1], width))
        product = a.astype(np.float64) @ b.astype(np.float64).swapaxes(-1, -2)
        total = np.zeros((machine.count // WARPGROUP, 64, columns))
        total[chosen] = product
        keeps = uniform(machine, kept(machine))[:, None]
        rows = (16 * np.arange(4)[:, None] + GROUP).ravel()
        for i, register in enumerate(targets):
            part = total[:, rows + 8 * (i // 2 % 2), np.tile(8 * (i // 4) + 2 * PAIR + i % 2, 4)]
            before = 0.0
            if keeps.any():
                before = np.where(keeps, np.broadcast_to(old[i](machine), machine.count).reshape(part.shape), 0.0)
            machine.put(register, (part + before).astype(np.float32).view(np.uint32).ravel(), active)

    return step


# --- asynchronous copies -----------------------------------------------------------------------------------


@instruction("cp")
def _copy(at: Instruction) -> Step:
    """``cp.async``: data arrives when the thread waits for its group, and not before."""
    if at.opcode[2] == "commit_group":
        return _commit(at)
    if at.opcode[2] == "wait_group":
        return _wait(at, at.operands[0])
    if at.opcode[:2] != ("cp", "async") or at.opcode[3:] != ("shared", "global"):
        raise EmulationError(f"unknown instruction {'.'.join(at.opcode)}")
    to, source = address_of(at.operands[0], "u32"), address_of(at.operands[1], "u64")
    size = at.operands[2]
    assert isinstance(size, Immediate)
    given = reader(at.operands[3], "u32") if len(at.operands) > 3 else None

    def step(machine: Machine) -> None:
        active = machine.active(at.guard)
        everyone = np.arange(machine.count)
        threads = machine.full(everyone, active)
        where = machine.shared.indices(machine.full(to(machine), active), machine.local[threads], size.value)
        data = np.zeros((len(threads), size.value), np.uint8)
        copied = np.full(len(threads), size.value) if given is None else machine.full(given(machine), active)
        if not np.isin(copied, (0, size.value)).all():
            raise EmulationError("cp.async of a part of its size")
        real = copied > 0
        words = machine.memory.load(
            machine.full(source(machine), active)[real], 4, size.value // 4, machine.thread[threads][real],
            machine.epochs[threads][real],
        )  # fmt: skip
        data[real] = np.stack(words, -1).view(np.uint8)
        machine.pending.append((threads, machine.committed[threads], where, data))

    return step


def _commit(at: Instruction) -> Step:
    def step(machine: Machine) -> None:
        active = machine.active(at.guard)
        machine.committed = machine.committed + (1 if active is None else active)

    return step


def _wait(at: Instruction, allowed: object) -> Step:
    assert isinstance(allowed, Immediate)

    def step(machine: Machine) -> None:
        active = machine.active(at.guard)
        waits = np.ones(machine.count, bool) if active is None else active
        left = []
        for threads, group, where, data in machine.pending:
            arrived = waits[threads] & (group < machine.committed[threads] - allowed.value)
            places = where[arrived][:, None] + np.arange(data.shape[1])
            machine.shared.bytes[places] = data[arrived]
            if not arrived.all():
                rest = ~arrived
                left.append((threads[rest], group[rest], where[rest], data[rest]))
        machine.pending = left

    return step
