"""Draws: pure functions of a seed, a purpose and a place, so that training can go on from any place."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pixelflow_training import draws
from pixelflow_training.draws import Purpose, balanced_stages, integers, new_seed, sample_ids, seeds, uniforms, words
from support.cascade import philox

SEEDS = [0, 1, 2**32, 2**63, 2**64 - 1, 0x0123456789ABCDEF]
PLACES = [0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 10**15, 2**62]


def places(*positions: int) -> Tensor:
    return torch.tensor(positions)


def word_list(seed: int, purpose: Purpose, position: int, count: int) -> list[int]:
    """The same words by Python's integers."""
    counters = [(position % 2**32, position >> 32, int(purpose), block) for block in range(-(-count // 4))]
    return [word for counter in counters for word in philox(counter, (seed % 2**32, seed >> 32))][:count]


# --- numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_words_are_philox_of_seed_purpose_and_position(seed: int) -> None:
    for purpose in Purpose:
        drawn = words(seed, purpose, places(*PLACES), 10)
        assert drawn.dtype == torch.int64
        assert drawn.tolist() == [word_list(seed, purpose, position, 10) for position in PLACES]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 9])
def test_fewer_words_are_the_first_of_more(count: int) -> None:
    more = words(7, Purpose.AFFINE, places(3, 4), 12)
    assert torch.equal(words(7, Purpose.AFFINE, places(3, 4), count), more[:, :count])


def test_purposes_drawn_together_have_the_words_that_they_have_apart() -> None:
    counts = {Purpose.NOISE: 2, Purpose.AFFINE: 9, Purpose.TIME: 1, Purpose.CROP: 4}
    at = places(*PLACES)
    together = draws.words_for(SEEDS[-1], counts, at)
    assert list(together) == list(counts)
    for purpose, count in counts.items():
        assert torch.equal(together[purpose], words(SEEDS[-1], purpose, at, count))
    assert {p: w.shape for p, w in draws.words_for(1, counts, at[:0]).items()} == {p: (0, n) for p, n in counts.items()}


@pytest.mark.parametrize("seed", SEEDS)
def test_numbers_are_their_words_in_whole_arithmetic(seed: int) -> None:
    for position in PLACES:
        a, b, c, d = word_list(seed, Purpose.TIME, position, 4)
        at = places(position)
        assert uniforms(seed, Purpose.TIME, at, 2).tolist() == [
            [((a << 32 | b) >> 11) / 2**53, ((c << 32 | d) >> 11) / 2**53]
        ]
        for bound in (1, 2, 3, 1000, 2**31 - 1):
            assert integers(seed, Purpose.TIME, at, bound).tolist() == [(a << 32 | b) * bound >> 64]
        (drawn,) = seeds(seed, Purpose.TIME, at).tolist()
        assert drawn % 2**64 == b << 32 | a
        assert new_seed(seed, Purpose.TIME, position) == b << 32 | a


def test_the_extremes_of_a_word_stay_in_range(monkeypatch: pytest.MonkeyPatch) -> None:
    for word, uniform, whole in ((0, 0.0, 0), (2**32 - 1, 1 - 2.0**-53, 2**31 - 2)):
        monkeypatch.setattr(draws, "words", lambda *_, w=word: torch.full((1, 2), w))
        assert uniforms(0, Purpose.TIME, places(0), 1).tolist() == [[uniform]]
        assert integers(0, Purpose.TIME, places(0), 2**31 - 1).tolist() == [whole]


def test_uniforms_and_integers_are_evenly_spread() -> None:
    at, n = torch.arange(30000), 30000
    drawn = uniforms(5, Purpose.AFFINE, at, 2)
    assert drawn.dtype == torch.float64
    for column in drawn.T:
        # Kolmogorov's distance exceeds 2 / sqrt(n) with probability 7e-4; the seed is fixed.
        empirical = torch.arange(n, dtype=torch.float64) / n
        assert (column.sort().values - empirical).abs().max() < 2 / math.sqrt(n)
    assert abs(torch.corrcoef(drawn.T)[0, 1].item()) < 5 / math.sqrt(n)
    counts = torch.bincount(integers(5, Purpose.TIME, at, 1000), minlength=1000)
    assert len(counts) == 1000
    chi_squared = ((counts - n / 1000) ** 2 / (n / 1000)).sum().item()
    assert abs(chi_squared - 999) < 5 * math.sqrt(2 * 999)


def test_a_draw_does_not_depend_on_what_is_drawn_before_or_beside_it() -> None:
    stream = torch.get_rng_state()
    at = torch.arange(100, 140)
    together = uniforms(3, Purpose.AFFINE, at, 2)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniforms(3, Purpose.AFFINE, at[order], 2), together[order])
    for i in (0, 17, 39):
        assert torch.equal(uniforms(3, Purpose.AFFINE, at[i : i + 1], 2)[0], together[i])
    assert torch.equal(torch.get_rng_state(), stream), "torch's global generator has moved"


