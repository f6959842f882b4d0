"""The operations of a transformer block as one interface, and its plain PyTorch implementation.

Fused kernels (:mod:`pixelflow_engine.fused`) and operations for torch.compile (:mod:`pixelflow_engine.traceable`) are
the other implementations.

Shapes: ``T`` packed tokens of ``n`` images, ``C = H * D`` width. A vector per image (``[n, C]``, at least float32) is
mapped to the image's tokens by the :class:`PackedLayout`. The implementations agree within level D.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelflow_kernels import PackedLayout

from . import layers

Rotation = tuple[Tensor, ...]
"""Cosines and sines for the positions of a layout, in the form that an implementation expects."""


class SideBySide(nn.Module):
    """Several linear maps of one input as one product. Its tensors are not part of the state dict."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in] -> [..., sum of out]``."""
        return F.linear(x, self.weight, self.bias)


Linear = nn.Linear | SideBySide


@dataclass(frozen=True, eq=False, slots=True)
class Text:
    """Encoded prompts, one per image.

    Attributes:
        states: ``[n, L, E]``.
        mask: ``[n, L]``, 1 for a token and 0 for padding, or None where nothing is padded.
    """

    states: Tensor
    mask: Tensor | None = None

    def for_each(self, images: int) -> Text:
        """Expand a single prompt to this many images as a view; several prompts are returned as they are."""
        if len(self.states) != 1:
            return self
        mask = None if self.mask is None else self.mask.expand(images, -1)
        return Text(self.states.expand(images, -1, -1), mask)

    def padded(self, length: int) -> Text:
        """Pad the prompts to this many tokens with tokens that the mask hides."""
        more = length - self.states.shape[1]
        if more == 0:
            return self
        mask = self.states.new_ones(self.states.shape[:2], dtype=torch.float32) if self.mask is None else self.mask
        return Text(F.pad(self.states, (0, 0, 0, more)), F.pad(mask, (0, more)))

    @staticmethod
    def concatenate(*texts: Text) -> Text:
        """Concatenate prompts padded to the same length into one batch."""
        states = torch.cat([text.states for text in texts])
        if all(text.mask is None for text in texts):
            return Text(states)
        masks = [states.new_ones(t.states.shape[:2], dtype=torch.float32) if t.mask is None else t.mask for t in texts]
        return Text(states, torch.cat(masks))


class TextTokens(Protocol):
    """Prompts in the form that an implementation's cross-attention expects.

    Attributes:
        states: input of the key and value projections, ``[..., E]``.
    """

    @property
    def states(self) -> Tensor: ...  # noqa: D102


class Operations(Protocol):
    """The operations of a block. ``x`` is the residual stream ``[T, C]``, ``y`` the output of a branch."""

    def layer_norm_modulate(self, x: Tensor, shift: Tensor, scale: Tensor, layout: PackedLayout) -> Tensor:
        """``LN(x) (1 + scale) + shift``."""
        ...

    def add_gated_layer_norm_modulate(
        self, x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, layout: PackedLayout
    ) -> tuple[Tensor, Tensor]:
        """``r = x + gate y`` and ``LN(r) (1 + scale) + shift``."""
        ...

    def add_gated_rms_norm_modulate(
        self, x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, layout: PackedLayout
    ) -> tuple[Tensor, Tensor]:
        """``r = x + gate y`` and ``RMS(r) weight (1 + scale) + shift``."""
        ...

    def add_gated_rms_norm(
        self, x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, layout: PackedLayout
    ) -> tuple[Tensor, Tensor]:
        """``r = x + gate y`` and ``RMS(r) weight``."""
        ...

    def add_rms_norm_modulate(
        self, x: Tensor, y: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, layout: PackedLayout
    ) -> tuple[Tensor, Tensor]:
        """``r = x + y`` and ``RMS(r) weight (1 + scale) + shift``."""
        ...

    def rotation(self, layout: PackedLayout, head_dim: int, dtype: torch.dtype) -> Rotation:
        """Position tables for :meth:`norm_rotate` and :meth:`norm_rotate_qk`, computed once for all blocks."""
        ...

    def norm_rotate_qk(
        self,
        q: Tensor,
        k: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        layout: PackedLayout,
        rotation: Rotation,
        heads: int,
    ) -> tuple[Tensor, Tensor]:
        """RMSNorm over the full width, then 2-D RoPE: ``q``, ``k [T, C] -> [T, H, D]``."""
        ...

    def norm_rotate(self, q: Tensor, weight: Tensor, layout: PackedLayout, rotation: Rotation, heads: int) -> Tensor:
        """RMSNorm over the full width, then 2-D RoPE, of queries only: ``[T, C] -> [T, H, D]``."""
        ...

    def norm_heads(self, k: Tensor, weight: Tensor, heads: int) -> Tensor:
        """RMSNorm over the full width, of keys without positions: ``[..., C] -> [..., H, D]``."""
        ...

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
        """Attention of each image's tokens among themselves: ``[T, H, D]``."""
        ...

    def text_tokens(self, text: Text) -> TextTokens:
        """Prompts in the form that :meth:`cross_attention` expects."""
        ...

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor, text: TextTokens, layout: PackedLayout) -> Tensor:
        """Attention of each image's tokens ``q [T, H, D]`` to its own prompt."""
        ...

    def linear(self, x: Tensor, layer: Linear) -> Tensor:
        """``x weight^T + bias``."""
        ...

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
        """The three products of ``u [T, C]``, with :meth:`norm_rotate_qk` applied to the first two: ``[T, H, D]`` each.

        The results are meant only for :meth:`self_attention`: an implementation may order the channels of a head
        differently, as long as it does so in both q and k.
        """
        ...

    def linear_gelu(self, x: Tensor, layer: Linear) -> Tensor:
        """``GELU(x weight^T + bias)``, tanh form."""
        ...


