"""Training images: every scan once, enlarged but recognisable, and random changes that do what their limits say."""

from __future__ import annotations

import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.datasets import load_digits as load_scans
from torch import Tensor

from pixelflow_training.config import AugmentConfig, DataConfig
from pixelflow_training.data import ImageSet, augment, enlarge, load_digits, open_data, to_signed
from support.recipes import tiny_recipe
from support.reference_models import seeded

TOTAL = 1797


# --- the digits --------------------------------------------------------------------------------------------


def identities(images: ImageSet) -> Counter[tuple[bytes, int]]:
    return Counter(
        (image.numpy().tobytes(), int(label)) for image, label in zip(images.images, images.labels, strict=True)
    )


@pytest.mark.parametrize(("held_out", "split_seed"), [(360, 0), (360, 1), (1, 0), (1796, 0)])
def test_every_scan_is_on_one_side_of_the_split_with_its_label(held_out: int, split_seed: int) -> None:
    train, kept_out = load_digits(DataConfig(held_out=held_out, split_seed=split_seed), 16, 1)
    assert (len(train), len(kept_out)) == (TOTAL - held_out, held_out)
    assert train.images.dtype == kept_out.images.dtype == torch.uint8
    assert train.labels.dtype == torch.int64
    assert train.images.shape == (TOTAL - held_out, 1, 16, 16)
    scans = load_scans()
    whole = Counter(
        (enlarge(scan, 16).tobytes(), int(label)) for scan, label in zip(scans.images, scans.target, strict=True)
    )
    assert identities(train) + identities(kept_out) == whole
    assert whole.total() == TOTAL
    assert set(whole.values()) == {1}, "two scans are equal, so disjoint says less than it seems"


def test_the_split_is_drawn_by_its_seed_alone() -> None:
    stream = torch.get_rng_state()
    first = [identities(part) for part in load_digits(DataConfig(split_seed=3), 8, 1)]
    again = [identities(part) for part in load_digits(DataConfig(split_seed=3), 8, 1)]
    other = [identities(part) for part in load_digits(DataConfig(split_seed=4), 8, 1)]
    assert first == again
    assert first != other
    assert torch.equal(torch.get_rng_state(), stream), "torch's global generator has moved"
    # Not the last or first scans of the file, which come from other writers: classes and places are mixed.
    counts = Counter(label for _, label in first[1].elements())
    assert min(counts[c] for c in range(10)) > 18


def test_grey_is_repeated_in_every_channel() -> None:
    one, _ = load_digits(DataConfig(), 16, 1)
    three, _ = load_digits(DataConfig(), 16, 3)
    assert three.images.shape[1] == 3
    for channel in range(3):
        assert torch.equal(three.images[:, channel], one.images[:, 0])


@pytest.mark.parametrize("resolution", [16, 32, 64])
def test_means_over_8x8_blocks_resemble_the_scans(resolution: int) -> None:
    scans = load_scans().images
    block = resolution // 8
    large = np.stack([enlarge(scan, resolution) for scan in scans]).astype(np.float64)
    means = large.reshape(len(scans), 8, block, 8, block).mean(axis=(2, 4)) * (16 / 255)
    # A cubic's means over blocks blur a little: the error is 0.75 of 16 levels on average, where another scan is 3.8
    # away.
    assert np.abs(means - scans).mean() < 1.0
    assert np.abs(means - scans[::-1]).mean() > 3.0
    for mean, scan in zip(means, scans, strict=True):
        assert np.corrcoef(mean.ravel(), scan.ravel())[0, 1] > 0.97


def test_a_scan_at_its_own_size_is_itself() -> None:
    scans = load_scans().images[:50]
    for scan in scans:
        assert np.array_equal(enlarge(scan, 8), np.rint(scan * 255 / 16))


def keys_weight(distance: float) -> float:
    """Keys's cubic with a = -1/2."""
    d = abs(distance)
    return 1.5 * d**3 - 2.5 * d**2 + 1 if d <= 1 else -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2 if d < 2 else 0.0


def test_a_scan_is_enlarged_by_cubic_interpolation() -> None:
    """Away from the edge, where all sixteen neighbours exist, each pixel is their sum under Keys's weights."""
    block = 4
    rows = np.zeros((8 * block, 8))
    for i in range(8 * block):
        for j in range(8):
            rows[i, j] = keys_weight((i + 0.5) / block - 0.5 - j)
    inner = slice(2 * block, 6 * block)
    for scan in load_scans().images[:30]:
        # Whole levels from 0 to 255 after either direction, across first.
        across = np.rint((np.rint(scan * (255 / 16)) @ rows.T).clip(0, 255))
        expected = (rows @ across).clip(0, 255)[inner, inner]
        assert np.abs(enlarge(scan, 8 * block)[inner, inner] - expected).max() <= 1


@pytest.mark.parametrize("held_out", [0, -1, 1797, 5000])
def test_a_split_with_an_empty_side_is_refused(held_out: int) -> None:
    with pytest.raises(ValueError, match=rf"^data\.held_out: got {held_out}, expected 1 to 1796"):
        load_digits(DataConfig(held_out=held_out), 8, 1)


