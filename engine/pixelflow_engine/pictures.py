"""Contact sheets, and animations of a cascade."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .events import StepEvent
from .files import write_atomically
from .output import to_output, to_uint8

Pixels = NDArray[np.uint8]


def contact_sheet(images: Pixels, columns: int, zoom: int = 1, gap: int = 2) -> Image.Image:
    """Arrange images in rows, left to right.

    Args:
        images: ``[N, H, W, c]`` or ``[N, H, W]`` uint8.
        columns: images per row.
        zoom: integer enlargement without interpolation.
        gap: width in pixels of the white space around images.
    """
    count, height, width = images.shape[:3]
    rows = math.ceil(count / columns)
    cell_height, cell_width = height * zoom + gap, width * zoom + gap
    sheet = np.full((rows * cell_height + gap, columns * cell_width + gap, *images.shape[3:]), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * cell_height, gap + i % columns * cell_width
        sheet[top : top + height * zoom, left : left + width * zoom] = image.repeat(zoom, 0).repeat(zoom, 1)
    return Image.fromarray(sheet)


class CascadeRecorder:
    """Records the state after every step; pass it as ``callback_on_step_end``.

    Args:
        height, width: size of the finished images in pixels; smaller stages are enlarged without interpolation.
        columns: images per row of a frame.
        zoom: integer enlargement of the finished images.
    """

    def __init__(self, height: int, width: int, columns: int, zoom: int = 1) -> None:
        self.height, self.width, self.columns, self.zoom = height, width, columns, zoom
        self.frames: list[Image.Image] = []

    def __call__(self, event: StepEvent) -> None:
        """Record the state of an event; all images must have the same size."""
        if isinstance(event.latents, list):
            raise ValueError("latents: got images of several sizes, expected one size for an animation")
        images = pixels(event.latents)
        grown = images.repeat(self.height // images.shape[1], 1).repeat(self.width // images.shape[2], 2)
        self.frames.append(contact_sheet(grown, self.columns, self.zoom))

    def save(self, path: str | os.PathLike[str], milliseconds: int = 120, hold: int = 2000) -> None:
        """Write an animated WebP that holds its last frame.

        Missing folders are made. The format merges equal consecutive frames into one longer frame.

        Raises:
            ValueError: no step was recorded.
        """
        if not self.frames:
            raise ValueError("frames: got none, expected at least one recorded step")
        durations = [milliseconds] * (len(self.frames) - 1) + [hold]
        first, *others = self.frames

        def write(file: BinaryIO) -> None:
            first.save(
                file, "WEBP", save_all=True, append_images=others, duration=durations, loop=0, quality=80, method=4
            )

        write_atomically(Path(path), write)


def pixels(latents: Tensor) -> Pixels:
    """Convert a state ``[B, c, h, w]`` in [-1, 1] to ``[B, h, w, c]`` uint8, or ``[B, h, w]`` if c is 1."""
    array = to_output(latents, "np")
    assert isinstance(array, np.ndarray)
    return to_uint8(array)
