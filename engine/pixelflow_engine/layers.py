"""The operations of a transformer block over packed tokens, in plain PyTorch (``backend="torch"``).

Shapes: ``T`` packed tokens of ``n`` images, ``C = H * D`` width. A vector per image (``[n, C]``) is mapped to the
image's tokens by the :class:`PackedLayout`. What the method computes in float32 is computed in at least float32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pixelflow_kernels import PackedLayout

from .config import SINUSOID_CHANNELS

NORM_EPS = 1e-6
PADDING_BIAS = -10000.0


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for a float64 model."""
    return torch.promote_types(dtype, torch.float32)


def sinusoid(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``[n] -> [n, 256]``: cosines, then sines, of ``value * exp(-ln(10000) i / 127)``."""
    half = SINUSOID_CHANNELS // 2
    exponent = -math.log(10000.0) * torch.arange(half, dtype=dtype, device=value.device) / (half - 1)
    angle = value.to(dtype)[:, None] * torch.exp(exponent)
    return torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)


def rotary_tables(layout: PackedLayout, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of 2-D RoPE for every token: two tensors ``[T, D / 2]``.

    The first D/4 angles follow the column, the last D/4 the row; ``theta_j = 10000^(-2j / (D/2))``. The table is
    computed once for the positions of the largest grid, and tokens gather their rows.
    """
    device = layout.row.device
    exponent = 2 * torch.arange(head_dim // 4, dtype=dtype, device=device) / (head_dim // 2)
    theta = 1.0 / torch.pow(torch.full((), 10000.0, dtype=dtype, device=device), exponent)
    angles = torch.arange(layout.max_position, dtype=dtype, device=device)[:, None] * theta
    cos, sin = torch.cos(angles), torch.sin(angles)
    return (
        torch.cat([cos[layout.column], cos[layout.row]], dim=-1),
        torch.cat([sin[layout.column], sin[layout.row]], dim=-1),
    )


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate neighboring pairs of channels of ``x [T, H, D]``: ``(a, b) -> (a cos - b sin, b cos + a sin)``."""
    cos, sin = rotary[0][:, None], rotary[1][:, None]
    # torch.unflatten, here and wherever blocks are compiled: the method is written in Python, and torch.compile cannot
    # trace it under a caller's torch.set_default_device.
    a, b = torch.unflatten(x.to(cos.dtype), -1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension, in the dtype of ``x``."""
    high = x.to(at_least_fp32(x.dtype))
    return (weight * (high * torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + NORM_EPS))).to(x.dtype)


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm without affine parameters over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, layout: PackedLayout) -> Tensor:
    """``x * (1 + scale) + shift`` in the dtype of ``x [T, C]``; ``shift`` and ``scale [n, C]`` in at least float32."""
    parts = zip(*(_by_runs(rows, layout) for rows in (shift, scale)), _tokens(x.to(scale.dtype), layout), strict=True)
    return _joined([tokens * (1 + scale) + shift for shift, scale, tokens in parts]).to(x.dtype)


def add_gated(x: Tensor, y: Tensor, gate: Tensor, layout: PackedLayout) -> Tensor:
    """``x + gate * y``: the product in the dtype of ``gate [n, C]``, cast to that of ``y [T, C]``, then added."""
    parts = zip(_by_runs(gate, layout), _tokens(y.to(gate.dtype), layout), strict=True)
    return x + _joined([gate * tokens for gate, tokens in parts]).to(y.dtype)


# The images of a run are handled as a batch: their per-image vectors are broadcast, and the gradient of that is a sum
# over a dimension, whereas the gradient of a gather accumulates token by token. `split` is used instead of slices,
# because the gradient of a slice is a full-size tensor of zeros around its own part.


def _by_runs(rows: Tensor, layout: PackedLayout) -> list[Tensor]:
    """Per-image vectors ``[n, C]`` split by run, ``[count, 1, C]`` each."""
    return [part[:, None] for part in rows.split([count for count, _ in shapes_of_runs(layout)])]


def _tokens(x: Tensor, layout: PackedLayout) -> list[Tensor]:
    """Tokens ``[T, ...]`` split by run, ``[count, N, ...]`` each."""
    shapes = shapes_of_runs(layout)
    parts = x.split([count * length for count, length in shapes])
    return [torch.unflatten(part, 0, shape) for part, shape in zip(parts, shapes, strict=True)]


def _joined(parts: list[Tensor]) -> Tensor:
    """Join ``[count, N, ...]`` of each run to ``[T, ...]``; the inverse of :func:`_tokens`."""
    flat = [part.flatten(0, 1) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def shapes_of_runs(layout: PackedLayout) -> list[tuple[int, int]]:
    """Number of images and tokens per image of each run; a pack without images counts as one empty run."""
    return [(run.count, run.grid[0] * run.grid[1]) for run in layout.runs] or [(0, 0)]


def self_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    """Softmax attention within each image: ``q``, ``k``, ``v [T, H, D] -> [T, H, D]``."""
    runs = zip(*(_tokens(x, layout) for x in (q, k, v)), strict=True)
    batches = [[x.transpose(1, 2) for x in run] for run in runs]
    return _joined([F.scaled_dot_product_attention(*batch).transpose(1, 2) for batch in batches])


def cross_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, layout: PackedLayout) -> Tensor:
    """Softmax attention from each image's tokens to its text.

    Args:
        q: ``[T, H, D]``.
        k, v: ``[n, L, H, D]``.
        bias: ``[n, L]``, added to the logits; None for no bias.
        layout: maps tokens to images.

    Returns:
        ``[T, H, D]``.
    """
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    outputs = []
    for run, queries in zip(layout.runs, _tokens(q, layout), strict=True):
        mask = None if bias is None else bias[run.images, None, None]
        keys, values = k[run.images], v[run.images]
        out = F.scaled_dot_product_attention(queries.transpose(1, 2), keys, values, attn_mask=mask)
        outputs.append(out.transpose(1, 2))
    return _joined(outputs)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """``[B, c, h, w] -> [B * N, c * p * p]``: row-major patches, each in (channel, row, column) order."""
    batch, channels, height, width = images.shape
    p = patch_size
    grid = images.reshape(batch, channels, height // p, p, width // p, p)
    tokens = grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels * p * p)
    return tokens.contiguous()  # for p = 1 this would be a view, whose products round differently


def unpatchify(tokens: Tensor, shape: tuple[int, int, int, int], patch_size: int) -> Tensor:
    """``[B * N, c * p * p] -> [B, c, h, w]``, the inverse of :func:`patchify`."""
    batch, channels, height, width = shape
    p = patch_size
    grid = tokens.reshape(batch, height // p, width // p, channels, p, p)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(shape)
