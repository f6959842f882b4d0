"""The loss: a mean over images of means over pixels, against the reference and float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pixelflow_engine import reference
from pixelflow_kernels import PackedLayout
from pixelflow_training.loss import flow_matching_loss, image_losses
from support.reference_models import normal, seeded

GRIDS = [
    [(4, 4)],
    [(8, 8), (8, 8), (4, 4), (2, 2), (2, 2), (2, 2)],
    [(1, 1), (16, 16), (1, 1), (3, 5), (3, 5), (5, 3)],  # neighbours of one length need not have one grid
    [(2, 2), (4, 4), (2, 2), (4, 4)],
]
U = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def pack(grids: list[tuple[int, int]], channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, PackedLayout]:
    """Random velocities and targets; the error of an image is of its own size, so that a mix-up shows."""
    draws = seeded(len(grids) + channels)
    scales = torch.cat([torch.full((r * c, 1), 1.0 + i) for i, (r, c) in enumerate(grids)])
    targets = normal((len(scales), channels), draws)
    velocities = targets + scales * normal((len(scales), channels), draws)
    return velocities.to(dtype), targets.to(dtype), PackedLayout.from_grids(grids)


def parts(tokens: Tensor, grids: list[tuple[int, int]]) -> list[Tensor]:
    return list(tokens.split([rows * columns for rows, columns in grids]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("channels", [1, 48])
@pytest.mark.parametrize("grids", GRIDS, ids=str)
def test_losses_are_the_means_of_numpy(grids: list[tuple[int, int]], channels: int, dtype: torch.dtype) -> None:
    velocities, targets, layout = pack(grids, channels, dtype)
    losses = image_losses(velocities, targets, layout)
    assert losses.dtype == dtype
    expected = [
        np.square(v.double().numpy() - u.double().numpy()).mean()
        for v, u in zip(parts(velocities, grids), parts(targets, grids), strict=True)
    ]
    # All terms are positive: a relative error of 3 roundings each, and at most log2(n) more of a pairwise sum, where
    # torch sums in at least pairwise blocks; 32 is ample for 16 x 16 x 48 terms.
    np.testing.assert_allclose(losses.double().numpy(), expected, rtol=32 * U[dtype], atol=0)
    total = flow_matching_loss(velocities, targets, layout).item()
    np.testing.assert_allclose(total, np.mean(expected), rtol=64 * U[dtype], atol=0)


@pytest.mark.parametrize("grids", GRIDS, ids=str)
def test_loss_and_gradient_are_the_references(grids: list[tuple[int, int]]) -> None:
    velocities, targets, layout = pack(grids, 12, torch.float64)
    packed = velocities.clone().requires_grad_()
    single = velocities.clone().requires_grad_()
    ours = flow_matching_loss(packed, targets, layout)
    theirs = reference.training.loss(parts(single, grids), parts(targets, grids))
    ours.backward()
    theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=64 * U[torch.float64])
    assert packed.grad is not None
    assert single.grad is not None
    # 2 (v - u) / (n_pixels n_images): three roundings on either side.
    assert (packed.grad - single.grad).abs().max() <= 8 * U[torch.float64] * single.grad.abs().max()


def test_a_small_image_weighs_as_much_as_a_large_one() -> None:
    grids = [(16, 16), (1, 1)]
    layout = PackedLayout.from_grids(grids)
    targets = torch.zeros(257, 3)
    large, small = targets.clone(), targets.clone()
    large[:256] = 2.0
    small[256:] = 2.0
    assert flow_matching_loss(large, targets, layout).item() == 2.0
    assert flow_matching_loss(small, targets, layout).item() == 2.0
    assert image_losses(large, targets, layout).tolist() == [4.0, 0.0]
    assert image_losses(small, targets, layout).tolist() == [0.0, 4.0]


def test_perfect_velocities_cost_nothing() -> None:
    velocities, _, layout = pack(GRIDS[1], 12, torch.float32)
    assert image_losses(velocities, velocities, layout).tolist() == [0.0] * 6