@pytest.mark.parametrize("classes", [9, 8, 1])
def test_a_model_of_fewer_classes_than_there_are_digits_is_refused(classes: int, tmp_path: Path) -> None:
    """Of nine, the digit 9 would be taken for the null class."""
    with pytest.raises(
        ValueError, match=f"^labels: got 0 to 9, expected 0 to {classes - 1}: model.num_classes is {classes}$"
    ):
        open_data(tiny_recipe(tmp_path, f"model.num_classes={classes}"))
    assert len(open_data(tiny_recipe(tmp_path, "model.num_classes=0"))) == 2, "labels are nothing to it"


def test_without_scikit_learn_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"install the extra `train`"):
        load_digits(DataConfig(), 8, 1)


def test_to_signed_covers_minus_one_to_one() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    signed = to_signed(levels)
    assert signed.dtype == torch.float32
    assert (signed[0].item(), signed[255].item()) == (-1.0, 1.0)
    torch.testing.assert_close(signed.double(), levels.double() * (2 / 255) - 1, rtol=0, atol=2.0**-23)


# --- random changes ----------------------------------------------------------------------------------------

SIDE = 48


def blobs() -> NDArray[np.float64]:
    """Two smooth spots of different weight off the centre, ``[48, 48]``, -1 far from them and nowhere above 0.9."""
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    light = np.exp(-((x - 7) ** 2 + (y - 2) ** 2) / 18) + 0.6 * np.exp(-((x + 3) ** 2 + (y + 6) ** 2) / 18)
    light[light < 1e-3] = 0
    return np.asarray(1.8 * light - 1)


def moves(count: int, seed: int) -> Tensor:
    """Turns, sizes and moves of images, as fractions of their limits."""
    return 2 * torch.rand(count, 4, generator=seeded(seed), dtype=torch.float64) - 1


def batch(count: int) -> Tensor:
    return torch.from_numpy(blobs()).float()[None, None].repeat(count, 1, 1, 1)


def moments(image: NDArray[np.float64]) -> tuple[NDArray[np.float64], float, float]:
    """Centre ``(x, y)`` of the light against the middle, its size, and the direction of its long axis in degrees."""
    light = image.astype(np.float64) + 1
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    total = light.sum()
    centre = np.array([(light * x).sum(), (light * y).sum()]) / total
    dx, dy = x - centre[0], y - centre[1]
    xx, yy, xy = ((light * a * b).sum() / total for a, b in ((dx, dx), (dy, dy), (dx, dy)))
    return centre, math.sqrt(xx + yy), math.degrees(math.atan2(2 * xy, xx - yy) / 2)


@pytest.mark.parametrize("config", [AugmentConfig(), AugmentConfig(flip=True)])
def test_no_limits_change_nothing(config: AugmentConfig) -> None:
    images = 1e-3 * torch.randn(3, 3, 8, 8, generator=seeded(1))  # so small that adding 1 and taking it away rounds
    assert torch.equal(augment(images, config, moves(3, 2)), images)
    levels = torch.arange(192, dtype=torch.uint8).reshape(1, 3, 8, 8)
    assert augment(levels, config, moves(1, 2)) is levels, "what nothing changes stays bytes"


@pytest.mark.parametrize("limit", ["rotate", "scale", "shift"])
def test_vanishing_limits_are_nearly_the_identity(limit: str) -> None:
    """The change is computed, with limits so small that nothing moves by more than 1e-4 pixels."""
    config = AugmentConfig(**{limit: 1e-6})
    images = 2 * torch.rand(3, 3, 8, 8, generator=seeded(1)) - 1
    assert (augment(images, config, moves(3, 2)) - images).abs().max() < 1e-3


def test_changes_are_those_of_an_affine_map_in_scipy() -> None:
    """Direction, centre and composition: turned and resized about the middle, then shifted by fractions of the side."""
    count, config = 12, AugmentConfig(rotate=40.0, scale=0.3, shift=0.15)
    draws = moves(count, 3)
    images = augment(batch(count), config, draws)
    middle = np.full(2, (SIDE - 1) / 2)
    for image, (turn, size, move_x, move_y) in zip(images, draws.numpy(), strict=True):
        angle, factor = math.radians(config.rotate) * turn, 1 + config.scale * size
        # scipy asks, for each place (row, column) of the output, where in the input it comes from.
        back = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]) / factor
        shift = SIDE * config.shift * np.array([move_y, move_x])
        offset = middle + shift - back @ middle
        expected = ndimage.affine_transform(blobs() + 1, back, offset, order=3, mode="constant", cval=0.0) - 1
        # The two cubics differ: torch's has a = -0.75 and misses a slope by up to 0.048 of it along either axis. The
        # spots rise by at most 0.37 a pixel, so by 0.37 sqrt(2) along both axes together; a fifth more for curvature.
        assert np.abs(image[0].numpy() - expected).max() < 1.2 * 0.048 * 0.37 * math.sqrt(2)
        wrong = ndimage.affine_transform(blobs() + 1, back.T, offset, order=3, mode="constant", cval=0.0) - 1
        assert np.abs(image[0].numpy() - wrong).max() > 0.5, "turning the other way would pass"


