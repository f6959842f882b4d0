"""Inputs for the rope2d tests, and an independent implementation in float64 without the project's code."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pixelflow_kernels import PackedLayout

from .reference_models import seeded

EPS = 1e-6


def turn(x: Tensor, layout: PackedLayout) -> Tensor:
    """2-D RoPE of ``x [T, H, D]`` by complex multiplication in float64."""
    quarter = x.shape[-1] // 4
    theta = torch.tensor([10000.0 ** (-2 * j / (2 * quarter)) for j in range(quarter)], dtype=torch.float64)
    angle = torch.cat([layout.column.double()[:, None] * theta, layout.row.double()[:, None] * theta], dim=-1)
    pairs = torch.view_as_complex(x.double().contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)[:, None]).flatten(-2)


def norm(x: Tensor, weight: Tensor, num_heads: int, eps: float = EPS) -> Tensor:
    """RMSNorm of ``x [T, C]`` in float64, split into heads."""
    high = x.double()
    length = torch.linalg.vector_norm(high, dim=-1, keepdim=True) / math.sqrt(x.shape[-1])
    length = torch.hypot(length, torch.tensor(math.sqrt(eps), dtype=torch.float64))
    return (high / length * weight.double()).unflatten(-1, (num_heads, -1))


def norm_and_turn(leaves: Sequence[Tensor], layout: PackedLayout, heads: int, rotate_k: bool) -> tuple[Tensor, Tensor]:
    """Return what the fused operation computes from ``q, k, q_weight, k_weight``, in float64; differentiable."""
    q, k, q_weight, k_weight = leaves
    k = norm(k, k_weight, heads)
    return turn(norm(q, q_weight, heads), layout), turn(k, layout) if rotate_k else k


def gradients(
    grads: Sequence[Tensor], leaves: Sequence[Tensor], layout: PackedLayout, heads: int, rotate_k: bool
) -> tuple[Tensor, ...]:
    """Return the gradients of q, k and both weights by autograd; ``grads`` ``[T, H, D]`` are the outputs'."""
    high = [x.double().requires_grad_() for x in leaves]
    outputs = norm_and_turn(high, layout, heads, rotate_k)
    return torch.autograd.grad(outputs, high, [g.double() for g in grads])


def fused_qkv(tokens: int, width: int, dtype: torch.dtype, std: float, seed: int = 0) -> tuple[Tensor, ...]:
    """Draw q, k and v as slices of one product ``[T, 3C]``."""
    product = torch.randn(tokens, 3 * width, generator=seeded(seed), dtype=torch.float64) * std
    return product.to(dtype).chunk(3, dim=-1)


def weights(width: int, dtype: torch.dtype, seed: int = 7) -> tuple[Tensor, Tensor]:
    """Draw the weights of q's and k's norm: around 1, none of them exactly 1."""
    q_weight, k_weight = 1 + 0.3 * torch.randn(2, width, generator=seeded(seed), dtype=torch.float64)
    return q_weight.to(dtype), k_weight.to(dtype)


def high_type(dtype: torch.dtype) -> torch.dtype:
    """Return the type that operands of ``dtype`` are computed in."""
    return torch.promote_types(dtype, torch.float32)
