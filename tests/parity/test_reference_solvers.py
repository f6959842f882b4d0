"""The reference solvers: the tableau in exact fractions, closed forms, torchdiffeq, and where the field is called."""

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor
from torchdiffeq import odeint

from pixelflow_engine.reference import dopri5, euler_times, make_stages
from pixelflow_engine.reference.solvers import COUPLING, ERROR, NODES, euler_step
from support.reference_models import normal, seeded

Field = Callable[[Tensor, Tensor], Tensor]
U64, U32 = 2.0**-53, 2.0**-24

# The tableau as fractions. Every denominator is below 200000, and two such fractions differ by more than 2e-11: each
# float64 names one of them. The error coefficients are differences that cancel, so they are known to an ulp of 1.
A = [[Fraction(a).limit_denominator(200_000) for a in row] for row in COUPLING]
B = [*A[6], Fraction(0)]
E = [Fraction(e).limit_denominator(200_000) for e in ERROR]
C_NODES = [Fraction(c).limit_denominator(200_000) for c in NODES]

Tree = tuple["Tree", ...]


def rooted_trees(order: int) -> list[Tree]:
    """All rooted trees with ``order`` vertices; a tree is the sorted tuple of its root's subtrees."""

    def forests(vertices: int, largest: int) -> list[Tree]:
        if vertices == 0:
            return [()]
        found = []
        for size in range(min(vertices, largest), 0, -1):
            for tree in rooted_trees(size):
                found += [tuple(sorted((tree, *rest))) for rest in forests(vertices - size, size)]
        return found

    return sorted(set(forests(order - 1, order - 1)))


def size(tree: Tree) -> int:
    return 1 + sum(size(child) for child in tree)


def density(tree: Tree) -> int:
    return size(tree) * math.prod(density(child) for child in tree)


def elementary_weight(tree: Tree, stage: int) -> Fraction:
    product = Fraction(1)
    for child in tree:
        product *= sum((A[stage][j] * elementary_weight(child, j) for j in range(len(A[stage]))), Fraction(0))
    return product


def condition(weights: list[Fraction], tree: Tree) -> Fraction:
    """``sum_i b_i Phi_i(tree) - 1 / density(tree)``: zero where the method meets the tree's order condition."""
    return sum((b * elementary_weight(tree, i) for i, b in enumerate(weights)), -Fraction(1, density(tree)))


def test_the_tableau_is_made_of_small_fractions() -> None:
    for fraction, value in zip(itertools.chain(*A, C_NODES), itertools.chain(*COUPLING, NODES), strict=True):
        assert float(fraction) == value
    for fraction, value in zip(E, ERROR, strict=True):
        assert abs(float(fraction) - value) <= 2 * U64
    assert [len(row) for row in A] == list(range(7))
    assert [sum(row, Fraction(0)) for row in A] == C_NODES
    assert [str(c) for c in C_NODES] == ["0", "1/5", "3/10", "4/5", "8/9", "1", "1"]


def test_order_five_and_the_embedded_order_four() -> None:
    assert [len(rooted_trees(order)) for order in range(1, 7)] == [1, 1, 2, 4, 9, 20]
    embedded = [b - e for b, e in zip(B, E, strict=True)]
    for order in range(1, 6):
        for tree in rooted_trees(order):
            assert condition(B, tree) == 0, f"order {order}: {tree}"
            if order < 5:
                assert condition(embedded, tree) == 0, f"embedded, order {order}: {tree}"
    assert any(condition(B, tree) for tree in rooted_trees(6))
    assert any(condition(embedded, tree) for tree in rooted_trees(5))
    assert sum(E) == 0


def test_error_coefficients_are_shampines() -> None:
    # Not the classic pair's, whose embedded weights start with 5179/57600 and whose last error weight is -1/40.
    embedded = [b - e for b, e in zip(B, E, strict=True)]
    published = [(1951, 21600), (0, 1), (22642, 50085), (451, 720), (-12231, 42400), (649, 6300), (1, 60)]
    assert embedded == [Fraction(*pair) for pair in published]


