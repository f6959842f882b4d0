"""Kernels for the norms of step-size control, each in one pass over memory: error norm, and norms of the first step.

    ratio = sqrt(mean((sum_i (h e_i) k_i / (atol + rtol max(|x|, |x1|)))^2))        x1 = x + sum_i (h a_i) k_i

Source: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, section II.4.

A norm takes two launches: every program writes the sum of its block (``blocks``), and a second kernel adds an image's
sums in the order of the blocks. The order of summation depends on the number of values per image and on the velocity's
dtype and strides (the widest load determines which values of a block a thread holds), not on the batch. Slopes stored
in the same pass are level A, as in ``kernels``.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixelflow_kernels.configs import arch_of, launch_config
from pixelflow_kernels.rounding import apart

from .blocks import block_of, first_nonzero, guided_velocity, launch_arguments, velocity_arguments


@triton.jit
def _sum_of_squares(error, scale, mask):
    """Sum the squares of ``error / scale`` as float64, without those outside the image, where the scale may be 0."""
    ratio = error / scale
    return tl.sum(tl.where(mask, ratio * ratio, 0.0)).to(tl.float64)


@triton.jit
def _error_kernel(
    x_ptr,
    slopes_ptr,
    velocity_ptr,
    step_ptr,
    guidance_ptr,
    tolerance_ptr,
    partial_ptr,
    stride_slope,
    stride_image,
    stride_half,
    stride_velocity_row,
    blocks,
    SOLUTION: tl.constexpr,
    ERROR: tl.constexpr,
    COUNT: tl.constexpr,
    FIRST_OF_SOLUTION: tl.constexpr,
    FIRST_OF_ERROR: tl.constexpr,
    FRESH: tl.constexpr,
    GUIDED: tl.constexpr,
    GUIDANCE_PER_IMAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    APART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute one sum of squares per block.

    The solution is recomputed rather than read, because its slopes are loaded anyway.
    """
    high: tl.constexpr = x_ptr.dtype.element_ty
    image, places, mask, start = block_of(blocks, stride_image, BLOCK)
    step = tl.load(step_ptr + image)
    rtol, atol = tl.load(tolerance_ptr).to(high), tl.load(tolerance_ptr + 1).to(high)
    x = tl.load(x_ptr + start + places, mask=mask, other=0.0)
    slopes_ptr += start
    for i in tl.static_range(COUNT):
        if FRESH and i == COUNT - 1:
            slope = guided_velocity(
                velocity_ptr, guidance_ptr, image, places, mask, stride_image, stride_half, stride_velocity_row,
                GUIDED, GUIDANCE_PER_IMAGE, WIDTH, APART, high,
            )  # fmt: skip
            tl.store(slopes_ptr + tl.cast(stride_slope, tl.int64) * i + places, slope, mask=mask)
        elif SOLUTION[i] != 0.0 or ERROR[i] != 0.0:
            slope = tl.load(slopes_ptr + tl.cast(stride_slope, tl.int64) * i + places, mask=mask, other=0.0)
        if SOLUTION[i] != 0.0:
            term = (step * SOLUTION[i]).to(high) * slope
            if APART:
                term = apart(term)
            if i == FIRST_OF_SOLUTION:  # noqa: SIM108
                change = term
            else:
                change = change + term
        if ERROR[i] != 0.0:
            term = (step * ERROR[i]).to(high) * slope
            if APART:
                term = apart(term)
            if i == FIRST_OF_ERROR:  # noqa: SIM108
                error = term
            else:
                error = error + term
    # A NaN must propagate to the norm; otherwise a broken state would be accepted.
    largest = tl.maximum(tl.abs(x), tl.abs(x + change), propagate_nan=tl.PropagateNan.ALL)
    tl.store(partial_ptr + tl.program_id(0), _sum_of_squares(error, atol + rtol * largest, mask))


