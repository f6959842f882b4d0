"""The operations in plain PyTorch for torch.compile: one graph for any images in any number, or one for each pack."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelflow_kernels import PackedLayout

from . import layers, onednn
from .fused import PackedAttention
from .operations import Linear, PlainOperations, SideBySide


class TraceableOperations(PackedAttention, PlainOperations):
    """Plain operations that read a layout's tensors alone, see :class:`pixelflow_engine.operations.Operations`.

    Per-image rows are gathered by token, not broadcast over a batch, and attention is one node of the graph; so nothing
    in the graph depends on how many images of what sizes there are.
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
        """By oneDNN on a CPU."""
        return _linear(x, layer)

    def linear_gelu(self, x: Tensor, layer: Linear) -> Tensor:
        """By oneDNN on a CPU, the activation where the product is written if no gradient is needed."""
        if onednn.multiplies(x, layer) and not torch.is_grad_enabled():
            return onednn.linear_gelu(x, layer.weight, layer.bias)
        return F.gelu(_linear(x, layer), approximate="tanh")


class KnownPackOperations(PlainOperations):
    """Plain operations in a graph that knows its pack, for training, whose packs have few shapes.

    The batches of neighbouring images of one size are constants of the graph, so rows per image are broadcast and their
    gradients are sums over a dimension, where a gather's is a sum token by token; attention is PyTorch's own, with its
    own derivative, and queries, keys and values are one product.
    """

    def linear(self, x: Tensor, layer: Linear) -> Tensor:
        """By oneDNN on a CPU."""
        return _linear(x, layer)

    def linears(self, x: Tensor, layers: Sequence[Linear]) -> tuple[Tensor, ...]:
        """One product by the weights one below another: what they are copied for is little beside it."""
        biases = [layer.bias for layer in layers if layer.bias is not None]
        alike = len(biases) in (0, len(layers))
        if not (alike and all(type(layer) in (nn.Linear, SideBySide) for layer in layers)):
            return super().linears(x, layers)
        weight, bias = torch.cat([layer.weight for layer in layers]), torch.cat(biases) if biases else None
        fast = all(onednn.multiplies(x, layer) for layer in layers)
        product = onednn.linear(x, weight, bias) if fast else F.linear(x, weight, bias)
        return product.split([layer.weight.shape[0] for layer in layers], dim=-1)

    def linear_gelu(self, x: Tensor, layer: Linear) -> Tensor:
        """By oneDNN on a CPU."""
        return F.gelu(_linear(x, layer), approximate="tanh")


def _linear(x: Tensor, layer: Linear) -> Tensor:
    return onednn.linear(x, layer.weight, layer.bias) if onednn.multiplies(x, layer) else layer(x)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, layout: PackedLayout) -> Tensor:
    index = layout.image_index
    return x.to(scale.dtype) * (1 + scale[index]) + shift[index]


def _add_gated(x: Tensor, y: Tensor, gate: Tensor, layout: PackedLayout) -> Tensor:
    return x + (gate[layout.image_index] * y.to(gate.dtype)).to(y.dtype)