def test_euler_step_is_a_product_and_a_sum_in_float32() -> None:
    generator = seeded(1)
    x, v = normal((2, 3, 4, 4), generator, torch.float32), normal((2, 3, 4, 4), generator, torch.float32)
    tau, _ = euler_times(make_stages(4)[2], 30, 3.0)
    for i in (0, 7, 29):
        length = np.float32(tau[i + 1].item()) - np.float32(tau[i].item())
        expected = x.numpy() + length * v.numpy()
        assert expected.dtype == np.float32
        assert np.array_equal(euler_step(x, v, tau[i], tau[i + 1]).numpy(), expected)


@pytest.mark.parametrize("rate", [-3.0, 0.7])
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_euler_on_a_linear_field_is_a_product(rate: float, steps: int) -> None:
    tau, _ = euler_times(make_stages(4)[0], steps)
    x = normal((1, 3, 4, 4), seeded(2), torch.float32)
    y = x
    for i in range(steps):
        y = euler_step(y, rate * y, tau[i], tau[i + 1])
    exact = x.double() * math.prod(1 + rate * h for h in tau.diff().tolist())
    # A step rounds its length (2u of a time up to 1), twice the product and the sum.
    assert (y - exact).abs().max() <= x.abs().max() * math.exp(abs(rate)) * steps * (4 + 2 * abs(rate)) * U32


def scalar_field(values: Callable[[float], float]) -> Field:
    """``v = values(tau) x``, image by image."""
    return lambda x, tau: torch.stack([values(t) * image for t, image in zip(tau.tolist(), x, strict=True)])


@pytest.mark.parametrize("rtol", [1e-3, 1e-5, 1e-7, 1e-9])
def test_dopri5_error_follows_the_tolerance(rtol: float) -> None:
    """``v = cos(2 pi tau) x`` comes back to its start at tau = 1.

    A field that is the same for every pixel makes the same relative error in every pixel, so the norm of an accepted
    step's error bounds each pixel's: ``rtol |x|`` with |x| up to ``e^(1/2pi) |x0|``. Later steps stretch it by
    ``e^(2/pi)`` at most. The estimate is that of the fourth-order solution, an upper estimate of the fifth's.
    """
    x = normal((2, 3, 4, 4), seeded(3))
    result = dopri5(scalar_field(lambda t: math.cos(2 * math.pi * t)), x, rtol, 1e-6 * rtol)
    steps = result.accepted.max().item()
    bound = steps * (rtol * x.abs() * math.exp(1 / (2 * math.pi)) + 1e-6 * rtol) * math.exp(2 / math.pi)
    assert ((result.x - x).abs() <= bound).all()
    assert result.evaluations == 2 + 6 * (result.accepted + result.rejected).max().item()


FREE_STEPS = (1e-4, 1e-3, 1e-2, 1e-1, 1 - 0.1111)
"""Steps under tolerances that accept everything: ten times the last, from a hundred times the smallest probe."""


def test_a_linear_field_is_multiplied_by_the_stability_polynomial() -> None:
    """A step h of ``x' = a x`` multiplies by ``sum_(n<6) z^n / n! + z^6 / 600``, z = a h, for Dormand-Prince."""
    x = normal((1, 3, 4, 4), seeded(4))
    for rate in (-2.0, 0.5, 3.0):
        result = dopri5(lambda y, tau, rate=rate: rate * y, x, 1e6, 1e6)
        assert (result.accepted.item(), result.rejected.item()) == (5, 0)
        factor = 1.0
        for z in (rate * h for h in FREE_STEPS):
            factor *= sum(z**n / math.factorial(n) for n in range(6)) + z**6 / 600
        # Slopes up to 3^6 of x in a step, some fifty roundings.
        assert (result.x - factor * x).abs().max() <= 50 * math.exp(abs(rate)) * x.abs().max() * U64


