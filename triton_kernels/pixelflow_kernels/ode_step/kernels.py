"""Kernels that update the state by its velocity, each in one pass over memory.

    v = v_null + w (v_cond - v_null)        x1 = x + h v        y = x + sum_i (h w_i) k_i

Source: arXiv 2504.07963, section 3.4; Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, section
II.1.

Everything is level A: without fused multiply-adds every product and sum rounds separately, and ``h w_i`` is a float64
product rounded once, as in eager PyTorch. Each program handles one block of one image (``blocks``).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixelflow_kernels.rounding import apart

from .blocks import block_of, first_nonzero, guided_velocity, launch_arguments, velocity_arguments


@triton.jit
def _euler_kernel(
    x_ptr,
    velocity_ptr,
    step_ptr,
    guidance_ptr,
    out_ptr,
    stride_image,
    stride_half,
    stride_velocity_row,
    blocks,
    STEP_PER_IMAGE: tl.constexpr,
    GUIDED: tl.constexpr,
    GUIDANCE_PER_IMAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    APART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute ``out = x + step v``; ``out`` may be ``x``."""
    high: tl.constexpr = x_ptr.dtype.element_ty
    image, places, mask, start = block_of(blocks, stride_image, BLOCK)
    velocity = guided_velocity(
        velocity_ptr, guidance_ptr, image, places, mask, stride_image, stride_half, stride_velocity_row,
        GUIDED, GUIDANCE_PER_IMAGE, WIDTH, APART, high,
    )  # fmt: skip
    step = tl.load(step_ptr + image * STEP_PER_IMAGE).to(high)
    x = tl.load(x_ptr + start + places, mask=mask, other=0.0)
    change = step * velocity
    if APART:
        change = apart(change)
    tl.store(out_ptr + start + places, x + change, mask=mask)


@triton.jit
def _stage_kernel(
    x_ptr,
    slopes_ptr,
    velocity_ptr,
    step_ptr,
    guidance_ptr,
    out_ptr,
    stride_slope,
    stride_image,
    stride_half,
    stride_velocity_row,
    blocks,
    WEIGHTS: tl.constexpr,
    COUNT: tl.constexpr,
    FIRST: tl.constexpr,
    FRESH: tl.constexpr,
    STEP_PER_IMAGE: tl.constexpr,
    GUIDED: tl.constexpr,
    GUIDANCE_PER_IMAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    APART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute ``out = x + sum_i (step w_i) k_i`` over COUNT slopes; if FRESH, store the velocity as the last slope."""
    high: tl.constexpr = x_ptr.dtype.element_ty
    image, places, mask, start = block_of(blocks, stride_image, BLOCK)
    step = tl.load(step_ptr + image * STEP_PER_IMAGE)
    x = tl.load(x_ptr + start + places, mask=mask, other=0.0)
    slopes_ptr += start
    for i in tl.static_range(COUNT):
        if FRESH and i == COUNT - 1:
            slope = guided_velocity(
                velocity_ptr, guidance_ptr, image, places, mask, stride_image, stride_half, stride_velocity_row,
                GUIDED, GUIDANCE_PER_IMAGE, WIDTH, APART, high,
            )  # fmt: skip
            tl.store(slopes_ptr + tl.cast(stride_slope, tl.int64) * i + places, slope, mask=mask)
        elif WEIGHTS[i] != 0.0:
            slope = tl.load(slopes_ptr + tl.cast(stride_slope, tl.int64) * i + places, mask=mask, other=0.0)
        if WEIGHTS[i] != 0.0:
            term = (step * WEIGHTS[i]).to(high) * slope
            if APART:
                term = apart(term)
            if i == FIRST:  # noqa: SIM108
                total = term
            else:
                total = total + term
    tl.store(out_ptr + start + places, x + total, mask=mask)


@triton.jit
def _accept_kernel(
    x_ptr,
    slopes_ptr,
    solution_ptr,
    accept_ptr,
    stride_slope,
    stride_image,
    blocks,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For accepted images, copy the solution to the state and the LAST slope to the first."""
    image, places, mask, start = block_of(blocks, stride_image, BLOCK)
    mask = mask & (tl.load(accept_ptr + image) != 0)
    solution = tl.load(solution_ptr + start + places, mask=mask, other=0.0)
    slope = tl.load(slopes_ptr + tl.cast(stride_slope, tl.int64) * LAST + start + places, mask=mask, other=0.0)
    tl.store(x_ptr + start + places, solution, mask=mask)
    tl.store(slopes_ptr + start + places, slope, mask=mask)


def launch_euler(
    x: Tensor,
    velocity: Tensor,
    step: Tensor,
    guidance: Tensor | None,
    out: Tensor,
    images: int,
    config: Mapping[str, int] | None = None,
) -> None:
    """Fill ``out``, which may be ``x``; ``step`` and ``guidance`` have one entry, or one per image."""
    if x.numel() == 0:
        return
    grid, arguments = launch_arguments("euler", x, images, config)
    with torch.cuda.device_of(x):
        _euler_kernel[grid](
            x_ptr=x,
            step_ptr=step,
            out_ptr=out,
            STEP_PER_IMAGE=step.shape[0] > 1,
            enable_fp_fusion=False,  # level A
            **arguments,
            **velocity_arguments(velocity, guidance, x.device),
        )


def launch_stage(
    x: Tensor,
    slopes: Tensor,
    step: Tensor,
    weights: Sequence[float],
    velocity: Tensor | None,
    guidance: Tensor | None,
    out: Tensor,
    images: int,
    config: Mapping[str, int] | None = None,
) -> None:
    """Fill ``out`` from the first ``len(weights)`` slopes; if ``velocity`` is given, fill the last of them from it."""
    if x.numel() == 0:
        return
    grid, arguments = launch_arguments("stage", x, images, config)
    with torch.cuda.device_of(x):
        _stage_kernel[grid](
            x_ptr=x,
            slopes_ptr=slopes,
            step_ptr=step,
            out_ptr=out,
            stride_slope=slopes.stride(0),
            WEIGHTS=tuple(weights),
            COUNT=len(weights),
            FIRST=first_nonzero(weights),
            FRESH=velocity is not None,
            STEP_PER_IMAGE=step.shape[0] > 1,
            enable_fp_fusion=False,  # level A
            **arguments,
            **velocity_arguments(velocity, guidance, x.device),
        )


def launch_accept(
    x: Tensor, slopes: Tensor, solution: Tensor, accept: Tensor, config: Mapping[str, int] | None = None
) -> None:
    """Update ``x`` and the first slope for images with ``accept [B]`` (bool)."""
    if x.numel() == 0:
        return
    grid, arguments = launch_arguments("accept", x, accept.shape[0], config)
    with torch.cuda.device_of(x):
        _accept_kernel[grid](
            x_ptr=x,
            slopes_ptr=slopes,
            solution_ptr=solution,
            accept_ptr=accept.view(torch.int8),
            stride_slope=slopes.stride(0),
            LAST=slopes.shape[0] - 1,
            enable_fp_fusion=False,
            **arguments,
        )
