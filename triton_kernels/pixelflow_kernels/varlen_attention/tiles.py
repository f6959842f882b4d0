"""How a head is cut into the lanes of a tile, and how tiles come from and go to packed tensors.

A tile's edge is a power of two and a head dim (72) seldom is, so a head is cut in two parts: MAIN lanes, the largest
power of two below it, and TAIL lanes for the rest (64 + 16). One padded part (128) would multiply 44% zeros. A matrix
instruction takes 16 lanes at least, so eight of the tail's are dead: they read as zero, in the values as one.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixelflow_kernels.configs import arch_of, launch_config

LOG2_E = tl.constexpr(1.4426950408889634)
PRECISION = tl.constexpr("tf32x3")  # of fp32 products: as exact as fp32, on tensor cores; fp64 stays fp64
SHORT = 64  # members of at most so many tokens are a shape class of their own


@dataclass(frozen=True, slots=True)
class Lanes:
    """The two parts of a head."""

    main: int
    tail: int

    @classmethod
    def of(cls, head_dim: int) -> Lanes:
        """MAIN is the largest power of two up to ``head_dim``, TAIL covers the rest; 16 or more each, or no tail."""
        main = max(1 << head_dim.bit_length() - 1, 16)
        rest = head_dim - main
        return cls(main, max(triton.next_power_of_2(rest), 16) if rest > 0 else 0)


def shape_class(dtype: torch.dtype, head_dim: int, max_seqlen: int | None = None) -> str:
    """The name under which a launch configuration is kept, ``"half-lanes80-long"``.

    Short and long may differ in tiles' rows and in warps, never in how many keys (in the backward of keys: queries) a
    turn of the loop takes: that decides bits, and an image's bits must not depend on the others of its pack.
    """
    lanes = Lanes.of(head_dim)
    kind = {2: "half", 4: "fp32", 8: "fp64"}[dtype.itemsize]
    width = next(n for n in (64, 80, 96, 128, 256) if lanes.main + lanes.tail <= n)
    length = "" if max_seqlen is None else "-short" if max_seqlen <= SHORT else "-long"
    return f"{kind}-lanes{width}{length}"


def configuration(kernel: str, x: Tensor, name: str, config: Mapping[str, int] | None) -> dict[str, int]:
    """The launch configuration handed in, or else the frozen one."""
    return launch_config(f"varlen_attention.{kernel}", name, arch_of(x.device)) if config is None else dict(config)


def is_aligned(multiple_of: int, options: Mapping[str, int]) -> bool:
    """Whether lengths that are multiples of this are multiples of a tile's edges, so that nothing need be masked."""
    return multiple_of % math.lcm(options["BLOCK_M"], options["BLOCK_N"]) == 0


