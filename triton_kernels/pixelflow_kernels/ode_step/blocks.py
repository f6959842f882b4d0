"""Shared parts of the kernels over states: a program's block of one image, its velocity, and launch arguments.

A program works on one block of one image. The last block of an image is masked, so no block spans two images and an
image's bits do not depend on the others.
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

SMALL_IMAGE = 16384  # values; images up to this size have a shape class with its own block size, for enough blocks


# --- device functions --------------------------------------------------------------------------------------


@triton.jit
def block_of(blocks, stride_image, BLOCK: tl.constexpr):
    """Return this program's image, its positions in the image, the mask of valid ones, and the image's offset."""
    image = tl.program_id(0) // blocks
    places = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    return image, places, places < stride_image, image.to(tl.int64) * stride_image


@triton.jit
def guided_velocity(
    velocity_ptr,
    guidance_ptr,
    image,
    places,
    mask,
    stride_image,
    stride_half,
    stride_velocity_row,
    GUIDED: tl.constexpr,
    GUIDANCE_PER_IMAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    APART: tl.constexpr,
    high: tl.constexpr,
):
    """Load the block's velocity; with guidance, read both halves once and combine them."""
    if WIDTH == 0:  # contiguous
        velocity_ptr += image.to(tl.int64) * stride_image
        inside = places
    else:  # rows of WIDTH values with a larger stride; every image consists of whole rows
        velocity_ptr += image.to(tl.int64) * (stride_image // WIDTH) * stride_velocity_row
        inside = (places // WIDTH).to(tl.int64) * stride_velocity_row + places % WIDTH
    null = tl.load(velocity_ptr + inside, mask=mask, other=0.0).to(high)
    if GUIDED:
        conditional = tl.load(velocity_ptr + stride_half + inside, mask=mask, other=0.0).to(high)
        weight = tl.load(guidance_ptr + image * GUIDANCE_PER_IMAGE).to(high)
        change = weight * (conditional - null)
        if APART:
            change = apart(change)
        null = null + change
    return null


# --- launches ----------------------------------------------------------------------------------------------


def launch_arguments(
    kernel: str, x: Tensor, images: int, config: Mapping[str, int] | None
) -> tuple[tuple[int], dict[str, int]]:
    """Return the grid, and as kernel arguments the values per image, the blocks per image and the configuration.

    The shape class depends only on the image's size, because the block size determines the bits of its norm.
    """
    values = x.numel() // images
    if config is None:
        shape_class = "small" if values <= SMALL_IMAGE else "large"
        config = launch_config(f"ode_step.{kernel}", shape_class, arch_of(x.device))
    blocks = triton.cdiv(values, config["BLOCK"])
    return (images * blocks,), {"stride_image": values, "blocks": blocks, **config}


def velocity_arguments(velocity: Tensor | None, guidance: Tensor | None, device: torch.device) -> dict[str, object]:
    """Arguments of :func:`guided_velocity`; ``velocity`` is contiguous, rows ``[R, W]`` of dense channels, or None."""
    guided = guidance is not None
    arguments: dict[str, object] = {
        "velocity_ptr": velocity,
        "guidance_ptr": guidance,
        "stride_half": 0,
        "stride_velocity_row": 0,
        "WIDTH": 0,
        "APART": (arch_of(device) or 0) >= 100,
        "GUIDED": guided,
        "GUIDANCE_PER_IMAGE": guidance is not None and guidance.shape[0] > 1,
    }
    if velocity is None:
        return arguments
    if velocity.is_contiguous():
        return arguments | {"stride_half": velocity.numel() // 2 if guided else 0}
    rows, row = velocity.shape[0], velocity.stride(0)
    return arguments | {
        "stride_half": rows // 2 * row if guided else 0,
        "stride_velocity_row": row,
        "WIDTH": velocity.shape[1],
    }


def first_nonzero(weights: Sequence[float]) -> int:
    """Index of the first non-zero weight, where a sum starts."""
    return next(i for i, w in enumerate(weights) if w != 0.0)
