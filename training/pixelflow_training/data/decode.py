"""From the bytes of an image file to pixels, whatever is in them."""

from __future__ import annotations

import warnings
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .source import PASSING, UnreadableImageError

FORMATS = ("BMP", "JPEG", "PNG", "WEBP")  # by content; no other decoder of Pillow sees the bytes
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


def decode(file: BinaryIO, channels: int, max_pixels: int) -> Tensor:
    """Decode an image, turned upright as its EXIF orientation says; of an animation, the first frame.

    Args:
        file: a JPEG, PNG, WebP or BMP.
        channels: 3 for colour, 1 for grey. Palettes and CMYK are converted, transparency is dropped, and of 16 bits the
            high byte is taken.
        max_pixels: an image that says it has more is refused before it is decoded.

    Returns:
        ``[channels, H, W]`` uint8.

    Raises:
        UnreadableImageError: the bytes are no such image, or not all of one.
        OSError: they cannot be read now, and may be another time.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, which changes no pixel
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                check_pixels(image.size, max_pixels)
                image.load()
                return _pixels(_upright(image), channels)
    except (UnreadableImageError, MemoryError):
        raise
    except UnidentifiedImageError:  # an OSError, of the bytes
        raise UnreadableImageError("not a JPEG, PNG, WebP or BMP image") from None
    except Exception as error:  # decoders meet bytes from anywhere, and have no error type in common
        if isinstance(error, OSError) and error.errno in PASSING:
            raise
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error


def check_pixels(size: tuple[int, int], max_pixels: int, what: str = "") -> None:
    """Refuse a width and height whose pixels are too many.

    Raises:
        UnreadableImageError: saying how many there are.
    """
    width, height = size
    if width * height > max_pixels:
        raise UnreadableImageError(f"{what}{width} x {height} pixels; data.max_pixels is {max_pixels}")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # of metadata that cannot be read; the pixels have been
        return image


def _pixels(image: Image.Image, channels: int) -> Tensor:
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    pixels = torch.from_numpy(np.array(image.convert("L" if channels == 1 else "RGB")))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1)
