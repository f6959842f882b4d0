"""Reference implementation in plain PyTorch: norms with per-image modulation and the preceding gated residual.

Shapes: ``x``, ``y [T, C]``, ``weight [C]``, per-image rows ``gate``, ``shift``, ``scale [n, C]``, ``image_index [T]``.
Computed in the rows' dtype: float32, or float64 for float64 tokens. Source: arXiv 2504.07963, section 3.3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def add_gated(x: Tensor, y: Tensor, gate: Tensor | None, image_index: Tensor) -> Tensor:
    """Compute ``x + gate * y``, with the product rounded to the dtype of ``y``; without a gate, ``x + y``."""
    return x + y if gate is None else x + (gate[image_index] * y.to(gate.dtype)).to(y.dtype)


def norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Apply RMSNorm with ``weight``, or LayerNorm without affine parameters if it is None; result in x's dtype.

    Computed in at least float32.
    """
    if weight is None:
        return F.layer_norm(x, x.shape[-1:], eps=eps)
    high = x.to(torch.promote_types(x.dtype, torch.float32))
    return (weight.to(high.dtype) * (high * torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + eps))).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, image_index: Tensor) -> Tensor:
    """Compute ``x * (1 + scale) + shift`` in the dtype of the rows, rounded to the dtype of ``x``."""
    return (x.to(scale.dtype) * (1 + scale[image_index]) + shift[image_index]).to(x.dtype)


def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, scale: Tensor | None, image_index: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """From the gradient of the modulated norm, compute that of ``x`` and the product ``grad * u`` in the high dtype.

    u is the normalised token before the weight: dx = (du - mean(du) - u mean(du u)) / std, without mean(du) for
    RMSNorm. The high dtype is float32, or float64 for float64 tokens.
    """
    high_type = torch.promote_types(x.dtype, torch.float32)
    high, grad = x.to(high_type), grad.to(high_type)
    if weight is None:  # the second subtraction removes the rounding error of the first mean
        high = high - high.mean(-1, keepdim=True)
        high = high - high.mean(-1, keepdim=True)
    reciprocal = torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + eps)
    unit = high * reciprocal
    grad_unit = grad if scale is None else grad * (1 + scale[image_index])
    grad_unit = grad_unit if weight is None else grad_unit * weight.to(high_type)
    along = unit * (grad_unit * unit).mean(-1, keepdim=True)
    if weight is None:
        along = along + grad_unit.mean(-1, keepdim=True)
    return reciprocal * (grad_unit - along), grad * unit


def per_image(x: Tensor, image_index: Tensor, num_images: int) -> Tensor:
    """Sum ``x [T, C]`` over each image's tokens: ``[n, C]``."""
    return x.new_zeros(num_images, x.shape[-1]).index_add_(0, image_index, x)


def backward(
    grad: Tensor,
    grad_residual: Tensor | None,
    residual: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    image_index: Tensor,
    num_images: int,
    eps: float,
) -> list[Tensor]:
    """Compute the tokens' gradients, and the per-image sums that give those of rows and weight.

    Returns:
        Per-image sums ``[K, n, C]`` (of g u; with a scale, of g; with a gate, of dr y), then dx, and with a gate dy.
        g is the output's gradient, u the normalised token before the weight, and r the residual.
    """
    grad_x, grad_unit = norm_backward(grad, residual, weight, scale, image_index, eps)
    grad_x = grad_x if grad_residual is None else grad_x + grad_residual
    sums, tokens = [grad_unit], [grad_x.to(residual.dtype)]
    if scale is not None:
        sums.append(grad.to(scale.dtype))
    if gate is not None and y is not None:
        sums.append(grad_x * y)
        tokens.append((gate[image_index] * grad_x).to(y.dtype))
    return [torch.stack([per_image(x, image_index, num_images) for x in sums]), *tokens]
