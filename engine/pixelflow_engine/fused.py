"""The operations of a block by fused kernels (``backend="triton"`` and ``"flash"``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pixelflow_kernels import PackedLayout, modulate, rope2d
from pixelflow_kernels.varlen_attention import varlen_attention

from .operations import Linear, Rotation, Text, TextTokens


@dataclass(frozen=True, eq=False, slots=True)
class PackedText:
    """The tokens of all prompts one after another, and after the last prompt all padding, which belongs to nobody.

    So prompts of any lengths take the place of others that were padded to the same length.

    Attributes:
        states: ``[n * L, E]`` of prompts padded to L.
        cu_seqlens: ``[n + 2]`` int32, where each image's prompt starts, where the padding starts, and the end.
        max_seqlen: at least as long as the longest of these parts.
    """

    states: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


class PackedAttention:
    """Attention as one call for the whole pack.

    Args:
        attention: who attends: ``triton`` (our kernels), ``flash`` (FlashAttention) or ``torch`` (PyTorch's).
    """

    def __init__(self, attention: Literal["triton", "flash", "torch"]) -> None:
        self.attention = attention

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
        """One call for the whole pack, whatever sizes its images have."""
        ends, longest = layout.cu_seqlens, layout.max_seqlen
        return varlen_attention(
            q, k, v, ends, ends, longest, longest, backend=self.attention, multiple_of=layout.multiple_of
        )

    def text_tokens(self, text: Text) -> PackedText:
        """Move the padding behind the last prompt."""
        prompts, tokens, _ = text.states.shape
        device, total = text.states.device, prompts * tokens
        mask = torch.ones(prompts, tokens, device=device) if text.mask is None else text.mask
        keep = mask > 0.5
        # A bias on all logits is one on none: where everything is padding, a softmax attends to all of it.
        keep = keep.logical_or(keep.any(1, keepdim=True).logical_not())
        order = keep.logical_not().flatten().to(torch.int32).argsort(stable=True)
        ends = F.pad(keep.sum(1).cumsum(0), (1, 1))
        ends[-1:].fill_(total)
        return PackedText(text.states.flatten(0, 1)[order], ends.to(torch.int32), total)

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor, text: TextTokens, layout: PackedLayout) -> Tensor:
        """``k``, ``v [n * L, H, D]`` of the packed prompts."""
        if not isinstance(text, PackedText):
            raise TypeError(f"text: got {type(text).__name__}, expected PackedText, as text_tokens gives it")
        queries, keys = layout.cu_seqlens_and_none, text.cu_seqlens
        return varlen_attention(q, k, v, queries, keys, layout.max_seqlen, text.max_seqlen, backend=self.attention)


class FusedOperations(PackedAttention):
    """The operations as kernels, see :class:`pixelflow_engine.operations.Operations`."""

    layer_norm_modulate = staticmethod(modulate.layer_norm_modulate)
    add_gated_layer_norm_modulate = staticmethod(modulate.add_gated_layer_norm_modulate)
    add_gated_rms_norm_modulate = staticmethod(modulate.add_gated_rms_norm_modulate)
    add_gated_rms_norm = staticmethod(modulate.add_gated_rms_norm)
    add_rms_norm_modulate = staticmethod(modulate.add_rms_norm_modulate)

    def rotation(self, layout: PackedLayout, head_dim: int, dtype: torch.dtype) -> Rotation:
        """One table for all places that the largest grid has."""
        return (rope2d.rotation_table(layout, head_dim, dtype),)

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
        """One pass over both, also where they are slices of one product."""
        return rope2d.qk_norm_rope2d(q, k, q_weight, k_weight, layout, num_heads=heads, table=rotation[0])

    def norm_rotate(self, q: Tensor, weight: Tensor, layout: PackedLayout, rotation: Rotation, heads: int) -> Tensor:
        """Queries beside no keys at all: a prompt's keys are normed once, the queries in every step."""
        table = rotation[0]
        return rope2d.norm_rope2d_q_norm_k(q, q[:0], weight, weight, layout, num_heads=heads, table=table)[0]

    def norm_heads(self, k: Tensor, weight: Tensor, heads: int) -> Tensor:
        """Keys beside no queries at all."""
        return rope2d.norm_rope2d_q_norm_k(k[:0], k, weight, weight, _nowhere(k.device), num_heads=heads)[1]

    def linear(self, x: Tensor, layer: Linear) -> Tensor:
        """The library's product."""
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
        """One product after the other: where one is made of them, for sampling, their weights lie side by side."""
        q, k, v = (layer(u) for layer in layers)
        q, k = self.norm_rotate_qk(q, k, q_weight, k_weight, layout, rotation, heads)
        return q, k, torch.unflatten(v, -1, (heads, -1))

    def linear_gelu(self, x: Tensor, layer: Linear) -> Tensor:
        """The activation in the epilogue of the product, where the library has one and no gradient is needed."""
        if x.device.type == "cuda" and not torch.is_grad_enabled() and layer.bias is not None:
            # cuBLASLt's epilogue is the tanh form. On a CPU the same call computes the erf form, and it has no
            # derivative anywhere.
            return torch._addmm_activation(layer.bias, x, layer.weight.t(), use_gelu=True)
        return F.gelu(layer(x), approximate="tanh")


def _nowhere(device: torch.device) -> PackedLayout:
    """An empty pack, made there: bringing one from the host would wait for the device, block after block."""
    none = torch.empty(0, dtype=torch.int32, device=device)
    start = torch.zeros(1, dtype=torch.int32, device=device)
    return PackedLayout(grids=(), cu_seqlens=start, image_index=none, row=none, column=none, runs=())