def test_the_error_of_one_step_is_of_sixth_order_in_its_length() -> None:
    """Halving the span of a step divides its error by 2^6 or more. The last free step is nine tenths of everything."""
    x = 1 + 0.5 * normal((1, 1, 2, 2), seeded(4)).sigmoid()
    errors = []
    for span in (0.2, 0.1, 0.05):
        taus: list[float] = []

        def field(y: Tensor, tau: Tensor, span: float = span, taus: list[float] = taus) -> Tensor:
            taus.append(tau.item())  # x' = cos(t) x (1 - x), logistic in sin(t)
            return span * math.cos(span * tau.item()) * y * (1 - y)

        result = dopri5(field, x, 1e6, 1e6)
        assert np.allclose(taus[7::6], np.cumsum(FREE_STEPS), rtol=1e-12, atol=0)
        growth = math.exp(math.sin(span))
        errors.append((result.x - x * growth / (1 + x * (growth - 1))).abs().max().item())
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(5.9 <= order <= 7 for order in orders), orders


# Fields for comparisons with torchdiffeq. A field has a Lipschitz constant of a few, but for the stiff one.


def random_network(dtype: torch.dtype) -> Field:
    generator = seeded(5)
    w1, w2 = normal((48, 64), generator) / 48**0.5, 2 * normal((64, 48), generator) / 8
    bias, drift = normal((64,), generator), 3 * normal((64,), generator)
    w1, w2, bias, drift = (weight.to(dtype) for weight in (w1, w2, bias, drift))

    def field(x: Tensor, tau: Tensor) -> Tensor:
        hidden = torch.tanh(x.flatten(1) @ w1 + bias + tau[:, None].to(dtype) * drift)
        return (hidden @ w2).view_as(x)

    return field


def stiff_linear(dtype: torch.dtype) -> Field:
    rates = -torch.logspace(0, 1.7, 48, dtype=dtype).reshape(3, 4, 4)
    return lambda x, tau: rates * (x - torch.cos(3 * tau.to(dtype))[:, None, None, None])


def driven_cubic(dtype: torch.dtype) -> Field:
    return lambda x, tau: torch.sin(20 * tau.to(dtype))[:, None, None, None] * x - x**3


FIELDS = {"random network": random_network, "stiff linear": stiff_linear, "driven cubic": driven_cubic}
Call = tuple[float, Tensor]


def ours(field: Field, x: Tensor, rtol: float, **options: str) -> tuple[Tensor, list[Call]]:
    calls: list[Call] = []

    def recorded(y: Tensor, tau: Tensor) -> Tensor:
        assert tau.dtype == torch.float64
        assert (tau == tau[0]).all()
        calls.append((tau[0].item(), y))
        return field(y, tau)

    result = dopri5(recorded, x, rtol, 1e-3 * rtol, **options)
    assert result.evaluations == len(calls)
    return result.x, calls


def torchdiffeqs(field: Field, x: Tensor, rtol: float, *, land: bool, points: int = 2) -> tuple[Tensor, list[Call]]:
    calls: list[Call] = []

    def recorded(tau: Tensor, y: Tensor) -> Tensor:
        calls.append((tau.item(), y))
        return field(y, tau.expand(len(y)))

    options = {"step_t": torch.ones(1)} if land else {}
    grid = torch.linspace(0, 1, points)
    x = odeint(recorded, x, grid, method="dopri5", rtol=rtol, atol=1e-3 * rtol, options=options)[-1]
    return x, calls


def first_difference(a: list[Call], b: list[Call], tolerance: float) -> int:
    """Index of the first call whose time or state differs by more than the tolerance."""
    for i, ((s, x), (t, y)) in enumerate(zip(a, b, strict=False)):
        if abs(s - t) > tolerance or (x - y).abs().max() > tolerance:
            return i
    return min(len(a), len(b))


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("rtol", [1e-3, 1e-5])
@pytest.mark.parametrize("images", [1, 3])
def test_dopri5_is_torchdiffeqs_when_that_lands_too(name: str, rtol: float, images: int) -> None:
    """Told to end a step at 1, torchdiffeq makes the same calls at the same times and states, and as many.

    Sums in another order differ by roundings; an error estimate, a difference that cancels to ``rtol``, differs by
    u / rtol relative and so does a step's length, by less after the fifth root; steps add up. torchdiffeq calls the
    field one ulp before a step's end.
    """
    field = FIELDS[name](torch.float64)
    x = normal((images, 3, 4, 4), seeded(6))
    y, calls = ours(field, x, rtol, error_norm="batch")
    z, theirs = torchdiffeqs(field, x, rtol, land=True)
    assert len(calls) == len(theirs)
    tolerance = 1000 * U64 / rtol
    assert first_difference(calls, theirs, tolerance) == len(calls)
    assert (y - z).abs().max() <= tolerance
    assert calls[-1][0] == 1.0


