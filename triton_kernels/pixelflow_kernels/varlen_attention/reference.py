"""Reference implementation in plain PyTorch: softmax attention within the members of a pack.

Shapes: ``q [T, H, D]``, ``k`` and ``v [L, H, D]``. Member ``i`` has queries ``cu_seqlens_q[i]`` up to, but not
including, ``cu_seqlens_q[i + 1]``, and keys likewise by ``cu_seqlens_k``. Computed in at least float32. Source: arXiv
2504.07963, section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def members(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield the queries and keys of each member that has both, as slices."""
    q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(q) - 1):
        if q[i] < q[i + 1] and k[i] < k[i + 1]:
            yield slice(q[i], q[i + 1]), slice(k[i], k[i + 1])


def logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Compute ``scale q_i . k_j`` as ``[H, queries, keys]``, in at least float32."""
    high = torch.promote_types(q.dtype, torch.float32)
    return torch.einsum("qhd,khd->hqk", q.to(high), k.to(high)) * scale


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute the output ``[T, H, D]`` and the logits' log-sum-exp ``[H, T]``; 0 and minus infinity without keys."""
    out = q.new_zeros(q.shape)
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    for rows, keys in members(cu_seqlens_q, cu_seqlens_k):
        s = logits(q[rows], k[keys], scale)
        lse[:, rows] = s.logsumexp(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", s.softmax(-1), v[keys].to(s.dtype)).to(q.dtype)
    return out, lse


def attention_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k and v from those of the output and, optionally, of the log-sum-exp."""
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    for rows, keys in members(cu_seqlens_q, cu_seqlens_k):
        p = logits(q[rows], k[keys], scale).softmax(-1)
        g, values = grad[rows].to(p.dtype), v[keys].to(p.dtype)
        dp = torch.einsum("qhd,khd->hqk", g, values)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        if grad_lse is not None:
            ds += p * grad_lse[:, rows, None] * scale
        dq[rows] = torch.einsum("hqk,khd->qhd", ds, k[keys].to(p.dtype)).to(q.dtype)
        dk[keys] = torch.einsum("hqk,qhd->khd", ds, q[rows].to(p.dtype)).to(k.dtype)
        dv[keys] = torch.einsum("hqk,qhd->khd", p, g).to(v.dtype)
    return dq, dk, dv
