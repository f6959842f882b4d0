"""The published preparation of an image: resized, and a square cut out."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .decode import check_pixels

MARGIN = 1.125  # of the short side over the square that is cut out at random


def prepare(
    image: Tensor, resolution: int, crop: Literal["random", "center"], place: tuple[float, float], max_pixels: int
) -> Tensor:
    """Resize an image and cut a square out of it, as the published code does but for where.

    Args:
        image: ``[c, H, W]`` uint8, c = 1 or 3.
        resolution: R, the square's side.
        crop: ``random``: the short side becomes 1.125 R by Lanczos's filter, and the square is cut out at ``place``.
            ``center``: halved by means of 2x2 blocks while it stays R or larger, then the short side becomes R by
            bicubic interpolation, and the square is cut out of the middle.
        place: see :func:`offset`; across, down.
        max_pixels: a strip so narrow that it would have more when resized is refused.

    Returns:
        ``[c, R, R]`` uint8.

    Raises:
        UnreadableImageError: a narrow strip.

    Source: arXiv 2504.07963 and its code; Dhariwal and Nichol, arXiv 2105.05233, for the crop of the middle.
    """
    channels_last = image.permute(1, 2, 0).numpy()
    picture = Image.fromarray(channels_last[..., 0] if image.shape[0] == 1 else channels_last)
    if crop == "random":
        short = round(MARGIN * resolution)
        size = tuple(short * side // min(picture.size) for side in picture.size)
        picture = _resize(picture, size, Image.Resampling.LANCZOS, max_pixels)
    else:
        while min(picture.size) >= 2 * resolution:
            picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
        scale = resolution / min(picture.size)
        size = tuple(round(side * scale) for side in picture.size)
        picture = _resize(picture, size, Image.Resampling.BICUBIC, max_pixels)
        place = 0.5, 0.5
    left, top = (offset(side - resolution, where) for side, where in zip(picture.size, place, strict=True))
    square = torch.from_numpy(np.array(picture.crop((left, top, left + resolution, top + resolution))))
    return square[None] if square.ndim == 2 else square.permute(2, 0, 1)


def offset(room: int, place: float) -> int:
    """Where a window begins that may begin anywhere from 0 to ``room``.

    Args:
        room: whole pixels.
        place: above 0, at most 1. Where it is uniform, every beginning is equally likely; 1/2 is the middle, or the
            pixel before it.
    """
    return math.ceil(place * (room + 1)) - 1


def _resize(picture: Image.Image, size: tuple[int, ...], by: Image.Resampling, max_pixels: int) -> Image.Image:
    width, height = size
    check_pixels((width, height), max_pixels, f"{picture.width} x {picture.height} pixels, resized to ")
    return picture.resize((width, height), by)
