"""The operations in plain PyTorch for torch.compile: one graph for any pack, or one graph per pack."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelflow_kernels import PackedLayout

from . import layers, onednn
from .fused import PackedAttention
from .layers import rms_norm
from .operations import Linear, PlainOperations, Rotation, SideBySide


class TraceableOperations(PackedAttention, PlainOperations):
    """Plain operations that never read a layout's list of images.

    Per-image vectors are gathered by token instead of broadcast over a batch, and attention is one node of the graph,
    so the graph does not depend on the number and sizes of the images. See
    :class:`pixelflow_engine.operations.Operations`.
    """

    def __init__(self) -> None:
        super().__init__("torch")

    def layer_norm_modulate(self, x: Tensor, shift: Tensor, scale: Tensor, layout: PackedLayout) -> Tensor:
        """See :class:`pixelflow_engine.operations.Operations`."""
        return _modulate(layers.layer_norm(x), shift, scale, layout).to(x.dtype)

    def add_gated_layer_norm_modulate(
        self, x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, layout: PackedLayout
    ) -> tuple[Tensor, Tensor]:
        """See :class:`pixelflow_engine.operations.Operations`."""
        x = _add_gated(x, y, gate, layout)
        return x, self.layer_norm_modulate(x, shift, scale, layout)

    def add_gated_rms_norm_modulate(
        self, x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, layout: PackedLayout
    ) -> tuple[Tensor, Tensor]:
        """See :class:`pixelflow_engine.operations.Operations`."""
        x = _add_gated(x, y, gate, layout)
        return x, _modulate(layers.rms_norm(x, weight), shift, scale, layout).to(x.dtype)

    def add_gated_rms_norm(
        self, x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, layout: PackedLayout
    ) -> tuple[Tensor, Tensor]:
        """See :class:`pixelflow_engine.operations.Operations`."""
        x = _add_gated(x, y, gate, layout)
        return x, layers.rms_norm(x, weight)

    def add_rms_norm_modulate(
        self, x: Tensor, y: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, layout: PackedLayout
    ) -> tuple[Tensor, Tensor]:
        """See :class:`pixelflow_engine.operations.Operations`."""
        x = x + y
        return x, _modulate(layers.rms_norm(x, weight), shift, scale, layout).to(x.dtype)

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

    - Neighboring images of one size are a batch in the graph: per-image vectors are broadcast, and their gradients are
      sums over a dimension, whereas the gradient of a gather accumulates token by token.
    - Attention is PyTorch's own, one call per size, with its own derivative.
    - Queries, keys and values are one product.
    - Within a head, queries and keys have the first channels of all 2-D RoPE pairs before the second ones, so that
      compiled code reads and writes contiguous vectors instead of every other value. Norms and scores are sums over
      channels, which the order does not affect. The reordering happens on the weights, which are copied anyway for
      concatenation.
    - GELU is written with the logistic function, which is cheaper to compute than the hyperbolic tangent.

    Args:
        by_onednn: whether oneDNN computes products on a CPU; by default this depends on the CPU vendor.
    """

    def __init__(self, by_onednn: bool | None = None) -> None:
        self.by_onednn = onednn.ahead() if by_onednn is None else by_onednn

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
        by_onednn = self.by_onednn and all(onednn.multiplies(u, layer) for layer in layers)
        product = onednn.linear(u, weight, bias) if by_onednn else F.linear(u, weight, bias)
        width = layers[0].weight.shape[0]
        qk, v = product.split([2 * width, width], dim=-1)
        # `cat` materializes the permuted weights, so that vectors are read; a mere permutation would be read value by
        # value.
        norms = torch.unflatten(torch.cat([_halves_apart(q_weight, heads), _halves_apart(k_weight, heads)]), 0, (2, -1))
        q, k = _rotate_halves(rms_norm(torch.unflatten(qk, -1, (2, -1)), norms), rotation, heads).unbind(1)
        return q, k, torch.unflatten(v, -1, (heads, -1))

    def linear(self, x: Tensor, layer: Linear) -> Tensor:
        """A product by oneDNN on CPUs where it is preferred, otherwise the layer itself."""
        return _linear(x, layer) if self.by_onednn else layer(x)

    def linear_gelu(self, x: Tensor, layer: Linear) -> Tensor:
        """GELU by the logistic function: ``(1 + tanh a) / 2 = sigmoid(2 a)``."""
        y = self.linear(x, layer)
        return y * torch.sigmoid((y + 0.044715 * y * y * y) * (2 * math.sqrt(2 / math.pi)))


def _halves_apart(rows: Tensor, heads: int) -> Tensor:
    """Reorder ``[C, ...]`` so that the even channels of each head precede its odd ones."""
    return torch.unflatten(rows, 0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _rotate_halves(x: Tensor, rotation: Rotation, heads: int) -> Tensor:
    """:func:`layers.rotate` for pairs split across the halves of a head: ``x [T, ..., C] -> [T, ..., H, D]``."""
    cos, sin = (table[:, None, None] for table in rotation)
    a, b = torch.unflatten(x.to(cos.dtype), -1, (heads, -1)).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def _linear(x: Tensor, layer: Linear) -> Tensor:
    return onednn.linear(x, layer.weight, layer.bias) if onednn.multiplies(x, layer) else layer(x)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, layout: PackedLayout) -> Tensor:
    index = layout.image_index
    return x.to(scale.dtype) * (1 + scale[index]) + shift[index]


def _add_gated(x: Tensor, y: Tensor, gate: Tensor, layout: PackedLayout) -> Tensor:
    return x + (gate[layout.image_index] * y.to(gate.dtype)).to(y.dtype)
