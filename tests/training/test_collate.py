"""A packed batch, image by image, against the training pair of the reference.

Each image has a label of its own, so a batch tells which image stands where; its time tells the step; and the noise
follows from the target, which is linear in it. The noisy image is then fully determined, whatever the order of draws.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from pixelflow_engine.config import PixelFlowConfig
from pixelflow_engine.reference import Stage, make_stages, training_pair
from pixelflow_engine.reference.training import down, up
from pixelflow_training.collate import Batch, make_batch, spread_stages
from support.engines import tiny_config
from support.reference_models import seeded

U = 2.0**-24
"""Half a unit in the last place of float32 at 1."""


@dataclass(frozen=True)
class Made:
    """A batch and what it was made from: image i has label i."""

    config: PixelFlowConfig
    images: Tensor
    batch: Batch

    def stage(self, i: int) -> Stage:
        """The reference's stage of the batch's i-th image."""
        return make_stages(self.config.scheduler.num_stages)[int(self.batch.stage[i])]

    def pair(self, i: int) -> tuple[Tensor, Tensor]:
        """The i-th image's noisy pixels and target, ``[c, h, w]`` float64, unpacked by loops."""
        layout, p, c = self.batch.layout, self.config.model.patch_size, self.config.model.in_channels
        rows, columns = layout.grids[i]
        first = sum(r * q for r, q in layout.grids[:i])
        pair = []
        for tokens in (self.batch.tokens, self.batch.targets):
            image = torch.full((c, rows * p, columns * p), math.nan, dtype=torch.float64)
            for n in range(rows * columns):
                top, left = n // columns * p, n % columns * p
                image[:, top : top + p, left : left + p] = tokens[first + n].reshape(c, p, p)
            pair.append(image)
        return pair[0], pair[1]

    def noise(self, i: int) -> Tensor:
        """The normals that the i-th target was made with: ``target = end s - start c + (start - end) eps``."""
        assert self.batch.labels is not None
        stage, S = self.stage(i), self.config.scheduler.num_stages
        image = self.images[int(self.batch.labels[i])].double()
        sharp = down(image, S - 1 - stage.index)
        coarse = up(down(image, S - stage.index))
        target = self.pair(i)[1]
        return (target - stage.end * sharp + stage.start * coarse) / (stage.start - stage.end)

    def step(self, i: int) -> int:
        """The training step whose model time the i-th image has, to the last bit of float32."""
        times = self.stage(i).model_times.float()
        (steps,) = (times == self.batch.t_model[i]).nonzero(as_tuple=True)
        assert len(steps) == 1, f"model time {self.batch.t_model[i]} is none of the stage's"
        return int(steps)


def made(count: int, seed: int, num_stages: int = 3, resolution: int = 16, **model: Any) -> Made:
    config = tiny_config(num_stages, resolution, **({"num_classes": count} | model))
    draws = seeded(seed)
    images = 2 * torch.rand(count, config.model.in_channels, resolution, resolution, generator=draws) - 1
    return Made(config, images, make_batch(images, torch.arange(count), config, 0.0, draws))


CASES: list[dict[str, Any]] = [
    {},
    {"num_stages": 1, "resolution": 8},
    {"num_stages": 2, "resolution": 24, "patch_size": 4},
    {"num_stages": 4, "resolution": 32, "in_channels": 1, "out_channels": 1},
    {"num_stages": 2, "resolution": 4, "patch_size": 1, "in_channels": 2, "out_channels": 2},
    {"num_stages": 2, "resolution": 12, "patch_size": 6},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: ",".join(f"{k}={v}" for k, v in case.items()) or "plain")
@pytest.mark.parametrize("count", [5, 12])
def test_a_batch_is_the_references_training_pairs(case: dict[str, Any], count: int) -> None:
    m = made(count, seed=40 + count, **case)
    S = m.config.scheduler.num_stages
    assert m.batch.labels is not None
    assert sorted(m.batch.labels.tolist()) == list(range(count)), "an image is missing or twice there"
    for i in range(count):
        stage, eps, k = m.stage(i), m.noise(i), m.step(i)
        x_tau, target, t_model = training_pair(m.images[int(m.batch.labels[i])].double(), stage, S, k, eps)
        got_x, got_target = m.pair(i)
        assert got_x.shape == x_tau.shape
        # A dozen float32 roundings of values up to 1 + |eps|, enlarged by the division that the noise is solved with.
        tolerance = 16 * U * (1 + eps.abs().max().item()) / (stage.end - stage.start)
        assert (got_target - target).abs().max() < tolerance
        assert (got_x - x_tau).abs().max() < tolerance
        assert abs(m.batch.t_model[i].item() - t_model) <= 999 * U


def test_a_wrong_time_image_or_shared_noise_would_show() -> None:
    """The comparison above is not blind: the next step, another image and noise of its own differ by far more."""
    m = made(6, seed=50)
    S = m.config.scheduler.num_stages
    assert m.batch.labels is not None
    for i in range(6):
        stage, eps, k = m.stage(i), m.noise(i), m.step(i)
        image, got_x = m.images[int(m.batch.labels[i])].double(), m.pair(i)[0]
        other = m.images[int(m.batch.labels[i - 1])].double()
        for wrong in (
            training_pair(image, stage, S, (k + 10) % 1000, eps),
            training_pair(other, stage, S, k, eps),
            training_pair(image, stage, S, k, eps.flip(-1)),
        ):
            assert (got_x - wrong[0]).abs().max() > 1e-3


