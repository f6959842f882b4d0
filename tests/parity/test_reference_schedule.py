"""The reference schedule against the published numbers, exact fractions and the law that it has to keep."""

import math
from fractions import Fraction
from itertools import pairwise

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pixelflow_engine.reference import euler_times, guidance_weights, make_stages

GAMMA = Fraction(-1, 3)
ULP = 2.0**-53

PUBLISHED_BOUNDARIES = {2: (0, 0.5, 1), 3: (0, 0.333, 0.666, 1), 4: (0, 0.25, 0.5, 0.75, 1)}
PUBLISHED_STARTS = {
    2: (0, Fraction(1, 3)),
    3: (0, 0.19976005, 0.49925038),
    4: (0, Fraction(1, 7), Fraction(1, 3), Fraction(3, 5)),
}
PUBLISHED_WINDOWS = {
    2: ((0, 427.572), (428, 999)),
    3: ((0, 255.744), (256, 613.642), (614, 999)),
    4: ((0, 174.825), (175, 425.749), (426, 718.707), (719, 999)),
}


def float32(value: float) -> float:
    return float(np.float32(value))


def exact_schedule(num_stages: int) -> tuple[list[mpmath.mpf], list[mpmath.mpf], list[int]]:
    """Boundaries, starts and window edges in 50 digits, from float32 boundaries ``floor(1000 s / S) / 1000``."""
    with mpmath.workdps(50):
        boundaries = [mpmath.mpf(float32((1000 * s // num_stages) / 1000)) for s in range(num_stages)] + [mpmath.mpf(1)]
        ratio = [1 / (mpmath.sqrt(1 - 1 / mpmath.mpf(-1) * 3) * (1 - b) + b) for b in boundaries]
        starts = [boundaries[s] * ratio[s] for s in range(num_stages)]
        lengths = [boundaries[s + 1] - starts[s] for s in range(num_stages)]
        edges = [int(mpmath.floor(1000 * sum(lengths[:s], mpmath.mpf(0)) / sum(lengths))) for s in range(num_stages)]
        return boundaries, starts, [*edges, 999]


@pytest.mark.parametrize("num_stages", PUBLISHED_BOUNDARIES)
def test_starts_and_ends_are_the_published_numbers(num_stages: int) -> None:
    stages = make_stages(num_stages)
    assert [stage.index for stage in stages] == list(range(num_stages))
    for s, stage in enumerate(stages):
        # A boundary is a float32, so an end is within 2^-25 of its three decimals; it is 1, 1/2, 1/4 exactly.
        assert stage.end == float32(PUBLISHED_BOUNDARIES[num_stages][s + 1])
        # S = 3 is published with eight decimals; the others are fractions, to be met to a few roundings.
        tolerance = 1e-8 if num_stages == 3 and s > 0 else 4 * ULP
        assert abs(stage.start - float(PUBLISHED_STARTS[num_stages][s])) <= tolerance


@pytest.mark.parametrize("num_stages", PUBLISHED_WINDOWS)
def test_windows_are_the_published_numbers(num_stages: int) -> None:
    for stage, (first, last) in zip(make_stages(num_stages), PUBLISHED_WINDOWS[num_stages], strict=True):
        assert stage.window[0] == first
        assert abs(stage.window[1] - last) <= 1000 * 2 * ULP  # three decimals are all there is


@pytest.mark.parametrize("num_stages", range(1, 13))
def test_any_schedule_equals_the_formulas_in_fifty_digits(num_stages: int) -> None:
    boundaries, starts, edges = exact_schedule(num_stages)
    stages = make_stages(num_stages)
    assert len(stages) == num_stages
    for s, stage in enumerate(stages):
        assert stage.end == boundaries[s + 1]
        # start = b r(b): square root, two products, a sum, a division, a product, each good to 2^-53 relative.
        assert abs(stage.start - starts[s]) <= 8 * ULP * starts[s]
        # 1000 local times k / 1000, and as many model times that divide the window into 1000 equal steps without its
        # right end, on the last stage into 999 with it. A linspace may be off by a rounding or two.
        assert stage.local_times.dtype == stage.model_times.dtype == torch.float64
        assert stage.local_times.shape == stage.model_times.shape == (1000,)
        steps = 999 if s == num_stages - 1 else 1000
        for k in range(1000):
            assert abs(Fraction(stage.local_times[k].item()) - Fraction(k, 1000)) <= 2 * ULP
            exact = edges[s] + Fraction((edges[s + 1] - edges[s]) * k, steps)
            assert abs(Fraction(stage.model_times[k].item()) - exact) <= 1000 * 2 * ULP
        assert stage.window == (stage.model_times[0].item(), stage.model_times[-1].item())


@pytest.mark.parametrize("num_stages", range(1, 13))
def test_model_time_increases_through_the_whole_cascade(num_stages: int) -> None:
    times = torch.cat([stage.model_times for stage in make_stages(num_stages)])
    assert times[0] == 0
    assert times[-1] == 999
    assert (times.diff() > 0).all()


@pytest.mark.parametrize("num_stages", range(2, 13))
def test_entering_a_stage_restores_the_marginal(num_stages: int) -> None:
    """``alpha up(x) + beta n`` has mean ``start x1`` and white noise of size ``1 - start``, as the stage starts with.

    Leaving a stage at b, ``x = b x1 + (1 - b) eps``; upsampled, the four pixels of a block share their noise:
    covariance ``(1 - b)^2 11^T``. The correction must turn it into ``(1 - start)^2 I``, and does so but for the jitter
    that the block covariance carries.
    """
    ones, eye = np.ones((4, 4)), np.eye(4)
    g = float(GAMMA)
    stages = make_stages(num_stages)
    assert stages[0].start == 0
    for below, stage in pairwise(stages):
        b = below.end
        assert abs(stage.alpha * b - stage.start) <= 2 * ULP
        covariance = stage.alpha**2 * (1 - b) ** 2 * ones + stage.beta**2 * ((1 - g) * eye + g * ones + 1e-6 * eye)
        # The jitter adds 1e-6 beta^2, and beta^2 = 3/4 (1 - start)^2. Sums of terms below 4, a dozen roundings.
        white = (1 - stage.start) ** 2 * (1 + 0.75e-6) * eye
        assert np.abs(covariance - white).max() <= 48 * ULP


def test_alpha_and_beta_of_four_stages_in_closed_form() -> None:
    # sqrt(1 - 1/g) = 2, so alpha = 1 / (2 - b) and beta = sqrt(3) (1 - b) / (2 - b).
    for stage, b in zip(make_stages(4), (0, Fraction(1, 4), Fraction(1, 2), Fraction(3, 4)), strict=True):
        assert abs(stage.alpha - float(1 / (2 - b))) <= 4 * ULP
        assert abs(stage.beta - math.sqrt(3) * float((1 - b) / (2 - b))) <= 8 * ULP


EULER = settings(max_examples=60, deadline=None, derandomize=True)


@EULER
@given(
    num_stages=st.integers(1, 6),
    position=st.floats(0, 1, exclude_max=True),
    steps=st.one_of(st.integers(1, 60), st.just(1000)),
    shift=st.sampled_from([1.0, 0.25, 0.5, 2.0, 3.0, 6.5]),
)
def test_euler_grid_equals_exact_fractions(num_stages: int, position: float, steps: int, shift: float) -> None:
    stage = make_stages(num_stages)[int(position * num_stages)]
    first, last = (Fraction(edge) for edge in stage.window)
    tau, t_model = euler_times(stage, steps, shift)
    assert tau.dtype == t_model.dtype == torch.float64
    assert tau.shape == (steps + 1,)
    assert t_model.shape == (steps,)
    final = Fraction(999, 1000)
    for i in range(steps):
        exact = final * i / (steps - 1) if steps > 1 else Fraction(0)
        exact = exact / (Fraction(shift) + (1 - Fraction(shift)) * exact)
        # The shift's derivative is at most max(s, 1/s): that often a rounding of tau, and four of its own.
        assert abs(Fraction(tau[i].item()) - exact) <= (4 + 4 * max(shift, 1 / shift)) * ULP
        model = first + (last - first) * exact / final
        assert abs(Fraction(t_model[i].item()) - model) <= 1000 * (8 + 4 * max(shift, 1 / shift)) * ULP
    assert tau[-1] == 1
    assert (tau.diff() > 0).all()


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_euler_grid_of_one_and_two_steps(num_stages: int) -> None:
    for stage in make_stages(num_stages):
        tau, t_model = euler_times(stage, 1)
        assert tau.tolist() == [0, 1]
        assert t_model.tolist() == [stage.window[0]]
        tau, t_model = euler_times(stage, 2)
        assert tau.tolist() == [0, 0.999, 1]
        assert t_model[0] == stage.window[0]
        assert abs(t_model[1].item() - stage.window[1]) <= 1000 * 2 * ULP


def test_the_last_euler_step_is_short() -> None:
    for steps in (2, 10, 30, 1000):
        tau, _ = euler_times(make_stages(4)[3], steps)
        assert abs((tau[-1] - tau[-2]).item() - 0.001) <= 2 * ULP


def test_shift_moves_interior_points_towards_the_noise() -> None:
    # tau / (s + (1 - s) tau) at 0.4995 for s = 3: 0.4995 / (3 - 0.999) = 0.24962518740629685...
    stage = make_stages(4)[1]
    tau, t_model = euler_times(stage, 3, shift=3.0)
    assert abs(tau[1].item() - float(Fraction(4995, 10000) / (3 - 2 * Fraction(4995, 10000)))) <= 8 * ULP
    plain_tau, plain_model = euler_times(stage, 3)
    assert tau[0] == plain_tau[0] == 0
    assert tau[1] < plain_tau[1]
    assert t_model[1] < plain_model[1]


@pytest.mark.parametrize("scale", [1.0, 1.5, 2.4, 4.0, 0.0])
def test_stagewise_guidance_of_four_stages_is_the_published_table(scale: float) -> None:
    weights = guidance_weights(scale, 4)
    assert weights[0] == 1.0
    for weight, share in zip(weights, (Fraction(0), Fraction(1, 6), Fraction(2, 3), Fraction(1)), strict=True):
        exact = 1 + (Fraction(scale) - 1) * share
        assert abs(Fraction(weight) - exact) <= 8 * ULP * max(1, abs(scale))


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5, 7])
def test_stagewise_guidance_of_other_cascades(num_stages: int) -> None:
    weights = guidance_weights(2.4, num_stages)
    assert len(weights) == num_stages
    assert abs(weights[-1] - 2.4) <= 4 * ULP
    if num_stages > 1:
        assert weights[0] == 1.0
        assert all(low < high for low, high in pairwise(weights))
    # On the piecewise-linear curve through the published points.
    curve = np.interp(np.linspace(0, 3, num_stages), range(4), (0, 1 / 6, 2 / 3, 1)) if num_stages > 1 else [1.0]
    assert np.abs(np.array(weights) - (1 + 1.4 * np.asarray(curve))).max() <= 16 * ULP


def test_constant_guidance() -> None:
    assert guidance_weights(4.0, 3, "constant") == [4.0, 4.0, 4.0]
