"""Euler and adaptive Dormand-Prince integration of ``dx/dtau = v(x, tau)`` over a stage.

Sums over Runge-Kutta slopes are written out left to right, with each product and each sum rounded separately, so that a
fused kernel can reproduce them bit for bit. Source: arXiv 2504.07963, section 3.4; Dormand and Prince (1980) with
Shampine's error coefficients (1986), as in torchdiffeq; step control after Hairer, Norsett and Wanner, section II.4.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .model import at_least_fp32

NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
COUPLING = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (
    35 / 384 - 1951 / 21600,
    0.0,
    500 / 1113 - 22642 / 50085,
    125 / 192 - 451 / 720,
    -2187 / 6784 + 12231 / 42400,
    11 / 84 - 649 / 6300,
    -1 / 60,
)
ORDER = 5
SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0

VelocityField = Callable[[Tensor, Tensor], Tensor]
"""``(x [B, c, h, w], tau [B] float64) -> velocity [B, c, h, w]``."""


def euler_step(x: Tensor, velocity: Tensor, tau: Tensor, tau_next: Tensor) -> Tensor:
    """``x + (tau_next - tau) v`` in at least float32; both times are first rounded to float32."""
    step = tau_next.float() - tau.float()
    return x.to(at_least_fp32(x.dtype)) + step * velocity


@dataclass(frozen=True)
class Dopri5Result:
    """Result of an adaptive integration.

    Attributes:
        x: the state at tau = 1, ``[B, c, h, w]``.
        evaluations: calls of the velocity field, each for the whole batch.
        accepted, rejected: number of steps of each image, ``[B]``.
    """

    x: Tensor
    evaluations: int
    accepted: Tensor
    rejected: Tensor


def combine(slopes: list[Tensor], coefficients: tuple[float, ...], step: Tensor) -> Tensor:
    """``sum_i (h c_i) k_i`` left to right, skipping zeros; ``h c_i`` in float64, rounded to the slopes' dtype."""
    total = None
    for slope, coefficient in zip(slopes, coefficients, strict=True):
        if coefficient == 0.0:
            continue
        term = per_image(step * coefficient, slope) * slope
        total = term if total is None else total + term
    assert total is not None
    return total


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """``[B] -> [B, 1, 1, 1]`` in the dtype of ``like``."""
    return values.to(like.dtype)[:, None, None, None]


def rms(x: Tensor, batch_wide: bool) -> Tensor:
    """Root mean square per image, ``[B]`` float64; batch-wide, every entry is that of the whole batch."""
    squares = (x * x).flatten(1).mean(-1).double()
    return (squares.mean().expand_as(squares) if batch_wide else squares).sqrt()


def first_step(field: VelocityField, x: Tensor, v: Tensor, rtol: float, atol: float, batch_wide: bool) -> Tensor:
    """Hairer's initial step, ``[B]`` float64: small enough that an explicit Euler step changes the slope little."""
    scale = atol + rtol * x.abs()
    d0, d1 = rms(x / scale, batch_wide), rms(v / scale, batch_wide)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
    probe = field(x + per_image(h0, x) * v, h0)
    d2 = rms((probe - v) / scale, batch_wide) / h0
    largest = torch.maximum(d1, d2)
    h1 = torch.where(largest <= 1e-15, (h0 * 1e-3).clamp(min=1e-6), (0.01 / largest) ** (1 / ORDER))
    return torch.minimum(100 * h0, h1)


def next_step(step: Tensor, ratio: Tensor) -> Tensor:
    """``h * min(10, max(0.9 ratio^(-1/5), 0.2))``; not below ``h`` where ``ratio < 1``."""
    factor = SAFETY * ratio ** (-1 / ORDER)
    smallest = torch.full_like(ratio, SHRINK).masked_fill(ratio < 1, 1.0)
    return step * torch.where(ratio == 0, GROW, torch.maximum(factor, smallest).clamp(max=GROW))


def dopri5(
    field: VelocityField,
    x: Tensor,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    error_norm: str = "image",
    max_attempts: int = 1000,
) -> Dopri5Result:
    """Integrate from tau = 0 to tau = 1 with Dormand-Prince 5(4), landing on 1 exactly.

    Args:
        field: the velocity field.
        x: the state at tau = 0, ``[B, c, h, w]``.
        rtol, atol: an image's step is accepted when the root mean square of ``error / (atol + rtol max(|x0|, |x1|))``
            is at most 1.
        error_norm: ``image``: each image has its own step sizes, independent of its batch mates. ``batch``: one step
            size from the norm over the whole batch, as in torchdiffeq.
        max_attempts: maximum number of steps tried, accepted or not.

    Raises:
        RuntimeError: an image's error estimate is not finite, or ``max_attempts`` were not enough.
    """
    batch_wide = error_norm == "batch"
    tau = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
    slope = field(x, tau)
    step = first_step(field, x, slope, rtol, atol, batch_wide)
    evaluations = 2
    accepted, rejected = torch.zeros_like(tau, dtype=torch.int64), torch.zeros_like(tau, dtype=torch.int64)
    while (tau < 1).any():
        if (accepted + rejected).max() == max_attempts:
            raise RuntimeError(
                f"dopri5: {max_attempts} attempts did not reach tau = 1 (reached {tau.min().item():.6f})"
            )
        active = tau < 1
        h = torch.where(active, torch.minimum(step, 1 - tau), 0.0)
        tau_next = torch.where(step >= 1 - tau, 1.0, tau + h)

        slopes = [slope]
        for node, row in zip(NODES[1:], COUPLING[1:], strict=True):
            at = tau_next if node == 1.0 else tau + node * h
            y = x + combine(slopes, row, h)
            slopes.append(field(y, at))
        evaluations += len(NODES) - 1
        scale = atol + rtol * torch.maximum(x.abs(), y.abs())
        ratio = rms(combine(slopes, ERROR, h) / scale, batch_wide)
        if not ratio.isfinite().all():
            images = (~ratio.isfinite()).nonzero().flatten().tolist()
            raise RuntimeError(f"dopri5: the error estimate is not finite for images {images}")

        accept = active & (ratio <= 1)
        keep = accept[:, None, None, None]
        x, slope = torch.where(keep, y, x), torch.where(keep, slopes[-1], slope)
        tau = torch.where(accept, tau_next, tau)
        step = torch.where(active, next_step(h, ratio), step)
        accepted, rejected = accepted + accept, rejected + (active & ~accept)
    return Dopri5Result(x, evaluations, accepted, rejected)
