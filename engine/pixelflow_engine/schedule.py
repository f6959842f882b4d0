"""The cascade's schedule as pure functions of its configuration. Source: arXiv 2504.07963, section 3.2.

Times: ``tau`` is local to a stage, 0 at its start and 1 at its end; model time is the transformer's time input, 0 to
999.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pixelflow_kernels.cascade.law import GAMMA

from .config import SchedulerConfig

Float64Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Stage:
    """One resolution of the cascade.

    Attributes:
        index: 0 is the smallest and noisiest.
        start, end: times that the stage covers, between pure noise (0) and image (1).
        window: model time at the first and the last point of the training grid.
        alpha, beta: coefficients on entering the stage, ``x = alpha * upsample(x) + beta * noise``.
    """

    index: int
    start: float
    end: float
    window: tuple[float, float]
    alpha: float
    beta: float

    def local_times(self, scheduler: SchedulerConfig) -> Float64Array:
        """``tau`` of the training grid: ``[K]``, from 0 to 1 - 1/K."""
        return np.arange(scheduler.num_train_timesteps, dtype=np.float64) / scheduler.num_train_timesteps

    def model_times(self, scheduler: SchedulerConfig) -> Float64Array:
        """Model times of the training grid: ``[K]``."""
        return _window_points(scheduler, self.index, _window_edges(scheduler))


def make_stages(scheduler: SchedulerConfig) -> tuple[Stage, ...]:
    """The stages of a cascade, smallest first."""
    edges = _window_edges(scheduler)
    stages = []
    for s, (boundary, (start, end)) in enumerate(zip(_boundaries(scheduler), _spans(scheduler), strict=False)):
        points = _window_points(scheduler, s, edges)
        alpha = _rectify(boundary)
        stages.append(
            Stage(
                index=s,
                start=start,
                end=end,
                window=(float(points[0]), float(points[-1])),
                alpha=alpha,
                beta=alpha * (1 - boundary) / math.sqrt(-GAMMA),
            )
        )
    return tuple(stages)


def step_times(
    stage: Stage, scheduler: SchedulerConfig, num_steps: int, shift: float
) -> tuple[Float64Array, Float64Array]:
    """Local times ``[n + 1]``, ending at 1, and their model times ``[n + 1]``, of ``n`` fixed steps.

    ``tau`` is evenly spaced up to 1 - 1/K and shifted by ``tau / (shift + (1 - shift) tau)``, so the last step has
    length ``1 - tau_n`` (1/K for shift = 1 and more than one step). Model time is linear in ``tau`` over the stage's
    window; for slopes evaluated at the end, the last model time is the end of the window.
    """
    final = float(stage.local_times(scheduler)[-1])
    tau = np.linspace(0.0, final, num_steps, dtype=np.float64)
    tau = tau / (shift + (1 - shift) * tau)
    first, last = stage.window
    return np.append(tau, 1.0), np.append((last - first) / final * tau + first, last)


def _rectify(boundary: float) -> float:
    return 1 / (math.sqrt(1 - 1 / GAMMA) * (1 - boundary) + boundary)


def _boundaries(scheduler: SchedulerConfig) -> list[float]:
    """``b_0 .. b_S``: whole training times divided by K, in float32 as in published training; ``b_S`` = 1."""
    K, S = scheduler.num_train_timesteps, scheduler.num_stages
    return [float(np.float32(int(K * (s / S))) / np.float32(K)) for s in range(S)] + [1.0]


def _spans(scheduler: SchedulerConfig) -> list[tuple[float, float]]:
    """``(start_s, end_s)`` of each stage; a stage starts before the previous one's end, to correct its noise."""
    boundaries = _boundaries(scheduler)
    return [(b * _rectify(b), following) for b, following in pairwise(boundaries)]


def _window_edges(scheduler: SchedulerConfig) -> list[int]:
    """Integer model times at which the stages' windows meet, proportional to the lengths of the stages' spans."""
    K = scheduler.num_train_timesteps
    lengths = [end - start for start, end in _spans(scheduler)]
    return [int(K * (sum(lengths[:s]) / sum(lengths))) for s in range(len(lengths))] + [K - 1]


def _window_points(scheduler: SchedulerConfig, stage: int, edges: list[int]) -> Float64Array:
    """K points from edge to edge; only the last stage includes its right edge."""
    K = scheduler.num_train_timesteps
    intervals = K - 1 if stage == scheduler.num_stages - 1 else K
    return edges[stage] + (edges[stage + 1] - edges[stage]) * np.arange(K, dtype=np.float64) / intervals
