"""Dopri5's steps where a norm is zero or a ratio is one: those of the reference, and those of torchdiffeq's rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torchdiffeq import odeint

from pixelflow_engine.reference import solvers as reference
from pixelflow_engine.solvers import AdaptiveState, ErrorNorm, Tolerance, integrate_adaptive
from pixelflow_engine.tableaus import DOPRI5
from pixelflow_kernels.ode_step import ARRIVED
from support.reference_models import normal, seeded

F32, F64 = torch.float32, torch.float64
NORMS: tuple[ErrorNorm, ...] = ("image", "batch")
Field = Callable[[Tensor, Tensor], Tensor]
Call = tuple[Tensor, Tensor]


def zero(x: Tensor, tau: Tensor) -> Tensor:
    return torch.zeros_like(x)


def one(x: Tensor, tau: Tensor) -> Tensor:
    return torch.ones_like(x)


def tiny(x: Tensor, tau: Tensor) -> Tensor:
    return torch.full_like(x, 1e-12)


def rooted(x: Tensor, tau: Tensor) -> Tensor:
    """The same in every pixel, and not smooth: the error of a first step is no rounding."""
    return (1 + tau.sqrt()).to(x.dtype)[:, None, None, None] * torch.ones_like(x)


def turning(x: Tensor, tau: Tensor) -> Tensor:
    return torch.sin(9 * tau).to(x.dtype)[:, None, None, None] - x


def first_still(x: Tensor, tau: Tensor) -> Tensor:
    """Zero for the first image, not for the others."""
    v = turning(x, tau)
    v[0] = 0
    return v


FIELDS = {f.__name__: f for f in (zero, one, tiny, rooted, turning, first_still)}


def zeros(dtype: torch.dtype) -> Tensor:
    return torch.zeros(3, 2, 4, 4, dtype=dtype)


def small(dtype: torch.dtype) -> Tensor:
    """Norms on both sides of the 1e-5 below which a state counts as zero, where atol is 1e-6."""
    return torch.tensor([5e-12, 2e-11, 5e-11], dtype=dtype)[:, None, None, None].expand(3, 2, 4, 4).clone()


def first_zero(dtype: torch.dtype) -> Tensor:
    """Zero for the first image, not for the others."""
    x = normals(dtype)
    x[0] = 0
    return x


def normals(dtype: torch.dtype) -> Tensor:
    return normal((3, 2, 4, 4), seeded(40), dtype)


STARTS = {f.__name__: f for f in (zeros, small, first_zero, normals)}


def recorded(field: Field) -> tuple[Field, list[Call]]:
    calls: list[Call] = []

    def call(x: Tensor, tau: Tensor) -> Tensor:
        calls.append((x.clone(), tau.clone()))
        return field(x, tau)

    return call, calls


@dataclass(frozen=True)
class Ran:
    """What the engine's integration did."""

    end: AdaptiveState
    attempts: list[AdaptiveState]
    calls: list[Call]


def ran(field: Field, x: Tensor, tolerance: Tolerance) -> Ran:
    call, calls = recorded(field)
    attempts: list[AdaptiveState] = []
    return Ran(integrate_adaptive(call, x, DOPRI5, tolerance, attempts.append), attempts, calls)


def assert_same_calls(calls: list[Call], expected: list[Call]) -> None:
    assert len(calls) == len(expected)
    for i, ((x, tau), (y, time)) in enumerate(zip(calls, expected, strict=True)):
        assert torch.equal(tau, time), f"call {i}: {tau.tolist()}, expected {time.tolist()}"
        assert torch.equal(x, y), f"call {i}"


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", FIELDS)
def test_every_call_and_decision_is_the_references(name: str, start: str, norm: ErrorNorm, dtype: torch.dtype) -> None:
    """Bit for bit, as both add up in one order."""
    x = STARTS[start](dtype)
    got = ran(FIELDS[name], x, Tolerance(error_norm=norm))
    call, calls = recorded(FIELDS[name])
    expected = reference.dopri5(call, x, error_norm=norm)
    assert (got.end.status == ARRIVED).all()
    assert torch.equal(got.end.x, expected.x)
    assert torch.equal(got.end.accepted, expected.accepted)
    assert torch.equal(got.end.rejected, expected.rejected)
    assert_same_calls(got.calls, calls)