@pytest.mark.parametrize("seed", [0, 2**32, 2**64 - 2])
def test_seeds_purposes_and_neighbours_are_independent(seed: int) -> None:
    count = 1000
    streams = torch.stack(
        [
            uniforms(s, purpose, torch.arange(first, first + count), 1)[:, 0]
            for s in (seed, seed + 1)
            for purpose in Purpose
            for first in (0, 10**9)
        ]
        + [uniforms(seed, Purpose.TIME, torch.arange(1, count + 1), 1)[:, 0]]
    )
    correlations = torch.corrcoef(streams) - torch.eye(len(streams), dtype=torch.float64)
    # A correlation of independent streams has standard deviation 1 / sqrt(1000); 820 pairs stay below 5 of them.
    worst = correlations.abs().max().item()
    assert worst < 5 / math.sqrt(count), f"seed {seed}: correlated by {worst}"


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_named(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"^seed: got {seed}, expected 0 to"):
        words(seed, Purpose.TIME, places(0), 1)


@pytest.mark.parametrize("bound", [0, -1, 2**31])
def test_a_bound_out_of_range_is_named(bound: int) -> None:
    with pytest.raises(ValueError, match=rf"^bound: got {bound}, expected 1 to"):
        integers(0, Purpose.TIME, places(0), bound)


# --- the order of samples ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset_size", [1, 3, 7, 20])
@pytest.mark.parametrize("seed", [0, 11])
def test_every_epoch_is_a_permutation(dataset_size: int, seed: int) -> None:
    epochs = 6
    ids = sample_ids(seed, torch.arange(epochs * dataset_size), dataset_size).tolist()
    orders = [tuple(ids[e * dataset_size : (e + 1) * dataset_size]) for e in range(epochs)]
    for epoch, order in enumerate(orders):
        assert sorted(order) == list(range(dataset_size)), f"epoch {epoch} shows {order}"
    if dataset_size >= 7:
        assert len(set(orders)) == epochs, "two epochs have one order"


def test_ids_are_a_pure_function_of_the_position() -> None:
    straight = sample_ids(5, torch.arange(400), 10)
    assert straight.dtype == torch.int64
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    assert torch.equal(sample_ids(5, order, 10), straight[order])
    for position in (399, 0, 123):
        assert sample_ids(5, places(position), 10).tolist() == [straight[position]]
    assert not torch.equal(sample_ids(6, torch.arange(400), 10), straight)


def test_an_order_handed_out_is_nobody_elses() -> None:
    """Orders are kept between calls; what a caller does to its ids must not reach them."""
    first = sample_ids(5, torch.arange(10), 10)
    kept = first.clone()
    first.zero_()
    assert torch.equal(sample_ids(5, torch.arange(10), 10), kept)


# --- stages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_stages", [1, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_stages_are_spread_evenly_in_random_order(count: int, num_stages: int) -> None:
    trials = 300
    seen = torch.stack([balanced_stages(70 + count, step, count, num_stages) for step in range(trials)])
    assert seen.shape == (trials, count)
    total = torch.zeros(num_stages, dtype=torch.int64)
    for stages in seen:
        counts = torch.bincount(stages, minlength=num_stages)
        assert len(counts) == num_stages
        assert counts.max() - counts.min() <= 1
        total += counts
        assert total.max() - total.min() <= 1, "the same stages have one more again and again"
    # Every image gets every stage equally often: frequencies of 300 trials within 5 standard deviations.
    p = 1 / num_stages
    for s in range(num_stages):
        frequency = (seen == s).double().mean(0)
        assert (frequency - p).abs().max() <= 5 * math.sqrt(p * (1 - p) / trials)
    # Two images share a stage as often as two cards of a shuffled pack share a suit: no pattern runs along the batch.
    if count > 1:
        sizes = [count // num_stages + (s < count % num_stages) for s in range(num_stages)]
        p = sum(size * (size - 1) for size in sizes) / (count * (count - 1))
        for i in range(1, count):
            shared = (seen[:, 0] == seen[:, i]).double().mean().item()
            assert abs(shared - p) <= 5 * math.sqrt(p * (1 - p) / trials), f"images 0 and {i}"


def test_stages_are_a_pure_function_of_seed_and_step() -> None:
    late = balanced_stages(3, 1000, 24, 4)
    balanced_stages(3, 1001, 24, 4)
    assert torch.equal(balanced_stages(3, 1000, 24, 4), late)
    assert not torch.equal(balanced_stages(3, 1001, 24, 4), late)
    assert not torch.equal(balanced_stages(4, 1000, 24, 4), late)
