"""What the kernels over states share: a program's block of one image, the velocity in it, and their arguments.

A program works on one block of one image; where an image ends, its last block is masked, so no block has two images and
an image's bits do not depend on the others.
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

SMALL_IMAGE = 16384  # values; smaller images have blocks of their own size, so that there are enough of them


# --- in kernels --------------------------------------------------------------------------------------------


@triton.jit
def block_of(blocks, stride_image, BLOCK: tl.constexpr):
    """This program's image, its places within the image, which of them there are, and where the image begins."""
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
    """The block's velocity, both halves read once and combined where there are two."""
    if WIDTH == 0:  # contiguous
        velocity_ptr += image.to(tl.int64) * stride_image
        inside = places
    else:  # rows of WIDTH values, further apart than that; an image has whole rows
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
    """The grid; and the values of an image, the blocks that they take, and the configuration.

    The shape class depends on the image alone: the size of its blocks decides the bits of its norm.
    """
    values = x.numel() // images
    if config is None:
        shape_class = "small" if values <= SMALL_IMAGE else "large"
        config = launch_config(f"ode_step.{kernel}", shape_class, arch_of(x.device))
    blocks = triton.cdiv(values, config["BLOCK"])
    return (images * blocks,), {"stride_image": values, "blocks": blocks, **config}


def velocity_arguments(velocity: Tensor | None, guidance: Tensor | None, device: torch.device) -> dict[str, object]:
    """What :func:`guided_velocity` takes; the velocity is contiguous, or rows ``[R, W]`` of dense channels, or None."""
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
    """Index of the first weight that counts: there a sum begins."""
    return next(i for i, w in enumerate(weights) if w != 0.0)
