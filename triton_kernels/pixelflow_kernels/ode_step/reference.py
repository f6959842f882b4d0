"""Reference implementation in plain PyTorch: ODE steps of a batch of images.

Shapes: ``x`` is any contiguous tensor of ``B`` images with ``n`` values each, image after image; ``slopes`` is
``[S, *x.shape]``; ``velocity`` has as many values as ``x`` or, with ``guidance``, twice as many, the null half first.
``step``, ``tau`` and the numbers that control them are float64, one per image. ``guidance`` is ``[B]`` or ``[1]``,
``tolerance`` is ``(rtol, atol)``. States are updated in their own dtype; every operation rounds separately, and sums
run from left to right. Source: arXiv 2504.07963, section 3.4; Hairer, Norsett and Wanner, Solving Ordinary Differential
Equations I, section II.4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RUNNING, ARRIVED, MAX_ATTEMPTS, UNDERFLOW, NONFINITE = range(5)  # values of ``status``
SAFETY, SMALLEST_FACTOR, LARGEST_FACTOR = 0.9, 0.2, 10.0


def guided(velocity: Tensor, guidance: Tensor | None, images: int, dtype: torch.dtype) -> Tensor:
    """Convert the velocity to ``dtype`` and, with guidance, combine its halves: ``v_null + w (v_cond - v_null)``.

    Returns:
        ``[B, n]``.
    """
    high = velocity.to(dtype)
    if guidance is None:
        return high.reshape(images, -1)
    null, conditional = high.reshape(2, images, -1)
    return null + guidance.to(dtype)[:, None] * (conditional - null)


def euler(x: Tensor, velocity: Tensor, step: Tensor, guidance: Tensor | None, images: int) -> Tensor:
    """Compute ``x + step v`` in the shape of ``x``; ``step`` is ``[B]`` or ``[1]``, rounded to the dtype of ``x``."""
    rows = x.reshape(images, -1)
    return (rows + step.to(x.dtype)[:, None] * guided(velocity, guidance, images, x.dtype)).view(x.shape)


def weighted_sum(slopes: Tensor, weights: Sequence[float], step: Tensor) -> Tensor:
    """Compute ``sum_i (step w_i) k_i`` as ``[B, n]``, skipping zero weights.

    ``step w_i`` is computed in float64 and rounded to the dtype of ``k``.
    """
    rows = slopes.reshape(slopes.shape[0], step.shape[0], -1)
    terms = [(step * w).to(k.dtype)[:, None] * k for k, w in zip(rows, weights, strict=False) if w != 0.0]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def stage_state(x: Tensor, slopes: Tensor, step: Tensor, weights: Sequence[float]) -> Tensor:
    """Compute ``x + sum_i (step w_i) k_i`` in the shape of ``x``."""
    return (x.reshape(step.shape[0], -1) + weighted_sum(slopes, weights, step)).view(x.shape)


def error_norm(
    x: Tensor,
    slopes: Tensor,
    step: Tensor,
    solution: Sequence[float],
    error: Sequence[float],
    tolerance: Tensor,
    batch_wide: bool,
) -> Tensor:
    """Compute the root mean square of ``error / (atol + rtol max(|x0|, |x1|))``: ``[B]`` float64."""
    rtol, atol = tolerance.to(x.dtype)
    rows, after = (y.reshape(step.shape[0], -1) for y in (x, stage_state(x, slopes, step, solution)))
    scale = atol + rtol * torch.maximum(rows.abs(), after.abs())
    return root_mean_square(weighted_sum(slopes, error, step) / scale, batch_wide)


def start_norms(
    x: Tensor, slope: Tensor, probe: Tensor | None, tolerance: Tensor, images: int, batch_wide: bool
) -> Tensor:
    """Norms relative to ``atol + rtol |x|``: ``[2, B]`` of ``x`` and ``slope``, or ``[1, B]`` of ``probe - slope``."""
    rtol, atol = tolerance.to(x.dtype)
    rows, slope = x.reshape(images, -1), slope.reshape(images, -1)
    scale = atol + rtol * rows.abs()
    measured = [rows, slope] if probe is None else [probe.reshape(images, -1) - slope]
    return torch.stack([root_mean_square(y / scale, batch_wide) for y in measured])


def root_mean_square(x: Tensor, batch_wide: bool) -> Tensor:
    """Root mean square of each image ``[B, n]`` as ``[B]`` float64; if ``batch_wide``, that of the batch for all."""
    squares = (x * x).mean(-1).double()
    if batch_wide:
        squares = squares.mean().expand_as(squares)
    return squares.sqrt()


def first_trial(norms: Tensor) -> Tensor:
    """Compute Hairer's trial step ``[B]`` from the norms ``[2, B]`` of state and slope."""
    size, speed = norms
    # Not torch.where: it would first fill a tensor with the Python number, which is one launch more.
    return (0.01 * size / speed).masked_fill((size < 1e-5) | (speed < 1e-5), 1e-6)


def first_step(trial: Tensor, speed: Tensor, bend: Tensor, order: int) -> Tensor:
    """Compute Hairer's first step ``[B]``; ``bend`` is the norm of the slope's change over the trial step."""
    largest = torch.maximum(speed, bend / trial)
    cautious = (0.01 / largest) ** (1 / order)
    return torch.minimum(100 * trial, torch.where(largest <= 1e-15, (trial * 1e-3).clamp(min=1e-6), cautious))


def begin_attempt(tau: Tensor, step: Tensor, status: Tensor, nodes: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return the step ``h [B]`` that each image tries, 0 if it is stopped, and the times ``[S, B]`` of the slopes."""
    active = (tau < 1) & (status == RUNNING)
    remaining = 1 - tau
    h = torch.where(active, torch.minimum(step, remaining), 0.0)
    after = torch.where(active & (step >= remaining), 1.0, tau + h)
    return h, torch.stack([after if node == 1.0 else tau + node * h for node in nodes])


def end_attempt(
    tau: Tensor,
    step: Tensor,
    status: Tensor,
    accepted: Tensor,
    rejected: Tensor,
    h: Tensor,
    after: Tensor,
    ratio: Tensor,
    order: int,
    max_attempts: int,
) -> tuple[Tensor, ...]:
    """Return ``tau, step, status, accepted, rejected, accept`` after an attempt to step to the times ``after [B]``."""
    active = (tau < 1) & (status == RUNNING)
    finite = ratio.isfinite()
    stuck = active & finite & (after <= tau)  # h is too small to change tau
    tried = active & finite & ~stuck
    accept = tried & (ratio <= 1)
    accepted, rejected = accepted + accept, rejected + (tried & ~accept)
    tau = torch.where(accept, after, tau)
    status = torch.where(tried & (accepted + rejected >= max_attempts), MAX_ATTEMPTS, status)
    status = torch.where(accept & (tau >= 1), ARRIVED, status)
    status = torch.where(stuck, UNDERFLOW, torch.where(active & ~finite, NONFINITE, status))
    return tau, torch.where(tried, next_step(h, ratio, order), step), status, accepted, rejected, accept


def next_step(h: Tensor, ratio: Tensor, order: int) -> Tensor:
    """Compute ``h clamp(0.9 ratio^(-1/order), 0.2, 10)``, but at least ``h`` if ``ratio < 1``."""
    factor = SAFETY * ratio ** (-1 / order)
    smallest = torch.full_like(ratio, SMALLEST_FACTOR).masked_fill(ratio < 1, 1.0)
    factor = torch.maximum(factor, smallest).clamp(max=LARGEST_FACTOR)
    return h * torch.where(ratio == 0, LARGEST_FACTOR, factor)
