"""Reference implementation in plain PyTorch: gradient norm, AdamW and moving average.

The scalars of a step are computed in float64 and each rounded to float32 once; tensors are updated in float32, with
every operation rounding separately. All three moving averages are computed as ``x + w (y - x)``. Source: Loshchilov and
Hutter, arXiv 1711.05101, algorithm 2; Kingma and Ba, arXiv 1412.6980, section 2 (bias correction).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST_NORM = 2.0**63
"""Limit of a clipped gradient's norm, below which the squares of its values, and so the second moments, are finite."""


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Compute the square root of the sum of all squares in float64 and return it as float32."""
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms)).float()


def power(base: float, exponent: int) -> float:
    """Compute ``base ** exponent`` by squaring, lowest bit first: products only, so bits are the same everywhere."""
    result = 1.0
    while exponent > 0:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def numbers(
    norm: float,
    lr: float,
    taken: int,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_norm: float,
    ema_decay: float,
) -> list[float]:
    """Compute the scalars of a step in float64, after ``taken`` previous steps.

    Returns:
        ``[apply, clip, 1 - beta1, 1 - beta2, rate, root_scale, eps, decay, ema_weight]``; ``apply`` is 1, or 0 for a
        step that must be skipped.
    """
    clip = min(1.0, max_norm / (norm + 1e-6))
    return [
        1.0 if clip * norm < LARGEST_NORM else 0.0,  # false for a NaN or infinite norm
        clip,
        1.0 - beta1,
        1.0 - beta2,
        lr / (1.0 - power(beta1, taken + 1)),
        1.0 / math.sqrt(1.0 - power(beta2, taken + 1)),
        eps,
        lr * weight_decay,
        1.0 - min(ema_decay, (1.0 + taken) / (10.0 + taken)),
    ]


def count_(counters: Tensor, applied: bool) -> None:
    """Update ``counters``, ``[taken, skipped, skipped in a row]`` int64, after a step."""
    taken, skipped, row = counters.tolist()
    after = [taken + 1, skipped, 0] if applied else [taken, skipped + 1, row + 1]
    counters.copy_(torch.tensor(after, dtype=torch.int64, device=counters.device))


def update(
    gradient: Tensor, parameter: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, average: Tensor | None, numbers: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the new parameter, moments and average of a step that is applied; ``numbers`` is ``[9]`` float32."""
    _, clip, fresh, fresh_sq, rate, root_scale, eps, decay, ema_weight = numbers.unbind()
    g = gradient.to(parameter.dtype) * clip
    m = exp_avg + fresh * (g - exp_avg)
    v = exp_avg_sq + fresh_sq * (g * g - exp_avg_sq)
    # Through float64, because torch's float32 square root is not correctly rounded on a CPU.
    change = rate * m / (v.double().sqrt().to(v.dtype) * root_scale + eps)
    p = parameter - (decay * parameter + change)
    return p, m, v, None if average is None else average + ema_weight * (p - average)
