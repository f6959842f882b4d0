"""Draws: pure functions of a seed, a purpose and a place, so that training can go on from any place."""

from __future__ import annotations

import math

import pytest
import torch

from pixelflow_training.draws import Purpose, generator, sample_ids


def normals(seed: int, purpose: Purpose, position: int = 0, count: int = 1000) -> torch.Tensor:
    return torch.randn(count, generator=generator(seed, purpose, position), dtype=torch.float64)


def test_a_draw_does_not_depend_on_what_was_drawn_before() -> None:
    first = normals(3, Purpose.BATCH, 7)
    stream = torch.get_rng_state()
    for purpose in Purpose:
        normals(4, purpose, 8)
    assert torch.equal(normals(3, Purpose.BATCH, 7), first)
    assert torch.equal(torch.get_rng_state(), stream), "torch's global generator has moved"


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63, 2**64 - 1, 2**70])
def test_draws_of_any_seed_purpose_and_position_are_independent(seed: int) -> None:
    count = 1000
    places = [(seed, purpose, position) for purpose in Purpose for position in (0, 1, 10**9)]
    places += [(seed + 1, purpose, 0) for purpose in Purpose]
    streams = torch.stack([normals(*place, count=count) for place in places])
    correlations = torch.corrcoef(streams) - torch.eye(len(places), dtype=torch.float64)
    # A correlation of independent streams has standard deviation 1 / sqrt(1000); 190 pairs stay below 5 of them.
    worst = correlations.abs().max().item()
    assert worst < 5 / math.sqrt(count), f"seed {seed}: correlated by {worst}"


def test_purpose_and_position_do_not_mix() -> None:
    """Neither (1, 2) and (2, 1) nor a sum of the two may be one stream."""
    seen = {
        (seed, purpose, position): tuple(normals(seed, Purpose(purpose), position, 4).tolist())
        for seed in range(4)
        for purpose in range(5)
        for position in range(6)
    }
    assert len(set(seen.values())) == len(seen)


def stream_of_ids(seed: int, steps: int, batch_size: int, dataset_size: int) -> list[int]:
    return torch.cat([sample_ids(seed, step, batch_size, dataset_size) for step in range(steps)]).tolist()


@pytest.mark.parametrize(
    ("batch_size", "dataset_size"),
    [(3, 7), (7, 7), (1, 5), (10, 3), (6, 4), (5, 1)],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("seed", [0, 11])
def test_every_epoch_is_a_permutation_and_batches_run_on(batch_size: int, dataset_size: int, seed: int) -> None:
    epochs = 6
    steps = math.ceil(epochs * dataset_size / batch_size)
    ids = stream_of_ids(seed, steps, batch_size, dataset_size)
    assert len(ids) == steps * batch_size
    orders = [tuple(ids[e * dataset_size : (e + 1) * dataset_size]) for e in range(epochs)]
    for epoch, order in enumerate(orders):
        assert sorted(order) == list(range(dataset_size)), f"epoch {epoch} shows {order}"
    if dataset_size >= 7:
        assert len(set(orders)) == epochs, "two epochs have one order"


def test_ids_are_a_pure_function_of_the_step() -> None:
    late = sample_ids(5, 40, 6, 10)
    assert late.dtype == torch.int64
    assert late.shape == (6,)
    for step in (39, 0, 41):
        sample_ids(5, step, 6, 10)
    assert torch.equal(sample_ids(5, 40, 6, 10), late)
    assert stream_of_ids(5, 41, 6, 10)[-6:] == late.tolist()


def test_the_batch_size_does_not_change_the_order() -> None:
    assert stream_of_ids(2, 12, 5, 20) == stream_of_ids(2, 5, 12, 20) == stream_of_ids(2, 1, 60, 20)


def test_another_seed_is_another_order() -> None:
    assert stream_of_ids(0, 10, 10, 100) != stream_of_ids(1, 10, 10, 100)
