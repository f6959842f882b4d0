"""Images to train on: scikit-learn's handwritten digits, and random affine changes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .config import AugmentConfig, DataConfig


@dataclass(frozen=True, eq=False, slots=True)
class ImageSet:
    """Labelled images in memory.

    Attributes:
        images: ``[N, c, R, R]`` uint8.
        labels: ``[N]`` int64.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.labels.shape[0]


def load_digits(config: DataConfig, resolution: int, channels: int) -> tuple[ImageSet, ImageSet]:
    """Training and held-out parts of the 1,797 real 8x8 scans (E. Alpaydin, C. Kaynak, UCI 1998).

    Args:
        config: how many are held out, and which.
        resolution: side in pixels; the scans are enlarged by bicubic interpolation.
        channels: the grey value is repeated.

    Raises:
        ImportError: scikit-learn, which ships the scans, is not installed.
        ValueError: ``held_out`` leaves nothing on one side.
    """
    try:
        from sklearn.datasets import load_digits as load_scans
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: install the extra `train` (in a clone: make setup)") from error
    scans = load_scans()
    count = len(scans.target)
    if not 0 < config.held_out < count:
        raise ValueError(f"data.held_out: got {config.held_out}, expected 1 to {count - 1}")
    grey = np.stack([enlarge(scan, resolution) for scan in scans.images])
    images = torch.from_numpy(grey)[:, None].expand(-1, channels, -1, -1).contiguous()
    labels = torch.from_numpy(scans.target.astype(np.int64))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(config.split_seed))
    held_out, kept = order[: config.held_out], order[config.held_out :]
    return ImageSet(images[kept], labels[kept]), ImageSet(images[held_out], labels[held_out])


def enlarge(scan: np.ndarray, resolution: int) -> np.ndarray:
    """An 8x8 scan of values 0..16 as ``[resolution, resolution]`` uint8."""
    small = Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8))
    return np.asarray(small.resize((resolution, resolution), Image.Resampling.BICUBIC))


def to_signed(images: Tensor) -> Tensor:
    """uint8 0..255 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def augment(images: Tensor, config: AugmentConfig, affine: Tensor) -> Tensor:
    """Turn, resize and move each image a little.

    Every number of the grid is computed on its own, without a matrix product, so an image does not depend on its mates.

    Args:
        images: ``[n, c, R, R]`` uint8, or float32 in [-1, 1], the background being 0 or -1.
        config: the limits.
        affine: ``[n, 4]`` from -1 to 1, as fractions of them: turn, size, moves across and down.

    Returns:
        the images as they are where the limits are zero, else float32 in [-1, 1].
    """
    if not (config.rotate or config.scale or config.shift):
        return images
    if images.dtype == torch.uint8:
        images = to_signed(images)
    turn, size, across, down = affine.to(images.device, torch.float64)[..., None, None].unbind(1)
    angle, inverse = turn * math.radians(config.rotate), 1 / (1 + size * config.scale)
    cos, sin = torch.cos(angle) * inverse, torch.sin(angle) * inverse
    y, x = (
        torch.arange(1 - side, side, 2, dtype=torch.float64, device=images.device) / side for side in images.shape[2:]
    )
    # In units of half the side, from the middle: where in the image each pixel comes from.
    from_x = cos * x - sin * y[:, None] + 2 * config.shift * across
    from_y = sin * x + cos * y[:, None] + 2 * config.shift * down
    grid = torch.stack([from_x, from_y], dim=-1).float()
    return F.grid_sample(images + 1, grid, mode="bicubic", align_corners=False).clamp(0, 2) - 1
