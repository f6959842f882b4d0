"""The published image preparation: resize, then cut out a square."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .decode import check_pixels

MARGIN = 1.125  # short side of the resized image, relative to the side of the random crop


def prepare(
    image: Tensor, resolution: int, crop: Literal["random", "center"], place: tuple[float, float], max_pixels: int
) -> Tensor:
    """Resize an image and crop a square, as the published code does, except that the caller chooses the place.

    Args:
        image: ``[c, H, W]`` uint8, c = 1 or 3.
        resolution: R, the side of the square.
        crop: ``random`` resizes the short side to 1.125 R with a Lanczos filter and cuts the square out at ``place``.
            ``center`` halves the image by means of 2x2 blocks while its short side stays R or larger, then resizes the
            short side to R with bicubic interpolation and cuts the square out of the middle.
        place: across, down; see :func:`offset`.
        max_pixels: an image so narrow that its resized version would have more pixels is refused.

    Returns:
        ``[c, R, R]`` uint8.

    Raises:
        UnreadableImageError: the resized image would have more than ``max_pixels``.

    Source: arXiv 2504.07963 and its code; Dhariwal and Nichol, arXiv 2105.05233, for ``center``.
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
    """Return the start of a window that may start anywhere from 0 to ``room``.

    Args:
        room: whole pixels.
        place: above 0, at most 1. If it is uniform, every start is equally likely; 1/2 is the middle, or the pixel
            before it.
    """
    return math.ceil(place * (room + 1)) - 1


def _resize(picture: Image.Image, size: tuple[int, ...], by: Image.Resampling, max_pixels: int) -> Image.Image:
    width, height = size
    check_pixels((width, height), max_pixels, f"{picture.width} x {picture.height} pixels, resized to ")
    return picture.resize((width, height), by)
