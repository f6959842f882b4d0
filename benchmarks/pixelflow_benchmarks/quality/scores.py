"""Measures of the quality of generated digits, each compared with the values of real digits and of noise.

Everything is measured on the 8x8 grid of the original scans (block means of the larger images, values 0..16), because
real digits contain no more detail than that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import linalg
from sklearn.neural_network import MLPClassifier
from sklearn.svm import SVC

from pixelflow_training.data import ImageSet

Float = NDArray[np.float64]
Labels = NDArray[np.int64]

SCAN_SIDE = 8
FEATURES = 64


def scan_values(images: NDArray[np.float32] | NDArray[np.uint8]) -> Float:
    """Convert images ``[N, R, R, c]`` (uint8, or float in [0, 1]) to scans ``[N, 64]``, 0..16, channels averaged."""
    scale = 16 / 255 if images.dtype == np.uint8 else 16.0
    grey = images.mean(axis=-1, dtype=np.float64) * scale
    count, side, _ = grey.shape
    block = side // SCAN_SIDE
    return grey.reshape(count, SCAN_SIDE, block, SCAN_SIDE, block).mean(axis=(2, 4)).reshape(count, -1)


def set_values(images: ImageSet) -> tuple[Float, Labels]:
    """Return the scans ``[N, 64]`` and labels ``[N]`` of an image set."""
    return scan_values(images.images.permute(0, 2, 3, 1).numpy()), images.labels.numpy()


def frechet_distance(a: Float, b: Float) -> float:
    """Return the Frechet distance between two Gaussians fitted to ``[n, d]`` and ``[m, d]``.

    ``|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))``. The trace of the root is computed as the sum of the square
    roots of the eigenvalues of ``S_a^(1/2) S_b S_a^(1/2)``.
    """
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(linalg.eigvalsh(root @ cov_b @ root).clip(min=0)).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def nearest(queries: Float, points: Float) -> Float:
    """Return each query's distance to its nearest point, ``[n, d]`` and ``[m, d]``, as root mean square over ``d``."""
    squares = np.square(queries).sum(1)[:, None] + np.square(points).sum(1)[None] - 2 * queries @ points.T
    return np.sqrt(squares.min(1).clip(min=0) / queries.shape[1])


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Quality of a set of digits.

    Attributes:
        agreement: fraction of digits that the classifier assigns to the requested class.
        frechet: Frechet distance to held-out real digits in the 64 hidden features of a small network.
        frechet_scan: the same on the 64 scan values.
        novelty: share of digits whose nearest real digit is a held-out one, over the share of held-out digits among
            the real ones: about 1 for digits that depend on neither set, 0 for copies of training digits.
        copies: fraction of digits that are closer to a training digit than 99 % of the held-out digits are.
        nearest: median distance to the nearest training digit, in scan values (root mean square over the 64).
        nearest_low: 1 % quantile of the same distance.
    """

    agreement: float
    frechet: float
    frechet_scan: float
    novelty: float
    copies: float
    nearest: float
    nearest_low: float


class Judge:
    """Scores digits with models fitted to the real training digits.

    Args:
        train, held_out: the real digits.
        seed: seed of the network that provides the features, and of the noise that is scored.
    """

    def __init__(self, train: ImageSet, held_out: ImageSet, seed: int = 0) -> None:
        self.train, self.train_labels = set_values(train)
        self.held_out, self.held_out_labels = set_values(held_out)
        self.classifier = SVC(gamma=0.001, C=10.0).fit(self.train, self.train_labels)
        network = MLPClassifier((FEATURES,), learning_rate_init=0.01, max_iter=1000, random_state=seed)
        self.network = network.fit(self.train / 16, self.train_labels)
        self.seed = seed
        self.near = self.nearest_real()[1]

    def features(self, scans: Float) -> Float:
        """Return the network's hidden layer: ``[N, 64] -> [N, 64]``."""
        return np.maximum(scans / 16 @ self.network.coefs_[0] + self.network.intercepts_[0], 0)

    def score(self, scans: Float, labels: Labels) -> Scores:
        """Score digits ``[N, 64]`` that were requested with ``labels``."""
        to_train, to_held_out = nearest(scans, self.train), nearest(scans, self.held_out)
        held_out_share = len(self.held_out) / (len(self.held_out) + len(self.train))
        return Scores(
            agreement=float((self.classifier.predict(scans) == labels).mean()),
            frechet=frechet_distance(self.features(scans), self.features(self.held_out)),
            frechet_scan=frechet_distance(scans, self.held_out),
            novelty=float((to_held_out < to_train).mean() / held_out_share),
            copies=float((to_train < self.near).mean()),
            nearest=float(np.median(to_train)),
            nearest_low=float(np.quantile(to_train, 0.01)),
        )

    def score_real(self) -> Scores:
        """Score training digits against held-out ones: what a perfect model of the training set would get."""
        return self.score(self.train, self.train_labels)

    def score_noise(self, count: int = 1000) -> Scores:
        """Score independent uniform values with random labels: what a model without knowledge would get."""
        rng = np.random.default_rng(self.seed)
        return self.score(rng.uniform(0, 16, (count, FEATURES)), rng.integers(0, 10, count))

    def nearest_real(self) -> tuple[float, float]:
        """Return the median and the 1 % quantile of held-out digits' distances to their nearest training digit."""
        distances = nearest(self.held_out, self.train)
        return float(np.median(distances)), float(np.quantile(distances, 0.01))

    def held_out_accuracy(self) -> tuple[float, float]:
        """Return the accuracy on held-out digits of the classifier and of the network whose features are used."""
        network = self.network.score(self.held_out / 16, self.held_out_labels)
        return float(self.classifier.score(self.held_out, self.held_out_labels)), float(network)