@triton.jit
def _start_kernel(
    x_ptr,
    slope_ptr,
    velocity_ptr,
    guidance_ptr,
    tolerance_ptr,
    partial_ptr,
    stride_image,
    stride_half,
    stride_velocity_row,
    blocks,
    PROBE: tl.constexpr,
    GUIDED: tl.constexpr,
    GUIDANCE_PER_IMAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    APART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the first slope and measure state and slope; with PROBE, measure the velocity's change from that slope."""
    high: tl.constexpr = x_ptr.dtype.element_ty
    image, places, mask, start = block_of(blocks, stride_image, BLOCK)
    velocity = guided_velocity(
        velocity_ptr, guidance_ptr, image, places, mask, stride_image, stride_half, stride_velocity_row,
        GUIDED, GUIDANCE_PER_IMAGE, WIDTH, APART, high,
    )  # fmt: skip
    x = tl.load(x_ptr + start + places, mask=mask, other=0.0)
    rtol, atol = tl.load(tolerance_ptr).to(high), tl.load(tolerance_ptr + 1).to(high)
    scale = atol + rtol * tl.abs(x)
    if PROBE:
        slope = tl.load(slope_ptr + start + places, mask=mask, other=0.0)
        tl.store(partial_ptr + tl.program_id(0), _sum_of_squares(velocity - slope, scale, mask))
    else:
        tl.store(slope_ptr + start + places, velocity, mask=mask)
        tl.store(partial_ptr + tl.program_id(0), _sum_of_squares(x, scale, mask))
        partial_ptr += tl.num_programs(0)
        tl.store(partial_ptr + tl.program_id(0), _sum_of_squares(velocity, scale, mask))


@triton.jit
def _finish_kernel(partial_ptr, out_ptr, images, blocks, values, BATCH_WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Compute ``out[r, b] = sqrt(mean)`` from the sums ``partial[r, b, :]``; if BATCH_WIDE, from ``partial[r, :, :]``.

    In the batch-wide case every program sums the whole batch: there are few sums, and no program waits for another.
    """
    count = blocks * images if BATCH_WIDE else blocks
    values = tl.cast(values, tl.int64)
    if BATCH_WIDE:
        values *= images  # a batch may have more values than 32 bits count, an image has not
        partial_ptr += (tl.program_id(0) // images).to(tl.int64) * count
    else:
        partial_ptr += tl.program_id(0).to(tl.int64) * count
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for first in range(0, count, BLOCK):
        places = first + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + places, mask=places < count, other=0.0)
    tl.store(out_ptr + tl.program_id(0), tl.sqrt(tl.sum(total) / values.to(tl.float64)))


def launch_error(
    x: Tensor,
    slopes: Tensor,
    step: Tensor,
    solution: Sequence[float],
    error: Sequence[float],
    tolerance: Tensor,
    velocity: Tensor | None,
    guidance: Tensor | None,
    out: Tensor,
    batch_wide: bool,
    config: Mapping[str, int] | None = None,
) -> None:
    """Fill ``out [B]`` with the error norm and, if ``velocity`` is given, the last slope from it."""
    images = step.shape[0]
    if images == 0:
        return
    grid, arguments = launch_arguments("error", x, images, config)
    partial = out.new_empty(1, images, arguments["blocks"])
    padded = (*solution, *[0.0] * len(error))[: len(error)]  # the last slope, evaluated at it, is not part of it
    with torch.cuda.device_of(x):
        _error_kernel[grid](
            x_ptr=x,
            slopes_ptr=slopes,
            step_ptr=step,
            tolerance_ptr=tolerance,
            partial_ptr=partial,
            stride_slope=slopes.stride(0),
            SOLUTION=padded,
            ERROR=tuple(error),
            COUNT=len(error),
            FIRST_OF_SOLUTION=first_nonzero(padded),
            FIRST_OF_ERROR=first_nonzero(error),
            FRESH=velocity is not None,
            enable_fp_fusion=False,  # the stored slope is level A
            **arguments,
            **velocity_arguments(velocity, guidance, x.device),
        )
    launch_finish(partial, arguments["stride_image"], out[None], batch_wide)


def launch_start(
    x: Tensor,
    slope: Tensor,
    velocity: Tensor,
    guidance: Tensor | None,
    tolerance: Tensor,
    out: Tensor,
    probe: bool,
    batch_wide: bool,
    config: Mapping[str, int] | None = None,
) -> None:
    """Fill ``out``: ``[1, B]`` for a probe, else ``[2, B]``; without a probe, fill ``slope`` too."""
    rows, images = out.shape
    if images == 0:
        return
    grid, arguments = launch_arguments("start", x, images, config)
    partial = out.new_empty(rows, images, arguments["blocks"])
    with torch.cuda.device_of(x):
        _start_kernel[grid](
            x_ptr=x,
            slope_ptr=slope,
            tolerance_ptr=tolerance,
            partial_ptr=partial,
            PROBE=probe,
            enable_fp_fusion=False,  # the stored slope is level A
            **arguments,
            **velocity_arguments(velocity, guidance, x.device),
        )
    launch_finish(partial, arguments["stride_image"], out, batch_wide)


def launch_finish(
    partial: Tensor, values: int, out: Tensor, batch_wide: bool, config: Mapping[str, int] | None = None
) -> None:
    """Fill ``out [R, B]`` from the block sums ``partial [R, B, P]``; an image has ``values`` values."""
    rows, images, blocks = partial.shape
    config = launch_config("ode_step.finish", "any", arch_of(out.device)) if config is None else config
    with torch.cuda.device_of(out):
        _finish_kernel[(rows * images,)](
            partial_ptr=partial,
            out_ptr=out,
            images=images,
            blocks=blocks,
            values=values,
            BATCH_WIDE=batch_wide,
            enable_fp_fusion=False,
            **config,
        )
