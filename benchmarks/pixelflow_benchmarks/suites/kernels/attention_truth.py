"""Attention of a pack of equally long images in plain PyTorch, image by image, to save memory.

The last stage of the published model with 16 guided images has 32 * 16 * 4096^2 scores: 69 GB in float64, and autograd
would keep them all. Those of one image take 2.1 GB, and three or four copies of them exist at a time.

Shapes: ``q``, ``k``, ``v`` ``[n * length, H, D]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def attended(q: Tensor, k: Tensor, v: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute output ``[n * length, H, D]`` and log-sum-exp ``[H, n * length]``.

    Operands, weights and the output are in ``dtype``; a row's sum is that of the rounded weights.
    """
    outputs, sums = [], []
    for a, b, c in _images(length, q, k, v):
        out, lse = _attended_image(a.to(dtype), b.to(dtype), c.to(dtype))
        outputs.append(out.transpose(0, 1))
        sums.append(lse)
    return torch.cat(outputs), torch.cat(sums, dim=-1)


def outputs(attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
    """Compute the output of an attention function of tensors ``[1, H, N, D]``."""
    return torch.cat([attention(a[None], b[None], c[None])[0].transpose(0, 1) for a, b, c in _images(length, q, k, v)])


def gradients(
    attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor, length: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Compute the gradients of q, k and v in ``dtype`` through an attention function of tensors ``[1, H, N, D]``."""
    found = []
    for *x, g in _images(length, q, k, v, grad):
        leaves = tuple(t.detach().to(dtype)[None].requires_grad_() for t in x)
        parts = torch.autograd.grad(attention(*leaves), leaves, g.to(dtype)[None])
        found.append(tuple(part[0].transpose(0, 1) for part in parts))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention by its definition."""
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v


def growth(q: Tensor, k: Tensor, length: int) -> float:
    """Return the ``growth`` of :func:`~.case.level_d` for attention: a weight's error in roundings of its own type.

    A logit's rounding error is proportional to the logit, and becomes a relative error of its weight. Logits are kept
    in at least float32, so that this part is small in a half-precision type.
    """
    largest = max((a @ b.mT).abs().max().item() for a, b in _images(length, q, k)) * q.shape[-1] ** -0.5
    high = torch.finfo(torch.promote_types(q.dtype, torch.float32)).eps
    return float(1 + largest * high / torch.finfo(q.dtype).eps)


def _images(length: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split packed tensors into those of each image, ``[H, N, D]``."""
    return zip(*(x.transpose(0, 1).split(length, dim=1) for x in tensors), strict=True)


def _attended_image(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
    largest = scores.amax(-1, keepdim=True)
    weights = (scores - largest).exp().to(q.dtype)
    total = weights.to(scores.dtype).sum(-1, keepdim=True)
    return ((weights @ v) / total).to(q.dtype), (largest + total.log()).squeeze(-1)
