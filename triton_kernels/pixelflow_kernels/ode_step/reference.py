"""ODE steps of a batch of images: the meaning, in plain PyTorch.

Shapes: ``x`` is any contiguous tensor of ``B`` images with ``n`` values each, image after image; ``slopes`` is
``[S, *x.shape]``; ``velocity`` has the values of ``x``, or, with ``guidance``, twice as many: the null half first.
Per image, in float64: ``step``, ``tau`` and what controls them. ``guidance`` is ``[B]`` or ``[1]``, ``tolerance`` is
``(rtol, atol)``. Everything about the state is computed in its own type, every operation rounding by itself, sums left
to right. Source: arXiv 2504.07963, section 3.4; Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I,
section II.4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RUNNING, ARRIVED, MAX_ATTEMPTS, UNDERFLOW, NONFINITE = range(5)  # what ``status`` says of an image
SAFETY, SMALLEST_FACTOR, LARGEST_FACTOR = 0.9, 0.2, 10.0


def guided(velocity: Tensor, guidance: Tensor | None, images: int, dtype: torch.dtype) -> Tensor:
    """``[B, n]``: ``v_null + w (v_cond - v_null)``, or the velocity itself, converted to ``dtype`` first."""
    high = velocity.to(dtype)
    if guidance is None:
        return high.reshape(images, -1)
    null, conditional = high.reshape(2, images, -1)
    return null + guidance.to(dtype)[:, None] * (conditional - null)


def euler(x: Tensor, velocity: Tensor, step: Tensor, guidance: Tensor | None, images: int) -> Tensor:
    """``x + step v`` in the shape of ``x``; ``step`` is ``[B]`` or ``[1]`` and rounded to the type of ``x``."""
    rows = x.reshape(images, -1)
    return (rows + step.to(x.dtype)[:, None] * guided(velocity, guidance, images, x.dtype)).view(x.shape)


def weighted_sum(slopes: Tensor, weights: Sequence[float], step: Tensor) -> Tensor:
    """``sum_i (step w_i) k_i`` as ``[B, n]``, zeros skipped; ``step w_i`` in float64, then rounded to the type of k."""
    rows = slopes.reshape(slopes.shape[0], step.shape[0], -1)
    terms = [(step * w).to(k.dtype)[:, None] * k for k, w in zip(rows, weights, strict=False) if w != 0.0]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def stage_state(x: Tensor, slopes: Tensor, step: Tensor, weights: Sequence[float]) -> Tensor:
    """``x + sum_i (step w_i) k_i`` in the shape of ``x``."""
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
    """``[B]``: root mean square of ``error / (atol + rtol max(|x0|, |x1|))``."""
    rtol, atol = tolerance.to(x.dtype)
    rows, after = (y.reshape(step.shape[0], -1) for y in (x, stage_state(x, slopes, step, solution)))
    scale = atol + rtol * torch.maximum(rows.abs(), after.abs())
    return root_mean_square(weighted_sum(slopes, error, step) / scale, batch_wide)


def start_norms(
    x: Tensor, slope: Tensor, probe: Tensor | None, tolerance: Tensor, images: int, batch_wide: bool
) -> Tensor:
    """Sizes relative to ``atol + rtol |x|``: ``[2, B]`` of ``x`` and ``slope``, or ``[1, B]`` of ``probe - slope``."""
    rtol, atol = tolerance.to(x.dtype)
    rows, slope = x.reshape(images, -1), slope.reshape(images, -1)
    scale = atol + rtol * rows.abs()
    measured = [rows, slope] if probe is None else [probe.reshape(images, -1) - slope]
    return torch.stack([root_mean_square(y / scale, batch_wide) for y in measured])


def root_mean_square(x: Tensor, batch_wide: bool) -> Tensor:
    """Of each image ``[B, n]``, ``[B]`` float64; or that of the batch in every entry."""
    squares = (x * x).mean(-1).double()
    if batch_wide:
        squares = squares.mean().expand_as(squares)
    return squares.sqrt()


def first_trial(norms: Tensor) -> Tensor:
    """Hairer's trial step ``[B]`` from the sizes ``[2, B]`` of state and slope."""
    size, speed = norms
    # Not torch.where: a number among its arguments is copied from the host, which waits.
    return (0.01 * size / speed).masked_fill((size < 1e-5) | (speed < 1e-5), 1e-6)


def first_step(trial: Tensor, speed: Tensor, bend: Tensor, order: int) -> Tensor:
    """Hairer's first step ``[B]``; ``bend`` is the size of the slope's change over the trial step."""
    largest = torch.maximum(speed, bend / trial)
    cautious = (0.01 / largest) ** (1 / order)
    return torch.minimum(100 * trial, torch.where(largest <= 1e-15, (trial * 1e-3).clamp(min=1e-6), cautious))


def begin_attempt(tau: Tensor, step: Tensor, status: Tensor, nodes: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The step ``h [B]`` that each image tries, 0 where it stands still, and the slopes' times ``[S, B]``."""
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
    """``tau, step, status, accepted, rejected`` after an attempt to reach ``after [B]``, and if it was accepted."""
    active = (tau < 1) & (status == RUNNING)
    finite = ratio.isfinite()
    stuck = active & finite & (after <= tau)  # h vanishes beside tau
    tried = active & finite & ~stuck
    accept = tried & (ratio <= 1)
    accepted, rejected = accepted + accept, rejected + (tried & ~accept)
    tau = torch.where(accept, after, tau)
    status = torch.where(tried & (accepted + rejected >= max_attempts), MAX_ATTEMPTS, status)
    status = torch.where(accept & (tau >= 1), ARRIVED, status)
    status = torch.where(stuck, UNDERFLOW, torch.where(active & ~finite, NONFINITE, status))
    return tau, torch.where(tried, next_step(h, ratio, order), step), status, accepted, rejected, accept


def next_step(h: Tensor, ratio: Tensor, order: int) -> Tensor:
    """``h clamp(0.9 ratio^(-1/order), 0.2, 10)``, never below h after a step well within tolerance."""
    factor = SAFETY * ratio ** (-1 / order)
    smallest = torch.full_like(ratio, SMALLEST_FACTOR).masked_fill(ratio < 1, 1.0)
    factor = torch.maximum(factor, smallest).clamp(max=LARGEST_FACTOR)
    return h * torch.where(ratio == 0, LARGEST_FACTOR, factor)