@pytest.mark.parametrize("name", FIELDS)
def test_per_image_control_is_torchdiffeq_image_by_image(name: str) -> None:
    """The default norm integrates each image of a batch as torchdiffeq integrates it alone."""
    field = FIELDS[name](torch.float64)
    x = normal((4, 3, 4, 4), seeded(7)) * torch.tensor([0.01, 0.5, 1.0, 2.0])[:, None, None, None]
    result = dopri5(field, x, 1e-4, 1e-7)
    attempts = []
    for i in range(4):
        z, theirs = torchdiffeqs(field, x[i : i + 1], 1e-4, land=True)
        assert (result.x[i] - z).abs().max() <= 1000 * U64 / 1e-4
        attempts.append((len(theirs) - 2) / 6)
    assert (result.accepted + result.rejected).tolist() == attempts
    assert result.evaluations == 2 + 6 * max(attempts)
    assert len(set(attempts)) > 1, "the images are too alike for the test to mean anything"


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("rtol", [1e-3, 1e-5])
def test_dopri5_against_torchdiffeq_that_steps_beyond_and_interpolates(name: str, rtol: float) -> None:
    """As the public code calls it, on ``linspace(0, 1, n)``, torchdiffeq's last step goes beyond 1.

    Every call before the first attempt that would cross 1 is the same. From there on ours is clipped, so its error is
    smaller: torchdiffeq needs as many attempts or a few more (up to three were seen on some hundred problems; the
    numbers here are those of these fields). The grid's inner points cost nothing.
    """
    field = FIELDS[name](torch.float64)
    x = normal((2, 3, 4, 4), seeded(8))
    y, calls = ours(field, x, rtol, error_norm="batch")
    z, theirs = torchdiffeqs(field, x, rtol, land=False, points=30)
    _, sparse = torchdiffeqs(field, x, rtol, land=False, points=2)
    assert first_difference(theirs, sparse, 0) == len(theirs) == len(sparse)
    crossing = next(i for i in range(2, len(calls), 6) if calls[i + 4][0] == 1.0)
    assert first_difference(calls, theirs, 1000 * U64 / rtol) == crossing
    extra, remainder = divmod(len(theirs) - len(calls), 6)
    assert remainder == 0
    assert 0 <= extra <= 3
    assert max(t for t, _ in calls) == 1.0 < max(t for t, _ in theirs)
    # Both are solutions to within the tolerance: in its norm each accepted step errs by at most 1, and the fields
    # stretch an error by less than e^2 (the network; the others contract).
    truth, _ = torchdiffeqs(field, x, 1e-10, land=True)
    scale = 1e-3 * rtol + rtol * truth.abs()
    for solution in (y, z):
        assert ((solution - truth) / scale).pow(2).mean().sqrt() <= math.e**2 * (len(calls) - 2) / 6


@pytest.mark.parametrize("name", FIELDS)
def test_dopri5_in_float32_is_torchdiffeqs(name: str) -> None:
    # torchdiffeq also rounds its times to float32. At rtol 1e-3 an error estimate is then known to u / rtol = 6e-5,
    # the fifth root of which moves step lengths by 1e-5; a step's end moves the state by the velocity times that.
    field = FIELDS[name](torch.float32)
    x = normal((2, 3, 4, 4), seeded(9), torch.float32)
    y, calls = ours(field, x, 1e-3, error_norm="batch")
    z, theirs = torchdiffeqs(field, x, 1e-3, land=True)
    assert y.dtype == torch.float32
    assert all(state.dtype == torch.float32 for _, state in calls)
    assert len(calls) == len(theirs)
    assert (y - z).abs().max() <= 1e-4


