"""The operations in plain PyTorch in a form that torch.compile makes one graph of, for any images in any number."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.library import custom_op

from pixelflow_kernels import PackedLayout

from . import layers
from .fused import PackedAttention
from .operations import Linear, PlainOperations, SideBySide

ONEDNN = torch.backends.mkldnn.is_available()


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
        """By oneDNN on a CPU, which uses any maker's cores; MKL, behind ``F.linear``, does not."""
        if _for_onednn(x, layer):
            return _onednn_linear(x, layer.weight, layer.bias, False)
        return layer(x)

    def linear_gelu(self, x: Tensor, layer: Linear) -> Tensor:
        """By oneDNN on a CPU, the activation where the product is written."""
        if _for_onednn(x, layer):
            return _onednn_linear(x, layer.weight, layer.bias, True)
        return super().linear_gelu(x, layer)


@custom_op("pixelflow::onednn_linear", mutates_args=(), device_types="cpu")
def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """One node of a compiled graph: Inductor itself takes this product with constant weights and known sizes alone."""
    activation, form = ("gelu", "tanh") if gelu else ("none", "")
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], form)
    return out


@_onednn_linear.register_fake
def _fake_onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _for_onednn(x: Tensor, layer: Linear) -> bool:
    """Whether oneDNN may compute it: it has no derivative, and knows linear layers in float32 alone."""
    return (
        x.device.type == "cpu"
        and x.dtype == layer.weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and type(layer) in (nn.Linear, SideBySide)  # not one that somebody put in its place
        and ONEDNN
    )


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, layout: PackedLayout) -> Tensor:
    index = layout.image_index
    return x.to(scale.dtype) * (1 + scale[index]) + shift[index]


def _add_gated(x: Tensor, y: Tensor, gate: Tensor, layout: PackedLayout) -> Tensor:
    return x + (gate[layout.image_index] * y.to(gate.dtype)).to(y.dtype)
