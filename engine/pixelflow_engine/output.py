"""Image formats that a call accepts and returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Latents = Tensor | list[Tensor]
"""The state of every image: ``[B, c, h, w]``, or a list of ``[c, h, w]`` if sizes differ."""

OutputType = Literal["pil", "np", "pt"]
OUTPUT_TYPES: tuple[OutputType, ...] = ("pil", "np", "pt")
Images = list[Image.Image] | NDArray[np.float32] | Tensor | list[NDArray[np.float32]] | list[Tensor]


def to_output(x: Latents, output_type: OutputType) -> Images:
    """Convert ``clamp(x / 2 + 1/2, 0, 1)`` of ``x [B, c, H, W]``, or of a list of ``[c, H, W]``, to an output type."""
    if isinstance(x, list):
        several = [_shown(image) for image in x]
        if output_type == "pt":
            return several
        arrays = [_channels_last(image) for image in several]
        return arrays if output_type == "np" else [Image.fromarray(to_uint8(array)) for array in arrays]
    images = _shown(x)
    if output_type == "pt":
        return images
    array = _channels_last(images)
    return array if output_type == "np" else [Image.fromarray(pixels) for pixels in to_uint8(array)]


def _shown(x: Tensor) -> Tensor:
    return (x / 2 + 0.5).clamp(0, 1).float()


def _channels_last(images: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = images.movedim(-3, -1).cpu().numpy()
    return array


def quantized(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Convert images in [0, 1] to 0..255, rounded; NaN, in an image that failed, becomes 0."""
    return np.nan_to_num(images * 255).round().astype(np.uint8)


def to_uint8(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Convert as :func:`quantized`; the axis of a single channel is dropped for Pillow."""
    pixels = quantized(images)
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def from_images(images: object, channels: int) -> Tensor:
    """Convert images to ``[B, c, H, W]`` float32 in [-1, 1].

    Args:
        images: a PIL image or a list of them, an array ``[B, H, W, c]`` or a tensor ``[B, c, H, W]`` in [0, 1]; all of
            one size. Palettes and CMYK are converted, transparency is dropped, and 16-bit samples keep their precision.
        channels: c.

    Raises:
        ValueError: the images are invalid; the message states what was given and what was expected.
    """
    expected = f"expected PIL images, an array [B, H, W, {channels}] or a tensor [B, {channels}, H, W] in [0, 1]"
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, Sequence) and images and all(isinstance(image, Image.Image) for image in images):
        mode = {1: "L", 3: "RGB"}.get(channels)
        if mode is None:
            raise ValueError(f"image: got PIL images, expected an array or a tensor for a model of {channels} channels")
        if len(sizes := {image.size for image in images}) > 1:
            raise ValueError(f"image: got PIL images of the sizes {sorted(sizes)}, expected one size")
        pixels = np.stack([_decoded(image, mode) for image in images])
        images = pixels if pixels.ndim == 4 else pixels[..., None]
    if isinstance(images, np.ndarray):
        if images.ndim != 4:
            raise ValueError(f"image: got an array of shape {images.shape}, {expected}")
        images = torch.from_numpy(np.ascontiguousarray(images)).movedim(-1, 1)
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != channels:
        got = f"a tensor {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"image: got {got}, {expected}")
    if not images.dtype.is_floating_point:
        raise ValueError(f"image: got {images.dtype}, expected numbers of a floating type in [0, 1]")
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError(f"image: got values outside of [0, 1], {expected}")
    return images.float() * 2 - 1


def _decoded(image: Image.Image, mode: str) -> NDArray[np.float32]:
    """A picture ``[H, W]`` in mode L, ``[H, W, 3]`` in mode RGB, in [0, 1]."""
    if image.mode.startswith("I;16"):  # grey; Pillow would clip its values to 255
        grey: NDArray[np.float32] = np.divide(np.asarray(image), 65535, dtype=np.float32)
        return grey if mode == "L" else np.stack([grey] * 3, axis=-1)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"image: got a PIL image of mode {image.mode}, which does not say what white is, expected one of 8 or 16 "
            "bits, or an array in [0, 1]"
        )
    try:
        return np.divide(np.asarray(image.convert(mode)), 255, dtype=np.float32)
    except ValueError as error:
        raise ValueError(f"image: got a PIL image of mode {image.mode}, expected mode {mode}: {error}") from error
