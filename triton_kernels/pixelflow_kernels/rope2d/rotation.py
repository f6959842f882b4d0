"""Kernel for the 2-D RoPE rotation alone, and device functions shared with norm and rotation in one pass.

    z = (x_0 cos - x_1 sin, x_1 cos + x_0 sin) for every pair of x

Source: arXiv 2504.07963, section 3.3. Shapes: ``T`` tokens, ``C = H * D`` channels.

A program, at the published width usually a single warp, holds one whole token in registers. Tile sizes are powers of
two and C (1152) seldom is, so a token is split into two parts of MAIN + TAIL channels (1024 + 128); a single padded
part (2048) would leave 44% of the lanes idle. Tiles are one-dimensional: with several tokens per tile, the two parts
get different register layouts, and sharing the norm's scale between them takes the larger one through hundreds of
shuffles.

The table stores cosine and sine of a pair side by side, so a tile of the table has exactly the shape of a tile of
channels. Both are loaded 16 bytes at a time into the same register layout, and pairs are separated in registers.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixelflow_kernels.configs import arch_of, launch_config

LIMITS = (1280, 2560, 5120)  # channels; the launch configurations' shape classes


# --- parts of a token --------------------------------------------------------------------------------------


@triton.jit
def load_high(pointer, channels, WIDTH: tl.constexpr, high: tl.constexpr):
    """Load one part of a token (or of a weight), converted to the compute dtype."""
    return tl.load(pointer + channels, mask=channels < WIDTH, other=0.0).to(high)


@triton.jit
def load_table(table_ptr, row, column, channels, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Load cosines and sines for one part of a token; half a head rotates by ``column``, the other half by ``row``."""
    HALF: tl.constexpr = HEAD_DIM // 2
    inside = channels % HEAD_DIM
    place = tl.where(inside < HALF, column, row) * HALF + inside % HALF
    # HALF is a multiple of 4, so four neighbours that start at a multiple of 4 lie in the same half of a head. The hint
    # must be applied in the function that computes the sum: on the result of a call it is lost.
    place = tl.max_contiguous(tl.multiple_of(place, 4), 4)
    return tl.load(table_ptr + place, mask=channels < WIDTH, other=0.0)


@triton.jit
def turn(x, table, CONJUGATE: tl.constexpr):
    """Rotate neighbouring pairs; without fused multiply-adds, every operation rounds as in eager PyTorch."""
    a, b = tl.split(tl.reshape(x, [x.numel // 2, 2]))
    cos, sin = tl.split(tl.reshape(table, [x.numel // 2, 2]))
    # Not with `-sin`: Triton computes it as 0 - sin, which is +0 where sin is +0, so the sign of zero would be lost.
    if CONJUGATE:
        first, second = a * cos + b * sin, b * cos - a * sin
    else:
        first, second = a * cos - b * sin, b * cos + a * sin
    return tl.reshape(tl.join(first, second), x.shape)


def tile_of(width: int) -> dict[str, int]:
    """Split ``width`` channels: MAIN is the largest power of two below ``width``, TAIL covers the rest."""
    main = max(1 << (width - 1).bit_length() - 1, 1)
    return {"MAIN": main, "TAIL": triton.next_power_of_2(width - main)}


def shape_class(width: int, dtype: torch.dtype) -> str:
    """Name of the launch configuration's shape class, e.g. ``"half-c1280"``: the tokens' dtype and largest width."""
    kind = {2: "half", 4: "fp32", 8: "fp64"}[dtype.itemsize]
    return f"{kind}-{next((f'c{limit}' for limit in LIMITS if width <= limit), 'wide')}"


def tile_and_config(kernel: str, x: Tensor, config: Mapping[str, int] | None) -> dict[str, int]:
    """Return the split of tokens ``x [T, C]`` and ``config``, which defaults to the frozen launch configuration."""
    if config is None:
        config = launch_config(f"rope2d.{kernel}", shape_class(x.shape[1], x.dtype), arch_of(x.device))
    return {**tile_of(x.shape[1]), **config}


# --- the rotation alone ------------------------------------------------------------------------------------


@triton.jit
def _rotate_kernel(
    x_ptr,
    row_ptr,
    column_ptr,
    table_ptr,
    out_ptr,
    stride_x_token,
    stride_out_token,
    CONJUGATE: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    """One program per token."""
    high: tl.constexpr = table_ptr.dtype.element_ty
    low: tl.constexpr = out_ptr.dtype.element_ty
    token = tl.program_id(0)
    main, tail = tl.arange(0, MAIN), MAIN + tl.arange(0, TAIL)
    x_ptr += token.to(tl.int64) * stride_x_token
    out_ptr += token.to(tl.int64) * stride_out_token
    x_main = load_high(x_ptr, main, WIDTH, high)
    x_tail = load_high(x_ptr, tail, WIDTH, high)
    row, column = tl.load(row_ptr + token), tl.load(column_ptr + token)
    table_main = load_table(table_ptr, row, column, main, WIDTH, HEAD_DIM)
    table_tail = load_table(table_ptr, row, column, tail, WIDTH, HEAD_DIM)
    tl.store(out_ptr + main, turn(x_main, table_main, CONJUGATE).to(low), mask=main < WIDTH)
    tl.store(out_ptr + tail, turn(x_tail, table_tail, CONJUGATE).to(low), mask=tail < WIDTH)


def launch_rotate(
    x: Tensor,
    row: Tensor,
    column: Tensor,
    table: Tensor,
    out: Tensor,
    head_dim: int,
    conjugate: bool,
    config: Mapping[str, int] | None = None,
) -> None:
    """Launch ``out = rotate(x)``; both are ``[T, C]`` with dense channels."""
    tokens, width = x.shape
    if tokens == 0:
        return
    with torch.cuda.device_of(x):
        _rotate_kernel[(tokens,)](
            x_ptr=x,
            row_ptr=row,
            column_ptr=column,
            table_ptr=table,
            out_ptr=out,
            stride_x_token=x.stride(0),
            stride_out_token=out.stride(0),
            CONJUGATE=conjugate,
            WIDTH=width,
            HEAD_DIM=head_dim,
            enable_fp_fusion=False,  # level A: every product and sum rounds separately, as in eager PyTorch
            **tile_and_config("rotate", x, config),
        )