def test_the_times_and_states_of_every_call() -> None:
    """Two calls for the first step's length, then six an attempt, at ``tau + c_i h`` and ``x + h sum_j a_ij k_j``."""
    field = driven_cubic(torch.float64)
    x = normal((1, 3, 4, 4), seeded(11))
    calls: list[tuple[float, np.ndarray, np.ndarray]] = []

    def recorded(y: Tensor, tau: Tensor) -> Tensor:
        assert tau.shape == (1,)
        v = field(y, tau)
        calls.append((tau.item(), y.numpy(), v.numpy()))
        return v

    result = dopri5(recorded, x, 1e-5, 1e-8)
    assert calls[0][0] == 0
    assert np.array_equal(calls[0][1], x.numpy())
    probe_tau, probe_x, _ = calls[1]
    assert np.abs(probe_x - (calls[0][1] + probe_tau * calls[0][2])).max() <= 4 * U64
    tau, (_, start, slope) = 0.0, calls[0]
    accepted = rejected = 0
    for attempt in range(2, len(calls), 6):
        six = calls[attempt : attempt + 6]
        h = 5 * (six[0][0] - tau)  # the first of them is at tau + h / 5
        slopes = [slope]
        for i, (at, state, v) in enumerate(six, start=1):
            assert abs(at - (tau + float(C_NODES[i]) * h)) <= 16 * U64
            expected = start + h * sum(float(a) * k for a, k in zip(A[i], slopes, strict=True))
            assert np.abs(state - expected).max() <= 64 * U64 * (1 + h * 50)
            slopes.append(v)
        assert six[4][0] == six[5][0]  # both at the step's end, exactly
        error = h * sum(float(e) * k for e, k in zip(E, slopes, strict=True))
        scale = 1e-8 + 1e-5 * np.maximum(np.abs(start), np.abs(six[5][1]))
        if np.sqrt(((error / scale) ** 2).mean()) <= 1:
            tau, start, slope = six[5]  # first same as last: the slope is not computed again
            accepted += 1
        else:
            rejected += 1
    assert tau == 1.0
    assert np.array_equal(result.x.numpy(), start)
    assert (result.accepted.item(), result.rejected.item()) == (accepted, rejected)
    assert rejected > 0, "no step was rejected: the test does not see what follows a rejection"


def test_dopri5_lands_on_one_exactly_and_never_beyond() -> None:
    taus = []

    def field(x: Tensor, tau: Tensor) -> Tensor:
        taus.append(tau)
        rates = torch.tensor([0.0, -1.0, 3.0, -40.0], dtype=torch.float64)
        return rates[:, None, None, None] * x + torch.sin(7 * tau)[:, None, None, None]

    result = dopri5(field, normal((4, 1, 2, 2), seeded(11)), 1e-6, 1e-9)
    stacked = torch.stack(taus)
    assert stacked.max() == 1
    assert (stacked >= 0).all()
    assert (stacked[-1] == 1).all()
    assert result.accepted.max() > result.accepted.min()


def polynomial_field(x: Tensor, tau: Tensor) -> Tensor:
    """Products and sums alone, pixel by pixel: an image's velocity cannot depend on its place in the batch."""
    t = tau.to(x.dtype)[:, None, None, None]
    return (t - 0.3) * x - 2 * t * x * x * x + (1 - t) * 0.5


def test_an_image_does_not_feel_its_batch_mates() -> None:
    generator = seeded(12)
    x = normal((1, 3, 8, 8), generator, torch.float32)
    gentle, wild = (scale * normal((1, 3, 8, 8), generator, torch.float32) for scale in (0.1, 6.0))
    alone = dopri5(polynomial_field, x)
    for batch, place in (((x, gentle), 0), ((x, wild), 0), ((wild, x), 1), ((wild, gentle, x, wild), 2)):
        together = dopri5(polynomial_field, torch.cat(batch))
        assert torch.equal(together.x[place], alone.x[0])
        assert together.accepted[place] == alone.accepted[0]
        assert together.rejected[place] == alone.rejected[0]
    assert dopri5(polynomial_field, torch.cat([x, wild])).accepted.diff() != 0


