"""Checks of the rope2d launches on the CPU, for interpreted and emulated kernels: outputs in poison, inputs in NaN."""

from __future__ import annotations

import torch
from torch import Tensor

from pixelflow_kernels import PackedLayout
from pixelflow_kernels.rope2d import op, reference, rotation_table

from . import rope
from .kernels import assert_filled, assert_level_d, assert_same_bits, plain, poisoned_like, surrounded
from .rope import EPS


def places(layout: PackedLayout, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, columns and the table as a launch takes them."""
    table = surrounded(rotation_table(layout, dim, rope.high_type(dtype)), dense=True)
    return layout.row, layout.column, table


def check_rotation(
    x: Tensor, layout: PackedLayout, dim: int, conjugate: bool, config: dict[str, int] | None = None
) -> None:
    """Rotate ``x [T, C]`` into poison: level A."""
    from pixelflow_kernels.rope2d.rotation import launch_rotate

    at = places(layout, dim, x.dtype)
    expected = reference.rotate(x.unflatten(-1, (-1, dim)), *at, conjugate).flatten(1)
    buffer, out = poisoned_like(x)
    launch_rotate(x, *at, out, dim, conjugate, config)
    assert_filled(buffer, out)
    assert_same_bits(out, expected)


def operands(
    layout: PackedLayout, k_tokens: int | None, width: int, dtype: torch.dtype, std: float, seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """q, k and the weights, and gradients of both outputs ``[T, C]``; ``k_tokens`` is None where k is q's image."""
    q, k, _ = rope.fused_qkv(max(layout.num_tokens, k_tokens or 0), width, dtype, std, seed)
    q, k = q[: layout.num_tokens], k[: layout.num_tokens if k_tokens is None else k_tokens]
    weights = [surrounded(w) for w in rope.weights(width, rope.high_type(dtype), seed)]
    drawn = rope.fused_qkv(max(len(q), len(k)), width, dtype, 1.0, seed + 1)
    return [q, surrounded(k), *weights], [drawn[0][: len(q)], drawn[1][: len(k)]]


def check_forward(
    tensors: list[Tensor],
    layout: PackedLayout,
    heads: int,
    rotate_k: bool,
    config: dict[str, int] | None = None,
) -> None:
    """Launch the forward kernel into poison: level D."""
    from pixelflow_kernels.rope2d.forward import launch_forward

    q, k = tensors[:2]
    dim = q.shape[1] // heads
    at = places(layout, dim, q.dtype)
    outputs = [poisoned_like(x) for x in (q, k)]
    launch_forward(*tensors, *at, outputs[0].out, outputs[1].out, dim, EPS, rotate_k, config)
    in_torch = plain(op._norm_rope2d)(*tensors, *at, heads, EPS, rotate_k)
    truth = rope.norm_and_turn(tensors, layout, heads, rotate_k)
    for name, (buffer, out), a, b in zip(("q", "k"), outputs, in_torch, truth, strict=True):
        assert_filled(buffer, out, name)
        assert_level_d(out, a.flatten(1), b.flatten(1), name)


def check_backward(
    tensors: list[Tensor],
    grads: list[Tensor],
    layout: PackedLayout,
    heads: int,
    rotate_k: bool,
    config: dict[str, int] | None = None,
) -> None:
    """Launch the backward kernel into poison, and add its partial sums: level D."""
    from pixelflow_kernels.rope2d.backward import launch_backward

    q, k = tensors[:2]
    dim = q.shape[1] // heads
    at = places(layout, dim, q.dtype)
    outputs = [poisoned_like(x) for x in (q, k)]
    of_weights = launch_backward(*grads, *tensors, *at, outputs[0].out, outputs[1].out, dim, EPS, rotate_k, config)
    by_heads = [g.unflatten(-1, (heads, dim)) for g in grads]
    in_torch = plain(op._norm_rope2d_backward)(*by_heads, *tensors, *at, EPS, rotate_k)
    truth = rope.gradients(by_heads, tensors, layout, heads, rotate_k)
    for buffer, out in outputs:
        assert_filled(buffer, out)
    got = [outputs[0].out, outputs[1].out, *of_weights]
    for name, a, b, c in zip(("q", "k", "q_weight", "k_weight"), got, in_torch, truth, strict=True):
        assert_level_d(a, b, c, name)
