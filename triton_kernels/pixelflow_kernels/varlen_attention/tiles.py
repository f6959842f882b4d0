"""Shared parts of the attention kernels: the split of a head into tile lanes, and loads, stores and products of tiles.

A *lane* is one column of a tile, along the head dim. Tile sizes are powers of two and a head dim (72) seldom is, so a
head is split into two parts: MAIN lanes, the largest power of two that fits, and TAIL lanes for the rest (64 + 16). A
single padded part (128) would multiply 44% zeros. A matrix instruction takes at least 16 lanes, so for head dim 72 the
tail has eight dead lanes, which read as one in the values of the forward pass and as zero everywhere else.
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
PRECISION = tl.constexpr("tf32x3")  # of fp32 products, on tensor cores: exact to about 22 bits; fp64 stays fp64
SHORT = 64  # packs whose members have at most this many queries have their own shape class


@dataclass(frozen=True, slots=True)
class Lanes:
    """Number of lanes in the two parts of a head."""

    main: int
    tail: int

    @classmethod
    def of(cls, head_dim: int) -> Lanes:
        """Split a head: MAIN is the largest power of two up to ``head_dim``, TAIL covers the rest.

        Each part has at least 16 lanes; there is no tail if MAIN covers the head.
        """
        main = max(1 << head_dim.bit_length() - 1, 16)
        rest = head_dim - main
        return cls(main, max(triton.next_power_of_2(rest), 16) if rest > 0 else 0)


def shape_class(dtype: torch.dtype, head_dim: int, max_seqlen: int | None = None) -> str:
    """Name of the launch configuration's shape class, e.g. ``"half-lanes80-long"``.

    The forward pass has separate short and long classes. They may differ in rows per tile and in warps, but not in keys
    per iteration or in ``FIXED_MAX_TILES``: these determine bits, and an image's bits must not depend on its pack.
    """
    lanes = Lanes.of(head_dim)
    kind = {2: "half", 4: "fp32", 8: "fp64"}[dtype.itemsize]
    width = next(n for n in (64, 80, 96, 128, 256) if lanes.main + lanes.tail <= n)
    length = "" if max_seqlen is None else "-short" if max_seqlen <= SHORT else "-long"
    return f"{kind}-lanes{width}{length}"


def configuration(kernel: str, x: Tensor, name: str, config: Mapping[str, int] | None) -> dict[str, int]:
    """Return ``config`` if given, else the frozen launch configuration."""
    return launch_config(f"varlen_attention.{kernel}", name, arch_of(x.device)) if config is None else dict(config)


def is_aligned(multiple_of: int, options: Mapping[str, int]) -> bool:
    """Return whether multiples of ``multiple_of`` are multiples of both tile sizes, so that no masks are needed."""
    return multiple_of % math.lcm(options["BLOCK_M"], options["BLOCK_N"]) == 0


def strides(**tensors: Tensor) -> dict[str, int]:
    """Return token strides as kernel arguments, in units of ``UNIT`` elements.

    If all are multiples of 8 (as in slices of a product whose width is), this tells the kernel so, which then loads 16
    bytes at a time; Triton itself specialises only on multiples of 16.
    """
    unit = 8 if all(x.stride(0) % 8 == 0 for x in tensors.values()) else 1
    return {f"stride_{name}_token": x.stride(0) // unit for name, x in tensors.items()} | {"UNIT": unit}


@triton.jit
def member_of(tile, cu_q_ptr, cu_k_ptr, num_tiles, NUM_HEADS: tl.constexpr):
    """Return a tile's index within its member, its head, and start and length of the member's queries and keys."""
    head = tile // num_tiles % NUM_HEADS
    member = tile // num_tiles // NUM_HEADS
    q_start, q_end = tl.load(cu_q_ptr + member), tl.load(cu_q_ptr + member + 1)
    k_start, k_end = tl.load(cu_k_ptr + member), tl.load(cu_k_ptr + member + 1)
    return tile % num_tiles, head, q_start, q_end - q_start, k_start, k_end - k_start


@triton.jit
def load_part(
    pointer, offsets, lanes, rows, limit, HEAD_DIM: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_LANES: tl.constexpr
):
    """Load one part of the rows of a tile; rows from ``limit`` on and dead lanes are zero."""
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
    """Load both parts of the rows of a tile; without a tail, the main part is returned in its place."""
    x_main = load_part(pointer, offsets, tl.arange(0, MAIN), rows, limit, HEAD_DIM, MASK_ROWS, MAIN > HEAD_DIM)
    x_tail = x_main
    if TAIL > 0:
        lanes = MAIN + tl.arange(0, TAIL)
        x_tail = load_part(pointer, offsets, lanes, rows, limit, HEAD_DIM, MASK_ROWS, MAIN + TAIL > HEAD_DIM)
    return x_main, x_tail


@triton.jit
def load_statistics(lse_ptr, delta_ptr, rows, limit, MASKED: tl.constexpr):
    """Load lse, converted to base 2, and delta.

    Rows beyond ``limit`` get P = 1, but dO and delta are 0 there, so they contribute nothing.
    """
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
    """Store both parts of the rows before ``limit``."""
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
    """Compute the inner products of the rows of x with the rows of y, over both parts."""
    s = tl.dot(x_main, tl.trans(y_main), input_precision=PRECISION, out_dtype=high)
    if TAIL > 0:
        s = tl.dot(x_tail, tl.trans(y_tail), s, input_precision=PRECISION, out_dtype=high)
    return s


@triton.jit
def accumulate(acc_main, acc_tail, weights, x_main, x_tail, TAIL: tl.constexpr, high: tl.constexpr):
    """Add ``weights @ x`` to both parts of the accumulator."""
    acc_main = tl.dot(weights, x_main, acc_main, input_precision=PRECISION, out_dtype=high)
    if TAIL > 0:
        acc_tail = tl.dot(weights, x_tail, acc_tail, input_precision=PRECISION, out_dtype=high)
    return acc_main, acc_tail


@triton.jit
def zeros(ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, high: tl.constexpr):
    """Zero accumulators for both parts; an unused tail is optimised away."""
    return tl.zeros([ROWS, MAIN], dtype=high), tl.zeros([ROWS, TAIL if TAIL > 0 else 16], dtype=high)
