"""Integration of ``dx/dtau = v(x, tau)`` over a stage, tau from 0 to 1, with any velocity callable.

Sums over slopes run left to right, with each product and each sum rounded separately, so that a fused kernel can
reproduce them bit for bit. Step control: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, section
II.4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pixelflow_kernels.ode_step import ARRIVED, MAX_ATTEMPTS, NONFINITE, RUNNING, UNDERFLOW

from .ranges import named
from .tableaus import EmbeddedTableau, Tableau, TwoStep

Velocity = Callable[[Tensor, Tensor], Tensor]
"""``(x [B, c, h, w], tau [B] float64) -> velocity [B, c, h, w]``."""

ErrorNorm = Literal["image", "batch"]

SAFETY, SMALLEST_FACTOR, LARGEST_FACTOR = 0.9, 0.2, 10.0


def runge_kutta_step(
    x: Tensor, slope: Tensor, field: Callable[[Tensor, int], Tensor], tableau: Tableau, h: float
) -> Tensor:
    """One step of an explicit Runge-Kutta method.

    Args:
        x: the state, ``[B, c, h, w]``.
        slope: the velocity at ``x``.
        field: ``(state, i) -> velocity``: slope ``i`` of the tableau, counted from 0, for i of at least 1; it is taken
            at ``tableau.nodes[i]`` of the step.
        tableau: the method.
        h: length of the step.
    """
    step = torch.full((x.shape[0],), h, dtype=torch.float64, device=x.device)
    slopes = [slope]
    for i, row in enumerate(tableau.coupling[1:-1], 1):
        slopes.append(field(x + _weighted_sum(slopes, row, step), i))
    return x + _weighted_sum(slopes, tableau.coupling[-1], step)


def two_step_update(
    x: Tensor, velocity: Tensor, previous: Tensor, method: TwoStep, h: float, h_before: float
) -> Tensor:
    """One step of a two-step method, as two updates, the new velocity's first, as in the fused implementation."""
    forward, back = two_step_lengths(method, h, h_before)
    return x + _as(forward, x) * velocity + _as(back, x) * previous


def two_step_lengths(method: TwoStep, h: float, h_before: float) -> tuple[float, float]:
    """The factors of the new and of the previous velocity.

    Rounding times to float32 may give a step length 0. The change of the slope over such a step is unknown, so the step
    after it is an Euler step.
    """
    if h_before == 0:
        return h, 0.0
    ratio = h / h_before
    new, old = (h * (constant + linear * ratio) for constant, linear in method.weights)
    return new, old


def step_length(tau: float, tau_next: float) -> float:
    """The step between two times, which are first rounded to float32, as in the published code."""
    return float(np.float32(tau_next) - np.float32(tau))


def euler_update(x: Tensor, velocity: Tensor, tau: float, tau_next: float) -> Tensor:
    """``x + (tau_next - tau) * velocity`` in at least float32; both times are first rounded to float32."""
    high = x.to(torch.promote_types(x.dtype, torch.float32))
    return high + _as(step_length(tau, tau_next), high) * velocity


def _as(number: float, x: Tensor) -> Tensor:
    return torch.full((), number, dtype=x.dtype, device=x.device)  # filled there: no copy to wait for


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """Error control of adaptive steps.

    Attributes:
        rtol, atol: a step is accepted when the root mean square of ``error / (atol + rtol * max(|x0|, |x1|))`` is at
            most 1.
        error_norm: ``image``: the norm of each image, which then has its own step sizes, independent of its batch
            mates. ``batch``: the norm of the whole batch, which shares its step sizes, as in torchdiffeq.
        max_attempts: maximum number of steps tried, accepted or not.
    """

    rtol: float = 1e-3
    atol: float = 1e-6
    error_norm: ErrorNorm = "image"
    max_attempts: int = 1000


@dataclass(frozen=True, eq=False, slots=True)
class AdaptiveState:
    """An adaptive integration between two attempts.

    Attributes:
        x: the state, ``[B, c, h, w]``.
        slope: the velocity at ``x``.
        tau: time that each image has reached, ``[B]`` float64; 1 once it has arrived.
        step: the step that each image will try next, ``[B]`` float64.
        accepted, rejected: number of attempts so far, ``[B]`` int64.
        status: ``[B]`` int32, one of ``pixelflow_kernels.ode_step``'s RUNNING, ARRIVED, MAX_ATTEMPTS, UNDERFLOW,
            NONFINITE.
    """

    x: Tensor
    slope: Tensor
    tau: Tensor
    step: Tensor
    accepted: Tensor
    rejected: Tensor
    status: Tensor


def integrate_adaptive(
    velocity: Velocity,
    x: Tensor,
    tableau: EmbeddedTableau,
    tolerance: Tolerance,
    on_attempt: Callable[[AdaptiveState], None] | None = None,
) -> AdaptiveState:
    """Integrate to tau = 1 with error control, landing on 1 exactly.

    Args:
        velocity: the field, called with one time per image.
        x: the state at tau = 0, ``[B, c, h, w]``.
        tableau: the embedded pair.
        tolerance: error control.
        on_attempt: called with the state after every attempt.

    Returns:
        the final state, in which no image is RUNNING; ``tau`` is 1 for images whose status is ARRIVED.
    """
    with named("start"):
        state = _start(velocity, x, tableau, tolerance)
    attempts = 0
    while bool((state.status == RUNNING).any()):
        with named("step", attempts):
            state = _attempt(velocity, state, tableau, tolerance)
        attempts += 1
        if on_attempt is not None:
            on_attempt(state)
    return state


