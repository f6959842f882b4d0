"""Decodes image files of untrusted content to pixels."""

from __future__ import annotations

import warnings
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .source import PASSING, UnreadableImageError

FORMATS = ("BMP", "JPEG", "PNG", "WEBP")  # detected by content; no other Pillow decoder sees the bytes
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
OTHER_SUFFIXES = (".avif", ".gif", ".heic", ".jfif", ".jp2", ".jpe", ".jxl", ".pgm", ".ppm", ".tif", ".tiff")
"""Of images that are not read: a folder of them is more likely a mistake than meant to be left out."""


def decode(file: BinaryIO, channels: int, max_pixels: int) -> Tensor:
    """Decode an image and apply its EXIF orientation; of an animation, decode the first frame.

    Args:
        file: a JPEG, PNG, WebP or BMP.
        channels: 3 for colour, 1 for grey. Palettes and CMYK are converted, transparency is dropped, and of 16-bit
            samples the high byte is taken.
        max_pixels: an image whose header states more pixels is refused before it is decoded.

    Returns:
        ``[channels, H, W]`` uint8.

    Raises:
        UnreadableImageError: the bytes are not such an image, are incomplete, or have more than ``max_pixels`` pixels.
        OSError: a transient failure; reading may succeed another time.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata, which changes no pixel
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                check_pixels(image.size, max_pixels)
                image.load()
                return _pixels(_upright(image), channels)
    except (UnreadableImageError, MemoryError):
        raise
    except UnidentifiedImageError:  # a subclass of OSError, but a fault of the bytes
        raise UnreadableImageError("not a JPEG, PNG, WebP or BMP image") from None
    except Exception as error:  # decoders given arbitrary bytes have no error type in common
        if isinstance(error, OSError) and error.errno in PASSING:
            raise
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error


def check_pixels(size: tuple[int, int], max_pixels: int, what: str = "") -> None:
    """Refuse a size with too many pixels.

    Args:
        size: width and height.
        max_pixels: the limit.
        what: prefix of the message.

    Raises:
        UnreadableImageError: there are more than ``max_pixels``; the message states the size.
    """
    width, height = size
    if width * height > max_pixels:
        raise UnreadableImageError(f"{what}{width} x {height} pixels; data.max_pixels is {max_pixels}")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the metadata cannot be read; the pixels have been decoded
        return image


def _pixels(image: Image.Image, channels: int) -> Tensor:
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    pixels = torch.from_numpy(np.array(image.convert("L" if channels == 1 else "RGB")))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1)