def test_the_noise_is_standard_normal_and_everyones_own() -> None:
    m = made(48, seed=60, num_stages=2, resolution=8)
    noises = [m.noise(i).flatten() for i in range(48)]
    pool = torch.cat(noises)
    n = len(pool)
    assert abs(pool.mean().item()) < 5 / math.sqrt(n)
    assert abs(pool.var().item() - 1) < 5 * math.sqrt(2 / n)
    assert abs(pool.pow(4).mean().item() - 3) < 5 * math.sqrt(96 / n)
    for size in {len(noise) for noise in noises}:
        alike = torch.stack([noise for noise in noises if len(noise) == size])
        correlations = torch.corrcoef(alike) - torch.eye(len(alike), dtype=torch.float64)
        assert correlations.abs().max() < 6 / math.sqrt(size), "two images have one noise"


def test_times_are_spread_over_all_thousand_steps() -> None:
    count = 12000
    m = made(count, seed=61, num_stages=1, resolution=2, patch_size=2, in_channels=1, out_channels=1)
    times = m.stage(0).model_times.float()
    k = torch.searchsorted(times, m.batch.t_model)
    assert torch.equal(times[k], m.batch.t_model)
    counts = torch.bincount(k, minlength=1000)
    # Each step is drawn 12 times on average, and none of the thousand never (probability e^-12) or 40 times (1e-10).
    assert len(counts) == 1000
    assert counts.min() > 0
    assert counts.max() < 40
    expected = count / 1000
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi_squared - 999) < 5 * math.sqrt(2 * 999)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 13])
def test_stages_are_spread_evenly_in_random_order(count: int, num_stages: int) -> None:
    draws = seeded(70 + count)
    trials = 600
    seen = torch.stack([spread_stages(count, num_stages, draws) for _ in range(trials)])
    assert seen.shape == (trials, count)
    for stages in seen:
        counts = torch.bincount(stages, minlength=num_stages)
        assert len(counts) == num_stages
        assert counts.max() - counts.min() <= 1
    # Every image gets every stage equally often: frequencies of 600 trials within 5 standard deviations.
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


@pytest.mark.parametrize(("count", "num_stages", "resolution"), [(10, 3, 16), (3, 3, 16), (9, 1, 4), (8, 4, 32)])
def test_the_pack_lies_as_its_layout_says(count: int, num_stages: int, resolution: int) -> None:
    m = made(count, seed=80, num_stages=num_stages, resolution=resolution)
    batch, p, c = m.batch, m.config.model.patch_size, m.config.model.in_channels
    counts = Counter(batch.stage.tolist())
    assert max(counts.values()) - min(counts.get(s, 0) for s in range(num_stages)) <= 1
    assert batch.stage.tolist() == sorted(batch.stage.tolist(), reverse=True), "full resolution comes first"
    sides = [resolution // 2 ** (num_stages - 1 - s) // p for s in batch.stage.tolist()]
    assert batch.layout.grids == tuple((side, side) for side in sides)
    assert batch.latent_size.tolist() == sides
    total = sum(side * side for side in sides)
    assert batch.layout.num_tokens == total
    assert batch.tokens.shape == batch.targets.shape == (total, c * p * p)
    assert batch.tokens.dtype == batch.targets.dtype == batch.t_model.dtype == torch.float32
    assert batch.t_model.shape == batch.stage.shape == (count,)
    owners = [i for i, side in enumerate(sides) for _ in range(side * side)]
    assert batch.layout.image_index.tolist() == owners


def test_a_batch_is_a_pure_function_of_its_generator() -> None:
    stream = torch.get_rng_state()
    first, again, other = made(6, seed=90).batch, made(6, seed=90).batch, made(6, seed=91).batch
    assert torch.equal(torch.get_rng_state(), stream), "torch's global generator has moved"
    for name in ("tokens", "targets", "t_model", "labels", "latent_size", "stage"):
        assert torch.equal(getattr(first, name), getattr(again, name)), name
    assert not torch.equal(first.tokens[:16], other.tokens[:16])


def test_images_and_labels_are_left_as_they_were() -> None:
    config = tiny_config(num_classes=6)
    images, labels = torch.rand(6, 3, 16, 16, generator=seeded(92)), torch.arange(6)
    before = images.clone()
    make_batch(images, labels, config, 1.0, seeded(93))
    assert torch.equal(images, before)
    assert torch.equal(labels, torch.arange(6))


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_labels_are_dropped_at_the_asked_rate(rate: float) -> None:
    count, classes = 4200, 7
    config = tiny_config(num_stages=2, resolution=4, num_classes=classes, in_channels=1, out_channels=1)
    images = torch.zeros(count, 1, 4, 4)
    labels = torch.arange(count) % classes
    batch = make_batch(images, labels, config, rate, seeded(94))
    assert batch.labels is not None
    dropped = (batch.labels == classes).double()
    tolerance = 5 * math.sqrt(rate * (1 - rate) / count)
    assert abs(dropped.mean().item() - rate) <= tolerance
    # Whoever is dropped has nothing to do with class or stage, and nobody gets another class.
    kept = torch.bincount(batch.labels[batch.labels < classes], minlength=classes).double() / (count / classes)
    assert (kept - (1 - rate)).abs().max() <= tolerance * math.sqrt(classes)
    for s in (0, 1):
        assert abs(dropped[batch.stage == s].mean().item() - rate) <= tolerance * math.sqrt(2)


def test_a_model_without_classes_gets_no_labels() -> None:
    config = tiny_config(num_classes=0)
    batch = make_batch(torch.zeros(4, 3, 16, 16), torch.arange(4), config, 0.1, seeded(95))
    assert batch.labels is None
