"""Image files generated for tests, and folders of them."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]


def pixels(height: int, width: int, seed: int = 0, channels: int = 3) -> Pixels:
    """Draw random levels ``[H, W, c]``."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: Pixels | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Return the bytes of an image file."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """Build a PNG from parts that need not be consistent: bit depth, colour type (0 grey, 2 colour), filtered rows."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def photograph_tiles(root: Path, classes: int, each: int, side: int = 40) -> None:
    """Write crops of scikit-learn's two photographs as JPEG files of slightly different sizes, one folder per class."""
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images
    generator = np.random.default_rng(5)
    for label in range(classes):
        folder = root / f"class {label}"
        folder.mkdir(parents=True)
        photograph = photographs[label % 2]
        for number in range(each):
            height, width = (side + generator.integers(0, 20, 2)).tolist()
            top = generator.integers(0, photograph.shape[0] - height)
            left = generator.integers(0, photograph.shape[1] - width)
            tile = np.ascontiguousarray(photograph[top : top + height, left : left + width])
            (folder / f"{number:03d}.JPEG").write_bytes(encoded(tile, "JPEG", quality=95))
