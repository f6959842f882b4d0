"""The published preparation: how large an image becomes, and which square is cut out of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pixelflow_training import plan as plan_module
from pixelflow_training.config import PILLOW_PIXELS
from pixelflow_training.data import UnreadableImageError
from pixelflow_training.data.crop import offset, prepare
from pixelflow_training.plan import plan_held_out, plan_step
from support.recipes import tiny_recipe


def coordinates(height: int, width: int, step: int = 1) -> Tensor:
    """``[3, H, W]``: the row, the column and a constant, in multiples of ``step`` levels."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows * step, columns * step, torch.full_like(rows, 7)]).to(torch.uint8)


def place_of(square: Tensor) -> tuple[int, int]:
    """Left and top of a square cut out of :func:`coordinates`; it must be one in all of its pixels."""
    top, left = int(square[0, 0, 0]), int(square[1, 0, 0])
    side = square.shape[1]
    assert torch.equal(square, coordinates(top + side, left + side)[:, top:, left:])
    return left, top


# --- where -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("room", "place", "expected"),
    [
        (0, 1e-9, 0), (0, 0.5, 0), (0, 1.0, 0),
        (1, 0.5, 0), (1, 0.51, 1), (1, 1.0, 1), (2, 0.33, 0), (2, 0.34, 1), (2, 0.5, 1), (2, 0.66, 1), (2, 0.67, 2),
        (3, 0.5, 1), (4, 0.5, 2), (255, 0.5, 127), (32, 2.0**-53, 0), (32, 1.0, 32), (32, 1 - 2.0**-53, 32),
    ],
)  # fmt: skip
def test_an_offset_is_a_share_of_the_room(room: int, place: float, expected: int) -> None:
    assert offset(room, place) == expected


def test_every_offset_is_equally_likely(tmp_path: Path) -> None:
    """As plans draw them, in both directions, one not knowing of the other."""
    n, room = 9000, 2
    draws = plan_step(tiny_recipe(tmp_path, f"batch_size={n}"), 0, n).crop
    assert draws.min() > 0
    assert draws.max() <= 1
    pairs = Counter((offset(room, across), offset(room, down)) for across, down in draws.tolist())
    assert len(pairs) == 9
    # Five standard deviations of a binomial with 9000 tries of probability 1/9.
    assert all(abs(count - 1000) < 5 * (1000 * 8 / 9) ** 0.5 for count in pairs.values()), pairs


