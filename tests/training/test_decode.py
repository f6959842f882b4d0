"""Image files of every kind become the pixels that they hold; whatever is none is refused with its reason."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from pixelflow_training.config import PILLOW_PIXELS
from pixelflow_training.data import UnreadableImageError, decode
from support.pictures import Pixels, encoded, pixels, png


def read(content: bytes, channels: int = 3, max_pixels: int = PILLOW_PIXELS) -> Pixels:
    """``[H, W, c]``."""
    image: Tensor = decode(io.BytesIO(content), channels, max_pixels)
    return np.asarray(image.permute(1, 2, 0).numpy())


def refusal(content: bytes, max_pixels: int = PILLOW_PIXELS) -> str:
    with pytest.raises(UnreadableImageError) as caught:
        read(content, max_pixels=max_pixels)
    return str(caught.value)


COLOUR = pixels(5, 7)
GREY = pixels(5, 7, 1, channels=1)


def thrice(grey: Pixels) -> Pixels:
    return grey.repeat(3, axis=2)


# --- what is read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
def test_lossless_files_give_their_pixels(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(read(encoded(COLOUR, kind, **options)), COLOUR)


def test_a_jpeg_gives_nearly_its_pixels() -> None:
    """One colour everywhere is one coefficient of each block: a level for its rounding, one for that of the colours."""
    for colour in ((200, 30, 90), (0, 0, 0), (12, 250, 130)):
        image = np.full((9, 11, 3), colour, dtype=np.uint8)
        assert np.abs(read(encoded(image, "JPEG", quality=100)).astype(int) - colour).max() <= 2


@pytest.mark.parametrize(("cmyk", "rgb"), [((0, 255, 255, 0), (255, 0, 0)), ((0, 0, 0, 255), (0, 0, 0))])
def test_cmyk_is_ink(cmyk: tuple[int, ...], rgb: tuple[int, ...]) -> None:
    content = encoded(Image.new("CMYK", (9, 11), cmyk), "JPEG", quality=100)
    assert np.abs(read(content).astype(int) - rgb).max() <= 2


def test_a_palette_is_looked_up() -> None:
    palette, indices = pixels(1, 256, 2)[0], pixels(5, 7, 3, channels=1)[..., 0]
    image = Image.new("P", (7, 5))
    image.putdata(indices.ravel().tolist())
    image.putpalette(palette.tobytes())
    expected = palette[indices]
    assert np.array_equal(read(encoded(image)), expected)
    # Pillow warns of such a palette; pytest would make the warning an error.
    assert np.array_equal(read(encoded(image, transparency=bytes(range(256)))), expected)


def test_grey_is_repeated_and_transparency_dropped() -> None:
    alpha = pixels(5, 7, 4, channels=1)
    assert np.array_equal(read(encoded(GREY[..., 0])), thrice(GREY))
    assert np.array_equal(read(encoded(np.concatenate([GREY, alpha], axis=2))), thrice(GREY))
    assert np.array_equal(read(encoded(np.concatenate([COLOUR, alpha], axis=2))), COLOUR)


def test_two_levels_are_black_and_white() -> None:
    bits = GREY > 127
    assert np.array_equal(read(encoded(Image.fromarray(bits[..., 0]))), thrice(bits * np.uint8(255)))


def test_of_sixteen_bits_the_high_byte_is_taken() -> None:
    deep = np.random.default_rng(6).integers(0, 1 << 16, (5, 7, 3)).astype(">u2")
    for colour, image in ((0, deep[..., :1]), (2, deep)):
        rows = b"".join(b"\0" + row.tobytes() for row in image)
        high = (image >> 8).astype(np.uint8)
        assert np.array_equal(read(png(7, 5, 16, colour, rows)), thrice(high) if colour == 0 else high)


def test_a_grey_model_gets_luminance() -> None:
    """ITU-R 601 weights, to a level."""
    assert np.array_equal(read(encoded(GREY[..., 0]), channels=1), GREY)
    luminance = COLOUR @ np.array([0.299, 0.587, 0.114])
    assert np.abs(read(encoded(COLOUR), channels=1)[..., 0] - luminance).max() <= 1
    ink = encoded(Image.new("CMYK", (9, 11), (0, 255, 255, 0)), "JPEG", quality=100)
    assert np.abs(read(ink, channels=1).astype(int) - round(0.299 * 255)).max() <= 2


def test_orientation_is_applied() -> None:
    upright = {
        1: COLOUR,
        2: COLOUR[:, ::-1],
        3: COLOUR[::-1, ::-1],
        4: COLOUR[::-1],
        5: COLOUR.transpose(1, 0, 2),
        6: np.rot90(COLOUR, -1),
        7: COLOUR.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(COLOUR),
    }
    for orientation, expected in upright.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        assert np.array_equal(read(encoded(COLOUR, exif=exif)), expected), orientation


def test_an_orientation_that_cannot_be_read_is_none() -> None:
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        for exif in (b"nonsense", b"Exif\0\0MM\0*\0\0\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x09\0"):
            assert np.array_equal(read(encoded(COLOUR, kind, exif=exif, **options)), COLOUR), (kind, exif)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(COLOUR, kind, save_all=True, append_images=[Image.fromarray(pixels(5, 7, 8))], **options)
    assert np.array_equal(read(content), COLOUR)


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP"])
def test_half_a_file_is_refused(kind: str) -> None:
    content = encoded(pixels(64, 64), kind)
    read(content)
    assert refusal(content[: len(content) // 2])


def test_a_changed_byte_of_a_png_is_refused() -> None:
    content = bytearray(encoded(pixels(64, 64)))
    content[len(content) // 2] ^= 1
    assert refusal(bytes(content))


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xd8", b"a text, whatever it is called\n", encoded(GREY[..., 0], "GIF")]
)
def test_what_is_no_image_of_ours_is_refused(content: bytes) -> None:
    """By one reason, without addresses of objects: a log must read the same again."""
    assert refusal(content) == "not a JPEG, PNG, WebP or BMP image"


def test_size_is_looked_at_before_pixels() -> None:
    """The file has no pixels at all: had they been asked for, that would be the reason."""
    header = png(3000, 2000, 8, 2, b"")
    assert refusal(header, 5_999_999) == "3000 x 2000 pixels; data.max_pixels is 5999999"
    assert "pixels;" not in refusal(header, 6_000_000)
    assert np.array_equal(read(encoded(COLOUR), max_pixels=35), COLOUR)
    assert refusal(encoded(COLOUR), 34) == "7 x 5 pixels; data.max_pixels is 34"


@pytest.mark.parametrize("side", [9_460, 100_000])  # one pixel too many or so for Pillow's warning; for its error
def test_a_bomb_is_refused(side: int) -> None:
    assert re.search(rf"Bomb.*{side * side} pixels", refusal(png(side, side, 8, 2, b"")))