class PlainOperations:
    """The operations in plain PyTorch (``backend="torch"``); differentiable, on any device."""

    def modulate(self, x: Tensor, shift: Tensor, scale: Tensor, layout: PackedLayout) -> Tensor:
        """``x (1 + scale) + shift`` with each token's vectors; see :func:`layers.modulate`."""
        return layers.modulate(x, shift, scale, layout)

    def add_gated(self, x: Tensor, y: Tensor, gate: Tensor, layout: PackedLayout) -> Tensor:
        """``x + gate y`` with each token's vector; see :func:`layers.add_gated`."""
        return layers.add_gated(x, y, gate, layout)

    def layer_norm_modulate(self, x: Tensor, shift: Tensor, scale: Tensor, layout: PackedLayout) -> Tensor:
        """See :class:`Operations`."""
        return self.modulate(layers.layer_norm(x), shift, scale, layout)

    def add_gated_layer_norm_modulate(
        self, x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, layout: PackedLayout
    ) -> tuple[Tensor, Tensor]:
        """See :class:`Operations`."""
        x = self.add_gated(x, y, gate, layout)
        return x, self.modulate(layers.layer_norm(x), shift, scale, layout)

    def add_gated_rms_norm_modulate(
        self, x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, layout: PackedLayout
    ) -> tuple[Tensor, Tensor]:
        """See :class:`Operations`."""
        x = self.add_gated(x, y, gate, layout)
        return x, self.modulate(layers.rms_norm(x, weight), shift, scale, layout)

    def add_gated_rms_norm(
        self, x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, layout: PackedLayout
    ) -> tuple[Tensor, Tensor]:
        """See :class:`Operations`."""
        x = self.add_gated(x, y, gate, layout)
        return x, layers.rms_norm(x, weight)

    def add_rms_norm_modulate(
        self, x: Tensor, y: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, layout: PackedLayout
    ) -> tuple[Tensor, Tensor]:
        """See :class:`Operations`."""
        x = x + y
        return x, self.modulate(layers.rms_norm(x, weight), shift, scale, layout)

    def rotation(self, layout: PackedLayout, head_dim: int, dtype: torch.dtype) -> Rotation:
        """Cosine and sine of every token: two tensors ``[T, D / 2]``."""
        return layers.rotary_tables(layout, head_dim, dtype)

    def norm_rotate_qk(
        self,
        q: Tensor,
        k: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        layout: PackedLayout,
        rotation: Rotation,
        heads: int,
    ) -> tuple[Tensor, Tensor]:
        """See :class:`Operations`."""
        return (
            self.norm_rotate(q, q_weight, layout, rotation, heads),
            self.norm_rotate(k, k_weight, layout, rotation, heads),
        )

    def norm_rotate(self, q: Tensor, weight: Tensor, layout: PackedLayout, rotation: Rotation, heads: int) -> Tensor:
        """See :class:`Operations`."""
        return layers.rotate(self.norm_heads(q, weight, heads), (rotation[0], rotation[1]))

    def norm_heads(self, k: Tensor, weight: Tensor, heads: int) -> Tensor:
        """See :class:`Operations`."""
        return torch.unflatten(layers.rms_norm(k, weight), -1, (heads, -1))

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
        """One batched call per run of images with the same grid."""
        return layers.self_attention(q, k, v, layout)

    def text_tokens(self, text: Text) -> TextTokens:
        """The padded prompts, unchanged."""
        return text

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor, text: TextTokens, layout: PackedLayout) -> Tensor:
        """Logits of padding tokens are lowered by 10000; ``k``, ``v [n, L, H, D]``."""
        mask = text.mask if isinstance(text, Text) else None
        bias = None if mask is None else (1 - mask.to(q.dtype)) * layers.PADDING_BIAS
        return layers.cross_attention(q, k, v, bias, layout)

    def linear(self, x: Tensor, layer: Linear) -> Tensor:
        """See :class:`Operations`."""
        return layer(x)

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
        """Three separate products, because one wider product may round differently."""
        q, k, v = (self.linear(u, layer) for layer in layers)
        q, k = self.norm_rotate_qk(q, k, q_weight, k_weight, layout, rotation, heads)
        return q, k, torch.unflatten(v, -1, (heads, -1))

    def linear_gelu(self, x: Tensor, layer: Linear) -> Tensor:
        """See :class:`Operations`."""
        return F.gelu(layer(x), approximate="tanh")
