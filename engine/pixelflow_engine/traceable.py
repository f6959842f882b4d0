"""The operations in plain PyTorch in a form that torch.compile makes one graph of, for any images in any number."""

from __future__ import annotations

from torch import Tensor

from pixelflow_kernels import PackedLayout

from . import layers
from .fused import FusedOperations
from .operations import PlainOperations


class TraceableOperations(PlainOperations):
    """Plain operations that read a layout's tensors alone, see :class:`pixelflow_engine.operations.Operations`.

    Per-image rows are gathered by token, not broadcast over a batch, and attention is one node of the graph; so nothing
    in the graph depends on how many images of what sizes there are.
    """

    def __init__(self) -> None:
        attention = FusedOperations("torch")
        self.self_attention = attention.self_attention  # type: ignore[method-assign]
        self.text_tokens = attention.text_tokens  # type: ignore[method-assign,assignment]
        self.cross_attention = attention.cross_attention  # type: ignore[method-assign]

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


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, layout: PackedLayout) -> Tensor:
    index = layout.image_index
    return x.to(scale.dtype) * (1 + scale[index]) + shift[index]


def _add_gated(x: Tensor, y: Tensor, gate: Tensor, layout: PackedLayout) -> Tensor:
    return x + (gate[layout.image_index] * y.to(gate.dtype)).to(y.dtype)