def strides(**tensors: Tensor) -> dict[str, int]:
    """Token strides as kernel arguments, in units of ``UNIT`` elements.

    Where all are multiples of 8 (every slice of a product whose width is), the kernel learns it and loads 16 bytes at
    a time; Triton itself would only see multiples of 16.
    """
    unit = 8 if all(x.stride(0) % 8 == 0 for x in tensors.values()) else 1
    return {f"stride_{name}_token": x.stride(0) // unit for name, x in tensors.items()} | {"UNIT": unit}


@triton.jit
def member_of(tile, cu_q_ptr, cu_k_ptr, num_tiles, NUM_HEADS: tl.constexpr):
    """Place in its member, head, and where queries and keys of the member start and how many there are."""
    head = tile // num_tiles % NUM_HEADS
    member = tile // num_tiles // NUM_HEADS
    q_start, q_end = tl.load(cu_q_ptr + member), tl.load(cu_q_ptr + member + 1)
    k_start, k_end = tl.load(cu_k_ptr + member), tl.load(cu_k_ptr + member + 1)
    return tile % num_tiles, head, q_start, q_end - q_start, k_start, k_end - k_start


@triton.jit
def load_part(
    pointer, offsets, lanes, rows, limit, HEAD_DIM: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_LANES: tl.constexpr
):
    """One part of the rows of a tile; zero from row ``limit`` and in dead lanes."""
    place = pointer + offsets[:, None] + lanes[None, :]
    if MASK_ROWS and MASK_LANES:
        x = tl.load(place, mask=(rows < limit)[:, None] & (lanes < HEAD_DIM)[None, :], other=0.0)
    elif MASK_ROWS:
        x = tl.load(place, mask=(rows < limit)[:, None], other=0.0)
    elif MASK_LANES:
        x = tl.load(place, mask=(lanes < HEAD_DIM)[None, :], other=0.0)
    else:
        x = tl.load(place)
    return x


@triton.jit
def load_rows(
    pointer,
    offsets,
    rows,
    limit,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):
    """Both parts of the rows of a tile; where there is no tail the main part stands in for it."""
    x_main = load_part(pointer, offsets, tl.arange(0, MAIN), rows, limit, HEAD_DIM, MASK_ROWS, MAIN > HEAD_DIM)
    x_tail = x_main
    if TAIL > 0:
        lanes = MAIN + tl.arange(0, TAIL)
        x_tail = load_part(pointer, offsets, lanes, rows, limit, HEAD_DIM, MASK_ROWS, MAIN + TAIL > HEAD_DIM)
    return x_main, x_tail


@triton.jit
def load_statistics(lse_ptr, delta_ptr, rows, limit, MASKED: tl.constexpr):
    """lse to base 2, and delta. Queries that do not exist have P 1, but dO and delta 0: they add nothing."""
    if MASKED:
        lse = tl.load(lse_ptr + rows, mask=rows < limit, other=0.0)
        delta = tl.load(delta_ptr + rows, mask=rows < limit, other=0.0)
    else:
        lse, delta = tl.load(lse_ptr + rows), tl.load(delta_ptr + rows)
    return lse * LOG2_E, delta


@triton.jit
def store_rows(
    pointer,
    offsets,
    rows,
    limit,
    x_main,
    x_tail,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):
    """Write both parts of the rows before ``limit``."""
    low: tl.constexpr = pointer.dtype.element_ty
    main = tl.arange(0, MAIN)
    inside = (main < HEAD_DIM)[None, :]
    if MASK_ROWS:
        inside = (rows < limit)[:, None] & inside
    tl.store(pointer + offsets[:, None] + main[None, :], x_main.to(low), mask=inside)
    if TAIL > 0:
        tail = MAIN + tl.arange(0, TAIL)
        inside = (tail < HEAD_DIM)[None, :]
        if MASK_ROWS:
            inside = (rows < limit)[:, None] & inside
        tl.store(pointer + offsets[:, None] + tail[None, :], x_tail.to(low), mask=inside)


@triton.jit
def products(x_main, x_tail, y_main, y_tail, TAIL: tl.constexpr, high: tl.constexpr):
    """Inner products of the rows of x with the rows of y, over both parts."""
    s = tl.dot(x_main, tl.trans(y_main), input_precision=PRECISION, out_dtype=high)
    if TAIL > 0:
        s = tl.dot(x_tail, tl.trans(y_tail), s, input_precision=PRECISION, out_dtype=high)
    return s


@triton.jit
def accumulate(acc_main, acc_tail, weights, x_main, x_tail, TAIL: tl.constexpr, high: tl.constexpr):
    """Add ``weights @ x`` to both parts."""
    acc_main = tl.dot(weights, x_main, acc_main, input_precision=PRECISION, out_dtype=high)
    if TAIL > 0:
        acc_tail = tl.dot(weights, x_tail, acc_tail, input_precision=PRECISION, out_dtype=high)
    return acc_main, acc_tail


@triton.jit
def zeros(ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, high: tl.constexpr):
    """Empty sums of both parts; an unused tail is optimised away."""
    return tl.zeros([ROWS, MAIN], dtype=high), tl.zeros([ROWS, TAIL if TAIL > 0 else 16], dtype=high)
