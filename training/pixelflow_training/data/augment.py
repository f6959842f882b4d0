"""Random affine augmentation of training images."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pixelflow_kernels.transfers import uploaded
from pixelflow_training.config import AugmentConfig


def to_signed(images: Tensor) -> Tensor:
    """Convert uint8 0..255 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def augment(images: Tensor, config: AugmentConfig, affine: Tensor) -> Tensor:
    """Rotate, scale and shift each image by its own random amounts.

    Every element of the sampling grid is computed separately, without a matrix product, so an image's bits do not
    depend on the other images of the batch.

    Args:
        images: ``[n, c, R, R]`` uint8, or float32 in [-1, 1]. Outside of them is black: 0, or -1 in float32.
        config: the limits.
        affine: ``[n, 4]`` from -1 to 1, as fractions of the limits: rotation, scale, shift across, shift down.

    Returns:
        the images unchanged if all affine limits are zero, else float32 in [-1, 1].
    """
    if not (config.rotate or config.scale or config.shift):
        return images
    if images.dtype == torch.uint8:
        images = to_signed(images)
    turn, size, across, down = uploaded(affine.double(), images.device)[..., None, None].unbind(1)
    angle, inverse = turn * math.radians(config.rotate), 1 / (1 + size * config.scale)
    cos, sin = torch.cos(angle) * inverse, torch.sin(angle) * inverse
    y, x = (
        torch.arange(1 - side, side, 2, dtype=torch.float64, device=images.device) / side for side in images.shape[2:]
    )
    # The source position of each pixel, relative to the middle, in units of half the side.
    from_x = cos * x - sin * y[:, None] + 2 * config.shift * across
    from_y = sin * x + cos * y[:, None] + 2 * config.shift * down
    grid = torch.stack([from_x, from_y], dim=-1).float()
    return F.grid_sample(images + 1, grid, mode="bicubic", align_corners=False).clamp(0, 2) - 1
