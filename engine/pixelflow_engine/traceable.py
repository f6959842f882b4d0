"""The operations in plain PyTorch for torch.compile: one graph for any pack, or one graph per pack."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelflow_kernels import PackedLayout

from . import onednn
from .fused import PackedAttention
from .layers import at_least_fp32, rms_norm, shapes_of_runs
from .operations import Linear, PlainOperations, Rotation, SideBySide


class TraceableOperations(PackedAttention, PlainOperations):
    """Plain operations that never read a layout's list of images.

    Per-image vectors are gathered by token instead of broadcast over a batch, and attention is one node of the graph,
    so the graph does not depend on the number and sizes of the images. See
    :class:`pixelflow_engine.operations.Operations`.
    """

    def __init__(self) -> None:
        super().__init__("torch")

    def modulate(self, x: Tensor, shift: Tensor, scale: Tensor, layout: PackedLayout) -> Tensor:
        """See :class:`pixelflow_engine.operations.PlainOperations`."""
        return _modulate(x, shift[layout.image_index], scale[layout.image_index])

    def add_gated(self, x: Tensor, y: Tensor, gate: Tensor, layout: PackedLayout) -> Tensor:
        """See :class:`pixelflow_engine.operations.PlainOperations`."""
        return _add_gated(x, y, gate[layout.image_index])

    def linear(self, x: Tensor, layer: Linear) -> Tensor:
        """A product by oneDNN on a CPU in float32, otherwise the layer itself."""
        return _linear(x, layer)

    def linear_gelu(self, x: Tensor, layer: Linear) -> Tensor:
        """A product by oneDNN on a CPU in float32, with GELU fused into it if no gradient is needed."""
        if onednn.multiplies(x, layer) and not torch.is_grad_enabled():
            return onednn.linear_gelu(x, layer.weight, layer.bias)
        return F.gelu(_linear(x, layer), approximate="tanh")


class KnownPackOperations(PlainOperations):
    """Plain operations for graphs specialized to a pack, as in training, whose packs have few shapes.

    - Per-image vectors are gathered by token, which fuses with what uses them. Their gradients are sums over the tokens
      of each image, whereas a gather's own derivative accumulates token by token.
    - Attention is PyTorch's own, one call per size, with its own derivative; on a CPU always in float32.
    - Queries, keys and values are one product.
    - Within a head, queries and keys have the first channels of all 2-D RoPE pairs before the second ones, so that
      compiled code reads and writes contiguous vectors instead of every other value. Norms and scores are sums over
      channels, which the order does not affect. The reordering happens on the weights, which are copied anyway for
      concatenation.
    - GELU is written with the logistic function, which is cheaper to compute than the hyperbolic tangent.
    """

    def modulate(self, x: Tensor, shift: Tensor, scale: Tensor, layout: PackedLayout) -> Tensor:
        """See :class:`pixelflow_engine.operations.PlainOperations`."""
        return _modulate(x, _rows_of_tokens(shift, layout), _rows_of_tokens(scale, layout))

    def add_gated(self, x: Tensor, y: Tensor, gate: Tensor, layout: PackedLayout) -> Tensor:
        """See :class:`pixelflow_engine.operations.PlainOperations`."""
        return _add_gated(x, y, _rows_of_tokens(gate, layout))

    def queries_keys_values(
        self,
        u: Tensor,
        layers: tuple[Linear, Linear, Linear],
        q_weight: Tensor,
        k_weight: Tensor,
        layout: PackedLayout,
        rotation: Rotation,
        heads: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One product for all three; see :class:`pixelflow_engine.operations.Operations`."""
        if not all(type(layer) in (nn.Linear, SideBySide) for layer in layers):  # a replaced layer must be called
            return super().queries_keys_values(u, layers, q_weight, k_weight, layout, rotation, heads)
        *apart, last = layers
        weight = torch.cat([*(_halves_apart(layer.weight, heads) for layer in apart), last.weight])
        biases = [_halves_apart(layer.bias, heads) for layer in apart if layer.bias is not None]
        bias = torch.cat([*biases, last.bias]) if last.bias is not None else None
        q, k, v = F.linear(u, weight, bias).chunk(3, dim=-1)
        # `cat` materializes the permuted weights, so that vectors are read; a mere permutation would be read value by
        # value.
        norms = torch.cat([_halves_apart(q_weight, heads), _halves_apart(k_weight, heads)]).chunk(2)
        q, k = (_rotate_halves(rms_norm(x, weight), rotation, heads) for x, weight in zip((q, k), norms, strict=True))
        return q, k, torch.unflatten(v, -1, (heads, -1))

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
        """In float32 on a CPU, where the derivative of PyTorch's attention takes longer in bfloat16 than in float32."""
        wide = at_least_fp32(q.dtype) if q.device.type == "cpu" else q.dtype
        return super().self_attention(q.to(wide), k.to(wide), v.to(wide), layout).to(q.dtype)

    def linear_gelu(self, x: Tensor, layer: Linear) -> Tensor:
        """GELU by the logistic function: ``(1 + tanh a) / 2 = sigmoid(2 a)``."""
        y = layer(x)
        return y * torch.sigmoid((y + 0.044715 * y * y * y) * (2 * math.sqrt(2 / math.pi)))


class _RowsOfTokens(torch.autograd.Function):
    """``rows[index]`` for images in runs of equal sizes, ``(images, tokens of each)``."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, runs: tuple[tuple[int, int], ...]) -> Tensor:
        ctx.runs = runs
        return rows[index]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        parts = grads[0].split([images * tokens for images, tokens in ctx.runs])
        sums = [torch.unflatten(part, 0, run).sum(1) for part, run in zip(parts, ctx.runs, strict=True)]
        return torch.cat(sums), None, None


def _rows_of_tokens(rows: Tensor, layout: PackedLayout) -> Tensor:
    """Per-image vectors ``[n, C]`` by token, ``[T, C]``."""
    runs = tuple(shapes_of_runs(layout))
    return _RowsOfTokens.apply(rows, layout.image_index, runs)  # type: ignore[no-untyped-call]


def _halves_apart(rows: Tensor, heads: int) -> Tensor:
    """Reorder ``[C, ...]`` so that the even channels of each head precede its odd ones."""
    return torch.unflatten(rows, 0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _rotate_halves(x: Tensor, rotation: Rotation, heads: int) -> Tensor:
    """:func:`layers.rotate` for pairs split across the halves of a head: ``x [T, C] -> [T, H, D]``."""
    cos, sin = (table[:, None] for table in rotation)
    a, b = torch.unflatten(x.to(cos.dtype), -1, (heads, -1)).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def _linear(x: Tensor, layer: Linear) -> Tensor:
    return onednn.linear(x, layer.weight, layer.bias) if onednn.multiplies(x, layer) else layer(x)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x (1 + scale) + shift``, all ``[T, C]``, in the dtype of ``x``."""
    return (x.to(scale.dtype) * (1 + scale) + shift).to(x.dtype)


def _add_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """``x + gate y``, all ``[T, C]``; the product is rounded to the dtype of ``y``."""
    return x + (gate * y.to(gate.dtype)).to(y.dtype)