def _start(velocity: Velocity, x: Tensor, tableau: EmbeddedTableau, tolerance: Tolerance) -> AdaptiveState:
    """Hairer's initial step size: small enough that an Euler step changes the slope little."""
    tau = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
    slope = velocity(x, tau)
    scale = tolerance.atol + tolerance.rtol * x.abs()
    size, speed = _rms(x / scale, tolerance), _rms(slope / scale, tolerance)
    trial = torch.where((size < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * size / speed)
    probe = velocity(x + _per_image(trial, x) * slope, trial)
    bend = _rms((probe - slope) / scale, tolerance) / trial
    largest = torch.maximum(speed, bend)
    cautious = (0.01 / largest) ** (1 / tableau.order)
    step = torch.minimum(100 * trial, torch.where(largest <= 1e-15, (trial * 1e-3).clamp(min=1e-6), cautious))
    none = torch.zeros_like(tau, dtype=torch.int64)
    status = torch.full_like(none, RUNNING, dtype=torch.int32).masked_fill_(~step.isfinite(), NONFINITE)
    return AdaptiveState(x, slope, tau, step, none, none, status)


def _attempt(velocity: Velocity, state: AdaptiveState, tableau: EmbeddedTableau, tolerance: Tolerance) -> AdaptiveState:
    """Try one step for each image that is still running; the others stay unchanged in the batch."""
    active = (state.tau < 1) & (state.status == RUNNING)
    remaining = 1 - state.tau
    h = torch.where(active, torch.minimum(state.step, remaining), 0.0)
    tau_next = torch.where(active & (state.step >= remaining), 1.0, state.tau + h)

    slopes = [state.slope]
    x_next = state.x
    for node, row in zip(tableau.nodes[1:], tableau.coupling[1:], strict=True):
        x_next = state.x + _weighted_sum(slopes, row, h)
        slopes.append(velocity(x_next, tau_next if node == 1.0 else state.tau + node * h))

    scale = tolerance.atol + tolerance.rtol * torch.maximum(state.x.abs(), x_next.abs())
    ratio = _rms(_weighted_sum(slopes, tableau.error, h) / scale, tolerance)
    lost = active & ~ratio.isfinite()
    stuck = active & ~lost & (tau_next <= state.tau)  # h is too small to change tau
    tried = active & ~lost & ~stuck
    accept = tried & (ratio <= 1)
    accepted, rejected = state.accepted + accept, state.rejected + (tried & ~accept)
    tau = torch.where(accept, tau_next, state.tau)
    status = state.status.masked_fill(tried & (accepted + rejected >= tolerance.max_attempts), MAX_ATTEMPTS)
    status = status.masked_fill(accept & (tau >= 1), ARRIVED)
    status = status.masked_fill(stuck, UNDERFLOW).masked_fill(lost, NONFINITE)
    keep = accept[:, None, None, None]
    return AdaptiveState(
        x=torch.where(keep, x_next, state.x),
        slope=torch.where(keep, slopes[-1], state.slope),
        tau=tau,
        step=torch.where(tried, _next_step(h, ratio, tableau.order), state.step),
        accepted=accepted,
        rejected=rejected,
        status=status,
    )


def _weighted_sum(slopes: Sequence[Tensor], weights: Sequence[float], h: Tensor) -> Tensor:
    """``sum_i (h w_i) k_i`` left to right, skipping zero weights.

    ``h w_i`` is computed in float64, then rounded to the slopes' dtype.
    """
    terms = [_per_image(h * w, k) * k for k, w in zip(slopes, weights, strict=True) if w != 0.0]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _next_step(h: Tensor, ratio: Tensor, order: int) -> Tensor:
    """``h * clamp(0.9 ratio^(-1/order), 0.2, 10)``; not below ``h`` where ``ratio < 1``."""
    factor = SAFETY * ratio ** (-1 / order)
    smallest = torch.full_like(ratio, SMALLEST_FACTOR).masked_fill(ratio < 1, 1.0)
    factor = torch.maximum(factor, smallest).clamp(max=LARGEST_FACTOR)
    return h * torch.where(ratio == 0, LARGEST_FACTOR, factor)


def _rms(x: Tensor, tolerance: Tolerance) -> Tensor:
    """Root mean square per image, ``[B]`` float64; for the batch-wide norm, every entry is that of the whole batch."""
    squares = (x * x).flatten(1).mean(-1).double()
    if tolerance.error_norm == "batch":
        squares = squares.mean().expand_as(squares)
    return squares.sqrt()


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    """``[B] -> [B, 1, 1, 1]`` in the dtype of ``like``."""
    return values.to(like.dtype)[:, None, None, None]
