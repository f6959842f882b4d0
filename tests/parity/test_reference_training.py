"""The reference training pair and loss against the equations written out in numpy."""

import numpy as np
import pytest
import torch

from pixelflow_engine.reference import make_stages, training_pair
from pixelflow_engine.reference.training import down, loss, up
from support.reference_models import normal, seeded

U64, U32 = 2.0**-53, 2.0**-24


def halve(x: np.ndarray) -> np.ndarray:
    """The mean of each 2 x 2 block."""
    return (x[:, 0::2, 0::2] + x[:, 0::2, 1::2] + x[:, 1::2, 0::2] + x[:, 1::2, 1::2]) / 4


def double(x: np.ndarray) -> np.ndarray:
    """Every pixel four times."""
    return np.repeat(np.repeat(x, 2, axis=1), 2, axis=2)


def test_halving_is_the_mean_of_each_block_without_antialiasing() -> None:
    x = normal((3, 16, 24), seeded(1))
    expected = x.numpy()
    for halvings in range(4):
        # Weights are powers of two: only the sums round, three of them a halving.
        assert np.abs(down(x, halvings).numpy() - expected).max() <= 3 * 4 * halvings * U64
        expected = halve(expected) if halvings < 3 else expected
    impulse = torch.zeros(1, 8, 8)
    impulse[0, 3, 4] = 1
    small = torch.zeros(1, 4, 4)
    small[0, 1, 2] = 0.25
    assert torch.equal(down(impulse, 1), small)  # a filter with wider support would leak


def test_doubling_repeats_pixels() -> None:
    x = normal((3, 4, 6), seeded(2))
    assert np.array_equal(up(x).numpy(), double(x.numpy()))
    assert torch.equal(down(up(x), 1), x)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize("k", [0, 1, 500, 999])
def test_pair_equals_the_equations(num_stages: int, k: int) -> None:
    R = 32
    generator = seeded(3)
    image = (2 * torch.rand(3, R, R, generator=generator) - 1).double()
    for stage in make_stages(num_stages):
        d = num_stages - 1 - stage.index
        eps = normal((3, R >> d, R >> d), generator)
        x, target, t_model = training_pair(image, stage, num_stages, k, eps)

        end_image = image.numpy()
        for _ in range(d):
            end_image = halve(end_image)
        start_image = double(halve(end_image))
        end = stage.end * end_image + (1 - stage.end) * eps.numpy()
        start = stage.start * start_image + (1 - stage.start) * eps.numpy()
        tau = k / 1000
        # Values below 6, some ten roundings.
        assert np.abs(x.numpy() - (tau * end + (1 - tau) * start)).max() <= 60 * U64
        assert np.abs(target.numpy() - (end - start)).max() <= 60 * U64
        first, last = stage.window
        span = (last - first) * k / 999  # from the first window point to the last, evenly
        assert abs(t_model - (first + span)) <= 1000 * 4 * U64


def test_model_times_of_training_are_window_points() -> None:
    image, stage = torch.zeros(1, 8, 8), make_stages(4)[1]
    times = [training_pair(image, stage, 4, k, torch.zeros(1, 2, 2))[2] for k in (0, 500, 999)]
    assert np.abs(np.array(times) - [175, 300.5, 425.749]).max() <= 1000 * 4 * U64


def test_the_target_is_the_derivative_of_the_input() -> None:
    """``x_tau`` is affine in tau with slope ``v``: a model that meets the target integrates start to end."""
    generator = seeded(4)
    image, stage = normal((3, 16, 16), generator), make_stages(3)[1]
    eps = normal((3, 8, 8), generator)
    x0, v, _ = training_pair(image, stage, 3, 0, eps)
    for k in (1, 250, 999):
        x, target, _ = training_pair(image, stage, 3, k, eps)
        assert torch.equal(target, v)
        assert (x - (x0 + k / 1000 * v)).abs().max() <= 60 * U64


def test_both_ends_share_one_noise() -> None:
    """Of a black image only noise is left: ``start`` and ``end`` are multiples of the same eps."""
    for stage in make_stages(4):
        side = 32 >> (3 - stage.index)
        eps = normal((3, side, side), seeded(5))
        x, v, _ = training_pair(torch.zeros(3, 32, 32, dtype=torch.float64), stage, 4, 0, eps)
        assert (x - (1 - stage.start) * eps).abs().max() <= 8 * U64
        assert (v - (stage.start - stage.end) * eps).abs().max() <= 8 * U64


def test_the_last_stage_ends_in_the_image() -> None:
    image = normal((3, 8, 8), seeded(6))
    x, v, _ = training_pair(image, make_stages(4)[3], 4, 0, normal((3, 8, 8), seeded(7)))
    assert (x + v - image).abs().max() <= 30 * U64


def test_a_float32_pair_is_within_float32_rounding() -> None:
    generator = seeded(8)
    image, eps, stage = normal((3, 16, 16), generator), normal((3, 8, 8), generator), make_stages(4)[2]
    image, eps = image.float().double(), eps.float().double()
    exact = training_pair(image, stage, 4, 333, eps)
    single = training_pair(image.float(), stage, 4, 333, eps.float())
    for value, truth in zip(single[:2], exact[:2], strict=True):
        assert value.dtype == torch.float32
        assert (value.double() - truth).abs().max() <= 60 * U32  # ten roundings of values below 6
    assert single[2] == exact[2]


def test_a_small_image_weighs_as_much_as_a_large_one() -> None:
    generator = seeded(9)
    shapes = [(3, 16, 16), (3, 4, 4), (3, 2, 2)]
    velocities = [normal(shape, generator) for shape in shapes]
    targets = [v + scale * torch.ones_like(v) for v, scale in zip(velocities, (1.0, 2.0, 3.0), strict=True)]
    # (1 + 4 + 9) / 3, where a mean over all pixels would be (256 + 4 * 16 + 9 * 4) / 276 = 1.29.
    assert abs(loss(velocities, targets).item() - 14 / 3) <= 100 * U64
    assert loss(velocities, velocities).item() == 0


def test_the_loss_has_the_gradient_of_its_definition() -> None:
    # d/dv mean over images of mean((v - u)^2) = 2 (v - u) / (pixels of the image * images).
    generator = seeded(10)
    velocities = [normal(shape, generator).requires_grad_() for shape in ((3, 4, 4), (3, 2, 2))]
    targets = [normal(tuple(v.shape), generator) for v in velocities]
    loss(velocities, targets).backward()
    for v, u in zip(velocities, targets, strict=True):
        assert (v.grad - 2 * (v.detach() - u) / (v.numel() * 2)).abs().max() <= 16 * U64
