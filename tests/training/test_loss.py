"""The loss: a mean over images of means over pixels, against the reference and float64 numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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
    # All terms are positive: a difference squared is off by three roundings, a sum of P channels by P in the worst
    # order, its mean by one, the sum over tokens in float64 by one for each of up to 256, the result by one.
    bound = (channels + 5) * U[dtype] + 256 * U[torch.float64]
    np.testing.assert_allclose(losses.double().numpy(), expected, rtol=bound, atol=0)
    total = flow_matching_loss(velocities, targets, layout).item()
    np.testing.assert_allclose(total, np.mean(expected), rtol=bound + len(grids) * U[dtype], atol=0)


def test_errors_do_not_grow_with_an_image() -> None:
    """The bound above is for 256 tokens; of 16,384 the sum must be no worse, which a sum in float32 is."""
    grids = [(128, 128), (1, 1)]
    velocities, targets, layout = pack(grids, 1, torch.float32)
    losses = image_losses(velocities, targets, layout).double().numpy()
    differences = velocities.double() - targets.double()
    expected = [part.square().mean().item() for part in parts(differences, grids)]
    np.testing.assert_allclose(losses, expected, rtol=6 * U[torch.float32], atol=0)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("grids", GRIDS, ids=str)
def test_the_gradient_is_its_closed_form(grids: list[tuple[int, int]], dtype: torch.dtype) -> None:
    """``2 g (v - u) / (tokens channels)``, whatever weight g a caller gives each image."""
    velocities, targets, layout = pack(grids, 12, dtype)
    velocities.requires_grad_()
    weights = torch.rand(len(grids), generator=seeded(3), dtype=torch.float64).to(dtype)
    (image_losses(velocities, targets, layout) * weights).sum().backward()
    assert velocities.grad is not None
    assert velocities.grad.dtype == dtype
    for i, (got, v, u) in enumerate(
        zip(parts(velocities.grad, grids), parts(velocities.detach(), grids), parts(targets, grids), strict=True)
    ):
        exact = 2 * weights[i].double() * (v.double() - u.double()) / v.numel()
        # A difference, a quotient and a product: three roundings, each relative to a value of its own.
        assert ((got.double() - exact).abs() <= 4 * U[dtype] * exact.abs()).all(), i


def test_the_gradient_is_that_of_finite_differences() -> None:
    velocities, targets, layout = pack(GRIDS[2], 3, torch.float64)
    assert torch.autograd.gradcheck(
        lambda v: image_losses(v, targets, layout), (velocities.requires_grad_(),), fast_mode=True
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_an_images_loss_depends_on_no_mate_and_no_place_to_the_last_bit(threads: int) -> None:
    grids = [(32, 32), (7, 5), (32, 32), (16, 16), (1, 1), (7, 5), (3, 3)]
    velocities, targets, layout = pack(grids, 48, torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        losses, gradient = with_gradient(velocities, targets, layout)
        for order in ([6, 5, 4, 3, 2, 1, 0], [3, 0], [4], [2, 4, 6], [1, 5]):
            layout = PackedLayout.from_grids([grids[i] for i in order])
            picked = [torch.cat([parts(x, grids)[i] for i in order]) for x in (velocities, targets, gradient)]
            again, gradient_again = with_gradient(picked[0], picked[1], layout)
            assert torch.equal(again, losses[order]), order
            assert torch.equal(gradient_again, picked[2]), order
    finally:
        torch.set_num_threads(before)


def with_gradient(velocities: Tensor, targets: Tensor, layout: PackedLayout) -> tuple[Tensor, Tensor]:
    velocities = velocities.clone().requires_grad_()
    losses = image_losses(velocities, targets, layout)
    losses.sum().backward()
    assert velocities.grad is not None
    return losses.detach(), velocities.grad


def test_low_precision_velocities_are_compared_in_that_of_the_targets() -> None:
    velocities, targets, layout = pack(GRIDS[1], 12, torch.float32)
    low = velocities.bfloat16().requires_grad_()
    losses = image_losses(low, targets, layout)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, image_losses(low.detach().float(), targets, layout))
    losses.sum().backward()
    assert low.grad is not None
    assert low.grad.dtype == torch.bfloat16


def test_not_a_number_stays_with_its_image() -> None:
    velocities, targets, layout = pack(GRIDS[1], 12, torch.float32)
    velocities[70] = torch.nan  # of the second image
    assert image_losses(velocities, targets, layout).isnan().tolist() == [False, True, False, False, False, False]


def test_an_empty_pack_has_no_losses() -> None:
    velocities, targets = torch.zeros(2, 0, 12).unbind()
    assert image_losses(velocities.requires_grad_(), targets, PackedLayout.from_grids([])).shape == (0,)


def test_no_operation_loops_over_images() -> None:
    """As many operations for a hundred images of a dozen sizes as for one."""

    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for grids in ([(4, 4)], [(1 + i % 3, 1 + i % 4) for i in range(100)]):
        velocities, targets, layout = pack(grids, 12, torch.float32)
        with Count() as count:
            with_gradient(velocities, targets, layout)
        counts.append(count.calls)
    assert counts[0] == counts[1]


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
