"""Contact sheets, animations of a cascade, and writing images to files."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .events import StepEvent
from .output import quantized, to_output, to_uint8

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

    def save(self, path: Path, milliseconds: int = 120, hold: int = 2000) -> None:
        """Write an animated WebP that holds its last frame.

        The format merges equal consecutive frames into one longer frame.

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

        write_atomically(path, write)


def pixels(latents: Tensor) -> Pixels:
    """Convert a state ``[B, c, h, w]`` in [-1, 1] to ``[B, h, w, c]`` uint8, or ``[B, h, w]`` if c is 1."""
    array = to_output(latents, "np")
    assert isinstance(array, np.ndarray)
    return to_uint8(array)


def write_images(images: NDArray[np.float32], output: str) -> list[Path]:
    """Write images in the format that the path implies.

    Args:
        images: ``[N, H, W, c]`` in [0, 1].
        output: ``*.png``: the image, or a contact sheet of several. ``*.npz``: ``arr_0``, uint8 NHWC, as common FID
            evaluators read. ``*.npy``: float32 NHWC in [0, 1]. A path ending in ``/`` or an existing folder:
            ``000000.png`` and so on; the folder must not contain PNG files, which would be mistaken for results.

    Returns:
        the files written.

    Raises:
        ValueError: the path has another ending, or the folder contains PNG files.
    """
    path = Path(check_output(output))
    if output.endswith("/") or path.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        files = [path / f"{i:06d}.png" for i in range(len(images))]
        for file, image in zip(files, to_uint8(images), strict=True):
            save_png(Image.fromarray(image), file)
        return files
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffix.lower():
        case ".png":
            drawn = to_uint8(images)
            sheet = Image.fromarray(drawn[0]) if len(drawn) == 1 else contact_sheet(drawn, _columns(len(drawn)))
            save_png(sheet, path)
        case ".npz":
            write_atomically(path, lambda file: np.savez(file, arr_0=quantized(images)))
        case ".npy":
            write_atomically(path, lambda file: np.save(file, images))
    return [path]


def check_output(output: str) -> str:
    """Refuse, before any work is done, a path that :func:`write_images` would refuse; returns the path."""
    folder = output.endswith("/") or (output != "" and Path(output).is_dir())
    if folder and any(Path(output).glob("*.png")):
        raise ValueError(f"output: got {output!r}, which holds PNG files, expected a folder without any")
    if not folder and Path(output).suffix.lower() not in (".png", ".npz", ".npy"):
        raise ValueError(f"output: got {output!r}, expected a path ending in .png, .npz, .npy or /")
    return output


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG file atomically."""
    write_atomically(path, lambda file: image.save(file, "PNG"))


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write to a temporary file in the same folder, then rename it.

    Readers see either the old file or the complete new one.
    """
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            write(file)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
            mask = os.umask(0)
            os.umask(mask)
            os.fchmod(file.fileno(), 0o666 & ~mask)
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _columns(count: int) -> int:
    return math.ceil(math.sqrt(count))
