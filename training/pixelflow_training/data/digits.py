"""Scikit-learn's handwritten digits, in memory."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pixelflow_training.config import DataConfig

from .source import ImageSet, split


def load_digits(config: DataConfig, resolution: int, channels: int) -> tuple[ImageSet, ImageSet]:
    """Training and held-out parts of the 1,797 real 8x8 scans (E. Alpaydin, C. Kaynak, UCI 1998), named by number.

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
    kept, held_out = split(len(scans.target), config)
    grey = np.stack([enlarge(scan, resolution) for scan in scans.images])
    images = torch.from_numpy(grey)[:, None].expand(-1, channels, -1, -1).contiguous()
    labels = torch.from_numpy(scans.target.astype(np.int64))

    def part(chosen: Tensor) -> ImageSet:
        return ImageSet(images[chosen], labels[chosen], [f"scan {number}" for number in chosen.tolist()])

    return part(kept), part(held_out)


def enlarge(scan: np.ndarray, resolution: int) -> np.ndarray:
    """An 8x8 scan of values 0..16 as ``[resolution, resolution]`` uint8."""
    small = Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8))
    return np.asarray(small.resize((resolution, resolution), Image.Resampling.BICUBIC))
