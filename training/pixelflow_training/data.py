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


def augment(images: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Turn, resize and move each image a little: ``[n, c, R, R]`` float in [-1, 1], the background being -1."""
    if not config.active:
        return images
    turn, size, move_x, move_y = (2 * torch.rand(4, len(images), generator=generator) - 1).unbind()
    angle = turn * math.radians(config.rotate)
    inverse = 1 / (1 + size * config.scale)
    cos, sin = torch.cos(angle) * inverse, torch.sin(angle) * inverse
    shift = 2 * config.shift
    matrix = torch.stack(
        [torch.stack([cos, -sin, move_x * shift], -1), torch.stack([sin, cos, move_y * shift], -1)], dim=1
    )
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, mode="bicubic", align_corners=False).clamp(0, 2) - 1