def test_a_batch_wide_norm_makes_images_feel_each_other() -> None:
    generator = seeded(13)
    x, wild = normal((1, 3, 8, 8), generator, torch.float32), 6 * normal((1, 3, 8, 8), generator, torch.float32)
    alone = dopri5(polynomial_field, x, error_norm="batch")
    together = dopri5(polynomial_field, torch.cat([x, wild]), error_norm="batch")
    assert not torch.equal(together.x[0], alone.x[0])
    assert (together.accepted == together.accepted[0]).all()
    # Of copies of one image the norm over the batch is that of the image.
    copies = dopri5(polynomial_field, torch.cat([x, x, x, x]), error_norm="batch")
    assert torch.equal(copies.x[2], alone.x[0])


@pytest.mark.parametrize("error_norm", ["image", "batch"])
def test_a_zero_field_leaves_the_state_alone(error_norm: str) -> None:
    x = normal((2, 3, 4, 4), seeded(14), torch.float32)
    result = dopri5(lambda y, tau: torch.zeros_like(y), x, error_norm=error_norm)
    assert torch.equal(result.x, x)
    assert not result.rejected.any()


@pytest.mark.parametrize("error_norm", ["image", "batch"])
def test_a_zero_state_is_no_trouble(error_norm: str) -> None:
    result = dopri5(lambda y, tau: torch.ones_like(y), torch.zeros(2, 1, 2, 2), error_norm=error_norm)
    assert (result.x - 1).abs().max() <= 32 * U32


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("when", [0.0, 0.4])
@pytest.mark.parametrize("error_norm", ["image", "batch"])
def test_a_velocity_that_is_not_finite_raises(bad: float, when: float, error_norm: str) -> None:
    def field(x: Tensor, tau: Tensor) -> Tensor:
        v = torch.ones_like(x)
        v[1, 0, 0, 1] = torch.where(tau[1] >= when, bad, 1.0)
        return v

    with pytest.raises(RuntimeError, match="not finite") as caught:
        dopri5(field, normal((3, 1, 2, 2), seeded(15)), error_norm=error_norm)
    if error_norm == "image":
        assert "[1]" in str(caught.value)


def test_attempts_are_counted_and_limited() -> None:
    field = random_network(torch.float64)
    x = normal((1, 3, 4, 4), seeded(16))
    result = dopri5(field, x, 1e-6, 1e-9)
    needed = (result.accepted + result.rejected).item()
    with pytest.raises(RuntimeError, match=f"{needed - 1} attempts"):
        dopri5(field, x, 1e-6, 1e-9, max_attempts=needed - 1)
    assert torch.equal(dopri5(field, x, 1e-6, 1e-9, max_attempts=needed).x, result.x)


def test_a_step_shrinks_to_a_fifth_at_most() -> None:
    """A failed attempt is followed by one of ``h max(0.2, 0.9 ratio^(-1/5))``, 0.2 in float64."""
    taus = []

    def field(x: Tensor, tau: Tensor) -> Tensor:
        taus.append(tau.item())
        return torch.where(tau[:, None, None, None] > 0.3, 1e9, 1.0).to(x) * torch.ones_like(x)

    with pytest.raises(RuntimeError, match="attempts did not reach"):
        dopri5(field, torch.ones(1, 1, 2, 2, dtype=torch.float64), 1e-9, 1e-9, max_attempts=40)
    starts, lengths, failed = 0.0, [], []
    for attempt in range(2, len(taus), 6):
        lengths.append(taus[attempt + 4] - starts)
        failed.append(taus[attempt + 4] > 0.3)
        if not failed[-1]:
            starts = taus[attempt + 4]
    ratios = [b / a for a, b, fail in zip(lengths, lengths[1:], failed, strict=False) if fail]
    assert ratios
    assert max(abs(ratio - 0.2) for ratio in ratios) <= 1e-9
