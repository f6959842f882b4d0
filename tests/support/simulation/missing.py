"""Operations that PyTorch has, or computes otherwise, on CUDA alone: by name, in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pixelflow_kernels.varlen_attention import reference


def addmm_activation(bias: Tensor, a: Tensor, b: Tensor, *, use_gelu: bool = False, **scales: Any) -> Tensor:
    """cuBLASLt's epilogue has GELU's tanh form; a CPU takes the exact one."""
    out = torch.addmm(bias, a, b, **scales)
    return torch.nn.functional.gelu(out, approximate="tanh") if use_gelu else out.relu()


def varlen_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    *more: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """FlashAttention."""
    out, lse = reference.attention(q, k, v, cu_q, cu_k, _scale(q, scale))
    return out, lse, torch.zeros(2, dtype=torch.uint64)


def varlen_attn_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    rng_state: Tensor,
    scale: float | None = None,
    *more: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """FlashAttention's gradients."""
    return reference.attention_backward(grad, None, q, k, v, cu_q, cu_k, _scale(q, scale))


def _scale(q: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(q.shape[-1]) if scale is None else scale


MISSING: dict[str, Callable[..., Any]] = {
    "aten::_addmm_activation": addmm_activation,
    "torch_attn::_varlen_attn": varlen_attn,
    "torch_attn::_varlen_attn_backward": varlen_attn_backward,
}