@pytest.mark.parametrize("drawn", [0.0, 1 - 2.0**-53])
def test_the_smallest_and_largest_draws_are_places(
    drawn: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too rare to be met by chance."""
    monkeypatch.setattr(plan_module, "as_uniforms", lambda words: words[:, ::2].double().fill_(drawn))
    places = plan_step(tiny_recipe(tmp_path), 0, 20).crop
    assert places.shape == (8, 2)
    assert {offset(32, place) for place in places.flatten().tolist()} <= {0, 32}


def test_held_out_images_show_their_middle(tmp_path: Path) -> None:
    assert (plan_held_out(tiny_recipe(tmp_path), 20).crop == 0.5).all()


@pytest.mark.parametrize(
    ("place", "expected"),
    [((2.0**-53, 2.0**-53), (0, 0)), ((1.0, 1.0), (14, 2)), ((0.5, 0.5), (7, 1)), ((0.34, 0.3), (5, 0))],
)
def test_a_random_crop_begins_where_its_draws_say(place: tuple[float, float], expected: tuple[int, int]) -> None:
    """An image 18 pixels high needs no resizing for a square of 16: its pixels tell where they come from."""
    image = coordinates(18, 30)
    assert place_of(prepare(image, 16, "random", place, PILLOW_PIXELS)) == expected
    upright = image[[1, 0, 2]].transpose(1, 2)  # 30 high
    assert place_of(prepare(upright, 16, "random", place[::-1], PILLOW_PIXELS)) == expected[::-1]


@pytest.mark.parametrize(("size", "expected"), [((16, 16), (0, 0)), ((16, 21), (2, 0)), ((22, 16), (0, 3))])
def test_a_center_crop_is_the_middle_whatever_is_drawn(size: tuple[int, int], expected: tuple[int, int]) -> None:
    for place in ((1.0, 1.0), (0.1, 0.7)):
        assert place_of(prepare(coordinates(*size), 16, "center", place, PILLOW_PIXELS)) == expected


# --- how large ---------------------------------------------------------------------------------------------


def ramp_error(square: Tensor, left: int, top: int, scale: tuple[float, float], step: int) -> float:
    """How far a square is from what the coordinates are at the places in the source that its pixels lie on.

    Filters whose weights add up to one and are symmetric give a ramp back, away from the image's edges.
    """
    side = np.arange(square.shape[1])
    rows = ((side + top + 0.5) * scale[0] - 0.5) * step
    columns = ((side + left + 0.5) * scale[1] - 0.5) * step
    inner = np.s_[6:-6]
    errors = square[0].numpy()[inner, inner] - rows[inner, None], square[1].numpy()[inner, inner] - columns[inner]
    return max(float(np.abs(error).max()) for error in errors)


@pytest.mark.parametrize(("height", "width"), [(72, 72), (144, 144), (120, 200), (250, 120), (60, 83)])
def test_the_short_side_becomes_an_eighth_more_than_the_square(height: int, width: int) -> None:
    """Two roundings to whole levels, one for each direction: at most a level; a pixel beside would be more."""
    step = 1 if max(height, width) > 127 else 2
    small = min(height, width)
    resized = 72 * height // small, 72 * width // small
    room = resized[0] - 64, resized[1] - 64
    square = prepare(coordinates(height, width, step), 64, "random", (0.75, 0.25), PILLOW_PIXELS)
    left, top = (int(np.ceil(where * (free + 1))) - 1 for where, free in ((0.75, room[1]), (0.25, room[0])))
    scale = height / resized[0], width / resized[1]
    assert ramp_error(square, left, top, scale, step) <= 1
    assert ramp_error(square, left + 1, top, scale, step) > 1
    assert ramp_error(square, left, top + 1, scale, step) > 1


def test_a_center_crop_halves_by_blocks_first() -> None:
    """64 x 96 to 16: two halvings, and nothing is left for the cubic filter to do."""
    blocks = torch.randint(0, 256, (3, 16, 24), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    large = blocks.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.equal(prepare(large, 16, "center", (1.0, 1.0), PILLOW_PIXELS), blocks[:, :, 4:20])
    means = torch.zeros(3, 32, 32, dtype=torch.uint8)
    means[:, ::2, ::2] = 200  # each 2x2 block has a quarter of it
    assert (prepare(means, 16, "center", (1.0, 1.0), PILLOW_PIXELS) == 50).all()


def test_a_center_crop_resizes_to_the_square() -> None:
    """96 x 160 to 64: 64 x 107, of which columns 21 to 84 are the middle."""
    square = prepare(coordinates(96, 160), 64, "center", (1.0, 1.0), PILLOW_PIXELS)
    assert ramp_error(square, 21, 0, (1.5, 160 / 107), 1) <= 1
    assert ramp_error(square, 20, 0, (1.5, 160 / 107), 1) > 1


@pytest.mark.parametrize("crop", ["random", "center"])
def test_grey_stays_grey(crop: str) -> None:
    image = coordinates(40, 50)
    grey = prepare(image[:1], 16, crop, (0.3, 0.9), PILLOW_PIXELS)  # type: ignore[arg-type]
    assert grey.shape == (1, 16, 16)
    assert torch.equal(grey, prepare(image, 16, crop, (0.3, 0.9), PILLOW_PIXELS)[:1])  # type: ignore[arg-type]


@pytest.mark.parametrize("crop", ["random", "center"])
def test_a_strip_that_would_become_a_bomb_is_refused(crop: str) -> None:
    strip = torch.zeros(3, 1, 5000, dtype=torch.uint8)
    side = {"random": 18, "center": 16}[crop]
    with pytest.raises(UnreadableImageError) as caught:
        prepare(strip, 16, crop, (0.5, 0.5), side * side * 5000 - 1)  # type: ignore[arg-type]
    assert str(caught.value) == (
        f"5000 x 1 pixels, resized to {side * 5000} x {side} pixels; data.max_pixels is {side * side * 5000 - 1}"
    )
    assert prepare(strip, 16, crop, (0.5, 0.5), side * side * 5000).shape == (3, 16, 16)  # type: ignore[arg-type]