def tenfold(first: float) -> list[float]:
    """The times of steps each ten times as long as the one before, up to 1."""
    tau, h, times = 0.0, first, []
    while tau < 1:
        h = min(h, 1 - tau)
        tau = 1.0 if h >= 1 - tau else tau + h
        times.append(tau)
        h *= 10
    return times


STEPS = {
    # Nothing moves: max(1e-6, 1e-3 of the probe's 1e-6); every error is zero, so every step is ten times the last.
    "zero field": (zero, normals, 1e-6, 7),
    "zero field and state": (zero, zeros, 1e-6, 7),
    # The probe is 1e-6, and the first step a hundred times that; the error is what the coefficients' sum is off zero.
    "zero state": (one, zeros, 100 * 1e-6, 5),
}


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("case", STEPS)
def test_the_steps_of_nothing_are_in_closed_form(case: str, norm: ErrorNorm, dtype: torch.dtype) -> None:
    """By the rule of Hairer and torchdiffeq; torchdiffeq, told to land on 1, calls the field as often."""
    field, start, first, count = STEPS[case]
    times = tenfold(first)
    assert len(times) == count
    x = start(dtype)
    got = ran(field, x, Tolerance(error_norm=norm))
    assert [state.tau.tolist() for state in got.attempts] == [[tau] * len(x) for tau in times]
    assert got.end.accepted.tolist() == [count] * len(x)
    assert got.end.rejected.tolist() == [0] * len(x)
    if field is zero:
        assert torch.equal(got.end.x, x)

    asked: list[float] = []

    def theirs(tau: Tensor, y: Tensor) -> Tensor:
        asked.append(tau.item())
        return field(y, tau.expand(len(y)))

    odeint(
        theirs, x, torch.linspace(0, 1, 2, dtype=F64), method="dopri5", rtol=1e-3, atol=1e-6,
        options={"step_t": torch.ones(1, dtype=F64)},
    )  # fmt: skip
    assert len(asked) == len(got.calls) == 2 + 6 * count


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("norm", NORMS)
def test_a_step_whose_error_is_the_tolerance_is_accepted(norm: ErrorNorm, dtype: torch.dtype) -> None:
    """With rtol 0 and atol the error itself, the ratio is 1 exactly; with an atol one ulp less it is above 1.

    From a zero state the first step is a hundred times a probe of 1e-6, whatever atol is. torchdiffeq, too, accepts a
    ratio of 1, after which the next step is 0.9 of this one: only below 1 a step must not shrink.
    """
    length = 100 * 1e-6
    x, h = torch.zeros(2, 1, 2, 2, dtype=dtype), torch.full((2,), length, dtype=F64)
    slopes = [rooted(x, node * h) for node in reference.NODES]
    error = reference.combine(slopes, reference.ERROR, h).abs()
    assert (error == error[0, 0, 0, 0]).all()
    exact = error[0, 0, 0, 0]
    less = torch.nextafter(exact, torch.zeros_like(exact))
    for atol, accepted in ((exact.item(), 1), (less.item(), 0)):
        got = ran(rooted, x, Tolerance(rtol=0.0, atol=atol, error_norm=norm))
        first = got.attempts[0]
        assert got.calls[6][1].tolist() == h.tolist()
        assert first.accepted.tolist() == [accepted] * 2
        assert first.rejected.tolist() == [1 - accepted] * 2
        assert first.tau.tolist() == [length * accepted] * 2
        if accepted:
            assert first.step.tolist() == [length * 0.9] * 2
        call, calls = recorded(rooted)
        expected = reference.dopri5(call, x, 0.0, atol, norm)
        assert torch.equal(got.end.x, expected.x)
        assert torch.equal(got.end.accepted, expected.accepted)
        assert torch.equal(got.end.rejected, expected.rejected)
        assert_same_calls(got.calls, calls)
