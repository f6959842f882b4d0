"""Scikit-learn's handwritten digits, in memory."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pixelflow_training.config import DataConfig

from .memory import ImageSet
from .source import split


def load_digits(config: DataConfig, resolution: int, channels: int) -> tuple[ImageSet, ImageSet]:
    """Load the training and held-out parts of the 1,797 real 8x8 scans (E. Alpaydin, C. Kaynak, UCI 1998).

    Images are named by their number in the data set.

    Args:
        config: how many images are held out, and which.
        resolution: side in pixels; the scans are enlarged by bicubic interpolation.
        channels: number of channels; the grey value is repeated in each.

    Returns:
        the images to train on, and the held-out ones.

    Raises:
        ImportError: scikit-learn, which ships the scans, is not installed.
        ValueError: ``held_out`` leaves the training or the held-out part empty.
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
        names = [f"scan {number}" for number in chosen.tolist()]
        return ImageSet(images[chosen], labels[chosen], names, "scikit-learn's digits")

    return part(kept), part(held_out)


def enlarge(scan: np.ndarray, resolution: int) -> np.ndarray:
    """Convert an 8x8 scan of values 0..16 to ``[resolution, resolution]`` uint8."""
    small = Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8))
    return np.asarray(small.resize((resolution, resolution), Image.Resampling.BICUBIC))
