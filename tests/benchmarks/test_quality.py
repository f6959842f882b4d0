"""Measures of quality: each against its definition, and each shown what it is there to find, on real digits."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import linalg
from sklearn.datasets import load_digits as load_scans
from sklearn.neighbors import NearestNeighbors

from pixelflow_benchmarks.quality.scores import Judge, frechet_distance, nearest, scan_values
from pixelflow_training.config import DataConfig
from pixelflow_training.data import load_digits

Float = NDArray[np.float64]


def random_generator(seed: int) -> np.random.Generator:
    print(f"seed {seed}")
    return np.random.default_rng(seed)


# --- Frechet distance --------------------------------------------------------------------------------------


def with_moments(mean: Float, covariance: Float, rng: np.random.Generator, count: int = 200) -> Float:
    """Points whose sample mean and sample covariance (over n - 1) are these to rounding."""
    z = rng.standard_normal((count, len(mean)))
    z -= z.mean(0)
    whiten = linalg.inv(linalg.cholesky(np.cov(z, rowvar=False), lower=True))
    return np.asarray(z @ whiten.T @ linalg.cholesky(covariance, lower=True).T + mean)


def random_covariance(dim: int, rng: np.random.Generator) -> Float:
    root = rng.standard_normal((dim, dim)) / math.sqrt(dim)
    return np.asarray(root @ root.T + 0.1 * np.eye(dim))


@pytest.mark.parametrize("dim", [2, 5, 64])
def test_equal_gaussians_are_at_distance_zero(dim: int) -> None:
    rng = random_generator(dim)
    mean, covariance = rng.standard_normal(dim), random_covariance(dim, rng)
    a, b = with_moments(mean, covariance, rng), with_moments(mean, covariance, rng, 300)
    assert abs(frechet_distance(a, a)) < 1e-10
    assert abs(frechet_distance(a, b)) < 1e-10
    assert abs(frechet_distance(a, a[::-1])) < 1e-10


@pytest.mark.parametrize("dim", [2, 5, 64])
def test_a_shift_costs_its_square(dim: int) -> None:
    rng = random_generator(10 + dim)
    a = with_moments(np.zeros(dim), random_covariance(dim, rng), rng)
    shift = rng.standard_normal(dim)
    assert frechet_distance(a, a + shift) == pytest.approx(shift @ shift, rel=1e-9)


def test_a_stretch_costs_the_squared_difference_of_deviations() -> None:
    rng = random_generator(20)
    deviations, others = np.array([1.0, 2.0, 0.5]), np.array([3.0, 2.0, 0.0])
    a = with_moments(np.zeros(3), np.eye(3), rng)
    distance = frechet_distance(a * deviations, a * others)  # the second is flat in one direction
    assert distance == pytest.approx(((deviations - others) ** 2).sum(), rel=1e-9)


@pytest.mark.parametrize("dim", [2, 5, 64])
def test_any_gaussians_have_the_distance_of_the_formula(dim: int) -> None:
    rng = random_generator(30 + dim)
    a = with_moments(rng.standard_normal(dim), random_covariance(dim, rng), rng)
    b = with_moments(rng.standard_normal(dim), random_covariance(dim, rng), rng, 150)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(cov_a @ cov_b)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-8)
    assert expected > 0.1


def test_fewer_points_than_dimensions_are_measured_too() -> None:
    """The covariance is singular, and rounding makes some of its eigenvalues negative."""
    rng = random_generator(40)
    a, b = rng.standard_normal((20, 64)), 2 * rng.standard_normal((30, 64))
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-5)
    assert 0 < frechet_distance(a, b) < np.inf


# --- nearest -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("queries", "points", "dim"), [(1, 1, 1), (7, 5, 3), (40, 90, 64)])
def test_nearest_is_what_trying_all_gives(queries: int, points: int, dim: int) -> None:
    rng = random_generator(50 + dim)
    q, p = rng.uniform(0, 16, (queries, dim)), rng.uniform(0, 16, (points, dim))
    expected = [min(math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / dim) for b in p) for a in q]
    np.testing.assert_allclose(nearest(q, p), expected, rtol=1e-9)


def test_a_points_nearest_point_is_itself() -> None:
    points = random_generator(60).uniform(0, 16, (50, 64))
    # The squares, up to 64 * 256, cancel: what is left is their rounding, and a root makes 1e-12 of it 1e-6.
    assert nearest(points, points).max() < 1e-6
    assert nearest(points[:10], points[10:]).min() > 1


# --- scans -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("block", [1, 2, 4, 7])
def test_scan_values_undo_enlargement(block: int, channels: int) -> None:
    scans = load_scans().images[:20]
    large = np.repeat(np.repeat(scans, block, 1), block, 2)[..., None].repeat(channels, -1)
    values = scan_values((large / 16).astype(np.float32))
    assert values.dtype == np.float64
    assert values.shape == (20, 64)
    np.testing.assert_allclose(values, scans.reshape(20, 64), rtol=0, atol=1e-6)
    # As bytes a value is rounded to a 255th of 16.
    from_bytes = scan_values(np.rint(large * (255 / 16)).astype(np.uint8))
    np.testing.assert_allclose(from_bytes, scans.reshape(20, 64), rtol=0, atol=0.5 * 16 / 255 + 1e-9)
    assert np.abs(from_bytes - scans.reshape(20, 64)).max() > 0


def test_scan_values_are_means_over_blocks_and_channels() -> None:
    images = random_generator(70).random((3, 24, 24, 3), dtype=np.float32)
    values = scan_values(images)
    for n in range(3):
        for place in range(64):
            top, left = 3 * (place // 8), 3 * (place % 8)
            expected = 16 * images[n, top : top + 3, left : left + 3].astype(np.float64).mean()
            assert values[n, place] == pytest.approx(expected, rel=1e-12)


# --- the judge, on real digits -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """A fitted judge and what its making warned about."""

    judge: Judge
    complaints: list[str]


@pytest.fixture(scope="module")
def bench() -> Bench:
    train, held_out = load_digits(DataConfig(), 32, 1)
    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always")
        judge = Judge(train, held_out)
    return Bench(judge, [str(complaint.message) for complaint in complaints])


def test_a_judge_is_made_without_complaints(bench: Bench) -> None:
    assert bench.complaints == []


def test_the_classifiers_read_digits_that_they_have_not_seen(bench: Bench) -> None:
    assert bench.judge.held_out.shape == (360, 64)
    assert bench.judge.train.shape == (1437, 64)
    svm, network = bench.judge.held_out_accuracy()
    assert 0.97 < svm <= 1
    assert 0.97 < network <= 1
    # Counted here: not the accuracy on the training digits, which is 1.
    judge = bench.judge
    wrong = judge.classifier.predict(judge.held_out) != judge.held_out_labels
    assert svm == pytest.approx(1 - wrong.mean())
    assert wrong.any()


def test_the_features_are_the_networks_hidden_layer(bench: Bench) -> None:
    """Put through the network's last layer, they give the network's own answers."""
    judge = bench.judge
    features = judge.features(judge.held_out)
    assert features.shape == (360, 64)
    assert features.min() == 0
    logits = features @ judge.network.coefs_[1] + judge.network.intercepts_[1]
    assert np.array_equal(logits.argmax(1), judge.network.predict(judge.held_out / 16))


def test_copies_of_training_digits_are_flagged(bench: Bench) -> None:
    judge = bench.judge
    scores = judge.score(judge.train, judge.train_labels)
    assert scores.copies > 0.99
    assert scores.novelty < 0.1
    assert scores.agreement > 0.97


def test_copies_of_some_training_digits_are_flagged(bench: Bench) -> None:
    """Of any of them, and not only of those that a subset of the training digits holds."""
    judge = bench.judge
    some = random_generator(80).permutation(len(judge.train))[:300]
    scores = judge.score(judge.train[some], judge.train_labels[some])
    assert scores.copies > 0.99
    assert scores.novelty < 0.1


def test_slightly_changed_copies_are_flagged(bench: Bench) -> None:
    judge = bench.judge
    changed = judge.train + random_generator(81).normal(0, 0.2, judge.train.shape)
    scores = judge.score(changed, judge.train_labels)
    assert scores.copies > 0.95
    assert scores.novelty < 0.3
    assert scores.nearest == pytest.approx(0.2, abs=0.005)  # as far as they were moved


@pytest.fixture(scope="module")
def fresh() -> tuple[Judge, Float, NDArray[np.int64]]:
    """A judge that knows two thirds of the held-out digits, and the third that it does not: digits of nobody's set."""
    train, held_out = load_digits(DataConfig(held_out=540), 32, 1)
    known, unknown = type(held_out)(held_out.images[:360], held_out.labels[:360]), held_out.images[360:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a judge complains about is a test above
        judge = Judge(train, known)
    return judge, scan_values(unknown.permute(0, 2, 3, 1).numpy()), held_out.labels[360:].numpy()


def test_new_real_digits_are_not_flagged(fresh: tuple[Judge, Float, NDArray[np.int64]]) -> None:
    judge, scans, labels = fresh
    scores = judge.score(scans, labels)
    # 180 digits: 1 in 100 are expected this near, 8 in 180 would be 4 deviations above.
    assert scores.copies <= 8 / 180
    assert 0.85 < scores.novelty < 1.15
    assert scores.agreement > 0.95
    noise = judge.score_noise()
    assert scores.frechet < 0.1 * noise.frechet
    assert scores.frechet_scan < 0.1 * noise.frechet_scan


def test_held_out_digits_are_near_themselves_and_not_near_training_digits(bench: Bench) -> None:
    """By construction one in a hundred is as near as the nearest hundredth; that they are known shows the other way."""
    judge = bench.judge
    scores = judge.score(judge.held_out, judge.held_out_labels)
    assert scores.copies <= 0.012
    assert scores.novelty > 4.9  # of 1797 / 360: each is its own nearest digit
    assert abs(scores.frechet) < 1e-4
    assert abs(scores.frechet_scan) < 1e-4


def test_nearest_distances_are_those_of_a_library(bench: Bench) -> None:
    """In scan values: the root mean square over the 64 of a scan."""
    judge = bench.judge
    neighbours = NearestNeighbors(n_neighbors=1, algorithm="kd_tree").fit(judge.train)
    distances = neighbours.kneighbors(judge.held_out)[0][:, 0] / 8
    expected = (np.median(distances), np.quantile(distances, 0.01))
    assert judge.nearest_real() == pytest.approx(expected, rel=1e-6)
    scores = judge.score(judge.held_out, judge.held_out_labels)
    assert (scores.nearest, scores.nearest_low) == pytest.approx(expected, rel=1e-6)


def test_noise_scores_badly(bench: Bench) -> None:
    judge = bench.judge
    noise, real = judge.score_noise(), judge.score_real()
    assert noise.agreement < 0.15
    assert noise.frechet > 20 * real.frechet
    assert noise.frechet_scan > 20 * real.frechet_scan
    assert noise.copies == 0
    # Uniform from 0 to 16, as a scan's values are: another thousand of these are as far away.
    rng = random_generator(82)
    again = judge.score(rng.uniform(0, 16, (1000, 64)), rng.integers(0, 10, 1000))
    assert noise.frechet_scan == pytest.approx(again.frechet_scan, rel=0.05)
    assert noise.frechet == pytest.approx(again.frechet, rel=0.1)


def test_digits_asked_for_as_others_disagree(bench: Bench) -> None:
    judge = bench.judge
    scores = judge.score(judge.held_out[::-1].copy() + 1e-3, (judge.held_out_labels[::-1] + 1) % 10)
    assert scores.agreement < 0.05


def test_a_collapse_to_one_digit_is_far_away(bench: Bench) -> None:
    """Perfect digits of one class only, each asked for: agreement cannot see it, the distance does."""
    judge = bench.judge
    threes = judge.train[judge.train_labels == 3]
    scores = judge.score(threes, np.full(len(threes), 3))
    assert scores.agreement == 1
    assert scores.frechet > 5 * judge.score_real().frechet


def test_scores_repeat(bench: Bench) -> None:
    assert bench.judge.score_noise(200) == bench.judge.score_noise(200)
    assert bench.judge.score_real() == bench.judge.score_real()
