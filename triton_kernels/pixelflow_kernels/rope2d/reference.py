"""Reference implementation in plain PyTorch: RMSNorm of q and k over the full width, then 2-D RoPE.

Shapes: ``x [T, C]``, ``weight [C]``, ``row`` and ``column [T]``, ``table [P, D / 2]`` from ``rotation_table``.
Computed in the table's dtype. Source: arXiv 2504.07963, section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, row: Tensor, column: Tensor, table: Tensor, conjugate: bool = False) -> Tensor:
    """Rotate neighbouring pairs of ``x [T, H, D]``: the first D/2 channels by column, the last D/2 by row."""
    cos, sin = torch.cat([table[column], table[row]], dim=-1)[:, None].unflatten(-1, (-1, 2)).unbind(-1)
    sin = -sin if conjugate else sin
    a, b = x.to(table.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, high_type: torch.dtype) -> Tensor:
    """Compute ``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension in ``high_type``, rounded to x's dtype."""
    high = x.to(high_type)
    return (weight * (high * torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + eps))).to(x.dtype)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``weight`` for the normed tokens' gradient ``[T, C]``, which is in the high dtype."""
    high = x.to(grad.dtype)
    scale = torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + eps)
    unit, grad_unit = high * scale, grad * weight
    grad_x = scale * (grad_unit - unit * (grad_unit * unit).mean(-1, keepdim=True))
    return grad_x.to(x.dtype), (grad * unit).sum(0).to(weight.dtype)