def test_a_turn_turns_within_its_limit_and_keeps_the_size() -> None:
    count = 200
    _, size, direction = moments(blobs())
    turned = augment(batch(count), AugmentConfig(rotate=30.0), moves(count, 4))
    seen = [moments(image[0].numpy()) for image in turned]
    turns = np.array([(angle - direction + 90) % 180 - 90 for _, _, angle in seen])
    assert np.abs(turns).max() < 30.5
    assert turns.min() < -27, "nothing turns that way"
    assert turns.max() > 27
    assert abs(turns.mean()) < 5 * 30 / math.sqrt(3 * count)
    assert abs(turns.std() - 30 / math.sqrt(3)) < 3
    for centre, spread, _ in seen:
        assert abs(spread / size - 1) < 0.02
        assert abs(np.hypot(*centre) - np.hypot(*moments(blobs())[0])) < 0.3, "not turned about the middle"


def test_a_resize_stays_within_its_limit_and_turns_nothing() -> None:
    count = 200
    centre, size, direction = moments(blobs())
    resized = augment(batch(count), AugmentConfig(scale=0.3), moves(count, 5))
    seen = [moments(image[0].numpy()) for image in resized]
    factors = np.array([spread / size for _, spread, _ in seen])
    assert 0.69 < factors.min() < 0.73
    assert 1.27 < factors.max() < 1.31
    assert abs(factors.mean() - 1) < 5 * 0.3 / math.sqrt(3 * count)
    for (middle, _, angle), factor in zip(seen, factors, strict=True):
        assert abs(angle - direction) < 1
        assert np.abs(middle - factor * centre).max() < 0.3, "not resized about the middle"


def test_a_shift_stays_within_its_limit_in_both_directions() -> None:
    count = 200
    centre, size, _ = moments(blobs())
    shifted = augment(batch(count), AugmentConfig(shift=0.1), moves(count, 6))
    seen = [moments(image[0].numpy()) for image in shifted]
    seen_at = np.array([(middle - centre) / SIDE for middle, _, _ in seen])
    assert np.abs(seen_at).max() < 0.1 + 0.002
    assert (seen_at.min(axis=0) < -0.09).all()
    assert (seen_at.max(axis=0) > 0.09).all()
    assert abs(np.corrcoef(seen_at.T)[0, 1]) < 5 / math.sqrt(count), "across and down go together"
    for _, spread, _ in seen:
        assert abs(spread / size - 1) < 0.02


def test_every_image_is_changed_in_its_own_way_and_channels_together() -> None:
    images = batch(6).repeat(1, 3, 1, 1)
    changed = augment(images, AugmentConfig(rotate=20.0, scale=0.1, shift=0.1), moves(6, 7))
    assert torch.equal(changed[:, 0], changed[:, 1])
    assert torch.equal(changed[:, 0], changed[:, 2])
    for i in range(6):
        for j in range(i):
            assert (changed[i] - changed[j]).abs().max() > 0.05


def test_the_background_stays_minus_one() -> None:
    config = AugmentConfig(rotate=15.0, scale=0.1, shift=0.05)
    empty = torch.full((4, 1, 16, 16), -1.0)
    assert torch.equal(augment(empty, config, moves(4, 8)), empty)
    changed = augment(batch(50), AugmentConfig(rotate=15.0, scale=0.05, shift=0.02), moves(50, 9))
    for edge in (changed[..., 0, :], changed[..., -1, :], changed[..., :, 0], changed[..., :, -1]):
        assert (edge == -1).all()
    assert changed.min() >= -1
    assert changed.max() <= 1
    assert changed.amax((1, 2, 3)).min() > 0.6, "a spot has gone"


def test_an_image_depends_on_its_own_draws_alone() -> None:
    config = AugmentConfig(rotate=15.0, scale=0.1, shift=0.05)
    images = 2 * torch.rand(7, 3, 16, 24, generator=seeded(10)) - 1
    draws = moves(7, 11)
    before, stream = images.clone(), torch.get_rng_state()
    together = augment(images, config, draws)
    assert torch.equal(images, before)
    for i in range(7):
        assert torch.equal(augment(images[i : i + 1], config, draws[i : i + 1])[0], together[i]), i
    assert torch.equal(torch.get_rng_state(), stream), "torch's global generator has moved"


def test_bytes_are_changed_as_their_signed_values_are() -> None:
    levels = torch.randint(0, 256, (3, 1, 16, 16), generator=seeded(12), dtype=torch.uint8)
    config = AugmentConfig(rotate=15.0)
    assert torch.equal(augment(levels, config, moves(3, 13)), augment(to_signed(levels), config, moves(3, 13)))
