"""Kernels for entering a stage (nearest upsampling, renoising with given or drawn noise), and the normals of stage 0.

    out = alpha * upsample(x) + beta * n

Source: arXiv 2504.07963, section 3.4. A pixel of ``x [B, c, h, w]`` becomes a 2x2 block of ``out``, and a block's four
normals share a counter, so a program holds a tile of ``x`` and writes two rows of ``out`` per row of the tile. Channels
and rows form one dimension: at a channel boundary, rows remain adjacent both in ``x`` and in ``out``.

Rows and columns are separate tile dimensions, the columns being the one whose offsets are known to be divisible; no
element index has to be divided by the width.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixelflow_kernels.configs import arch_of, launch_config

from .normals import SAMPLING, correlate, normals


@triton.jit
def _rounded(x, like):
    """Round ``x`` to the dtype of ``like``, as eager PyTorch does after each operation; the dtype of ``x`` is kept."""
    return x.to(like.dtype).to(x.dtype)


@triton.jit
def _renoised(x, n, alpha, beta):
    """Compute ``alpha * x + beta * n`` in float32 (float64 for float64), rounding each operation to x's dtype."""
    high: tl.constexpr = tl.float64 if x.dtype == tl.float64 else tl.float32
    kept = _rounded(tl.full([], alpha, high) * x.to(high), x)
    # Via float32, because that is how PyTorch rounds float64 to a 16-bit dtype.
    fresh = _rounded(tl.full([], beta, high) * _rounded(n.to(high), x), x)
    return (kept + fresh).to(x.dtype)


@triton.jit
def _renoise_kernel(
    x_ptr,
    noise_ptr,
    seeds_ptr,
    out_ptr,
    rows,
    stride_x_row,
    stride_out_row,
    row_tiles,
    column_tiles,
    stage,
    alpha: tl.float64,
    beta: tl.float64,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program per image and tile. Rows are dense, so row strides equal widths.

    Exactly one of ``noise_ptr`` and ``seeds_ptr`` is None: noise is either given in the layout of ``out``, or drawn.
    """
    program = tl.program_id(0)
    column_tile, row_tile = program % column_tiles, program // column_tiles % row_tiles
    image = (program // column_tiles // row_tiles).to(tl.int64)
    row = row_tile * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = column_tile * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    # Offsets within an image fit in 32 bits (validated in ``op``); the offset of the image itself may not.
    position = row * stride_x_row + column
    x_ptr += image * rows * stride_x_row
    x = tl.load(x_ptr + position, mask=(row < rows) & (column < stride_x_row), other=0.0)

    twice = column_tile * (2 * BLOCK_C) + tl.arange(0, 2 * BLOCK_C)[None, :]
    inside = (row < rows) & (twice < stride_out_row)
    upper = image * rows * (2 * stride_out_row) + (row * (2 * stride_out_row) + twice)
    lower = upper + stride_out_row
    if noise_ptr is None:
        z0, z1, z2, z3 = normals(position, stage, SAMPLING, tl.load(seeds_ptr + image))
        n0, n1, n2, n3 = correlate(z0, z1, z2, z3)
        upper_noise, lower_noise = tl.interleave(n0, n1), tl.interleave(n2, n3)
    else:
        upper_noise = tl.load(noise_ptr + upper, mask=inside, other=0.0)
        lower_noise = tl.load(noise_ptr + lower, mask=inside, other=0.0)
    # Interleaved before the arithmetic rather than after it: one tensor changes its layout instead of four.
    x = tl.interleave(x, x)
    tl.store(out_ptr + upper, _renoised(x, upper_noise, alpha, beta), mask=inside)
    tl.store(out_ptr + lower, _renoised(x, lower_noise, alpha, beta), mask=inside)


@triton.jit
def _initial_kernel(seeds_ptr, out_ptr, stride_out_image, tiles, BLOCK: tl.constexpr):
    """One program per image and tile of ``BLOCK`` counters, each of which yields four neighbouring values."""
    image, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    position = tile * BLOCK + tl.arange(0, BLOCK)
    z0, z1, z2, z3 = normals(position, 0, SAMPLING, tl.load(seeds_ptr + image))
    place = tile * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    z = tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
    tl.store(out_ptr + image * stride_out_image + place, z, mask=place < stride_out_image)


def renoise_class(width: int) -> str:
    """Name of the launch configuration's shape class, by the width of ``x``."""
    return "w64" if width >= 64 else "w32" if width >= 32 else "narrow"


def launch_renoise(
    x: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    out: Tensor,
    stage: int,
    alpha: float,
    beta: float,
    config: Mapping[str, int] | None = None,
) -> None:
    """Fill ``out [B, c, 2h, 2w]``; all tensors are contiguous, and one of ``noise`` and ``seeds [B]`` is given."""
    batch, channels, height, width = x.shape
    if x.numel() == 0:
        return
    config = config or launch_config("cascade.renoise", renoise_class(width), arch_of(x.device))
    rows = channels * height
    row_tiles, column_tiles = triton.cdiv(rows, config["BLOCK_R"]), triton.cdiv(width, config["BLOCK_C"])
    with torch.cuda.device_of(x):
        _renoise_kernel[(batch * row_tiles * column_tiles,)](
            x_ptr=x,
            noise_ptr=noise,
            seeds_ptr=seeds,
            out_ptr=out,
            rows=rows,
            stride_x_row=width,
            stride_out_row=2 * width,
            row_tiles=row_tiles,
            column_tiles=column_tiles,
            stage=stage,
            alpha=alpha,
            beta=beta,
            enable_fp_fusion=False,  # level A: every product and sum rounds separately, as in eager PyTorch
            **config,
        )


def launch_initial(seeds: Tensor, out: Tensor, config: Mapping[str, int] | None = None) -> None:
    """Fill ``out [B, ...]``, contiguous float32, with the stage-0 normals of ``seeds [B]``."""
    if out.numel() == 0:
        return
    config = config or launch_config("cascade.initial", "all", arch_of(seeds.device))
    count = out[0].numel()
    tiles = triton.cdiv(count, 4 * config["BLOCK"])
    with torch.cuda.device_of(seeds):
        _initial_kernel[(out.shape[0] * tiles,)](
            seeds_ptr=seeds,
            out_ptr=out,
            stride_out_image=count,
            tiles=tiles,
            enable_fp_fusion=False,
            **config,
        )
