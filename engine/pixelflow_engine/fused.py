"""The operations of a block as fused kernels (``backend="triton"`` and ``"flash"``)."""

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
    """The tokens of all prompts one after another, followed by all padding, which belongs to no prompt.

    With all padding kept at the end, prompts of any lengths can replace others that were padded to the same length.

    Attributes:
        states: ``[n * L, E]``, from prompts padded to length L.
        cu_seqlens: ``[n + 2]`` int32: the start of each prompt, the start of the padding, and the end.
        max_seqlen: upper bound on the length of these parts.
    """

    states: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


class PackedAttention:
    """Attention as one call for the whole pack.

    Args:
        attention: the implementation: ``triton`` (this project's kernels), ``flash`` (FlashAttention) or ``torch``
            (PyTorch).
    """

    def __init__(self, attention: Literal["triton", "flash", "torch"]) -> None:
        self.attention = attention

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
        """One call for the whole pack, whatever the sizes of its images."""
        ends, longest = layout.cu_seqlens, layout.max_seqlen
        return varlen_attention(
            q, k, v, ends, ends, longest, longest, backend=self.attention, multiple_of=layout.multiple_of
        )

    def text_tokens(self, text: Text) -> PackedText:
        """Pack the prompts' tokens and move all padding behind the last prompt."""
        prompts, tokens, _ = text.states.shape
        device, total = text.states.device, prompts * tokens
        mask = torch.ones(prompts, tokens, device=device) if text.mask is None else text.mask
        keep = mask > 0.5
        # A constant bias on all logits has no effect on a softmax: where everything is padding, all of it is attended
        # to.
        keep = keep.logical_or(keep.any(1, keepdim=True).logical_not())
        order = keep.logical_not().flatten().to(torch.int32).argsort(stable=True)
        ends = F.pad(keep.sum(1).cumsum(0), (1, 1))
        ends[-1:].fill_(total)
        return PackedText(text.states.flatten(0, 1)[order], ends.to(torch.int32), total)

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor, text: TextTokens, layout: PackedLayout) -> Tensor:
        """``k``, ``v [n * L, H, D]`` of the packed prompts; the padding is attended to by an image without tokens."""
        if not isinstance(text, PackedText):
            raise TypeError(f"text: got {type(text).__name__}, expected PackedText, as text_tokens gives it")
        queries, keys = layout.cu_seqlens_and_none, text.cu_seqlens
        return varlen_attention(q, k, v, queries, keys, layout.max_seqlen, text.max_seqlen, backend=self.attention)


class FusedOperations(PackedAttention):
    """The operations as kernels; see :class:`pixelflow_engine.operations.Operations`."""

    layer_norm_modulate = staticmethod(modulate.layer_norm_modulate)
    add_gated_layer_norm_modulate = staticmethod(modulate.add_gated_layer_norm_modulate)
    add_gated_rms_norm_modulate = staticmethod(modulate.add_gated_rms_norm_modulate)
    add_gated_rms_norm = staticmethod(modulate.add_gated_rms_norm)
    add_rms_norm_modulate = staticmethod(modulate.add_rms_norm_modulate)

    def rotation(self, layout: PackedLayout, head_dim: int, dtype: torch.dtype) -> Rotation:
        """One table with all positions of the largest grid."""
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
        """One pass over q and k, which may be slices of one product."""
        return rope2d.qk_norm_rope2d(q, k, q_weight, k_weight, layout, num_heads=heads, table=rotation[0])

    def norm_rotate(self, q: Tensor, weight: Tensor, layout: PackedLayout, rotation: Rotation, heads: int) -> Tensor:
        """A call without keys: a prompt's keys are normalized once, the queries in every step."""
        table = rotation[0]
        return rope2d.norm_rope2d_q_norm_k(q, q[:0], weight, weight, layout, num_heads=heads, table=table)[0]

    def norm_heads(self, k: Tensor, weight: Tensor, heads: int) -> Tensor:
        """A call without queries."""
        return rope2d.norm_rope2d_q_norm_k(k[:0], k, weight, weight, _nowhere(k.device), num_heads=heads)[1]

    def linear(self, x: Tensor, layer: Linear) -> Tensor:
        """The library's matrix product."""
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
        """Three separate products. For sampling, the weights are concatenated and this method is not used."""
        q, k, v = (layer(u) for layer in layers)
        q, k = self.norm_rotate_qk(q, k, q_weight, k_weight, layout, rotation, heads)
        return q, k, torch.unflatten(v, -1, (heads, -1))

    def linear_gelu(self, x: Tensor, layer: Linear) -> Tensor:
        """GELU in the epilogue of the product, if the library offers it and no gradient is needed."""
        if x.device.type == "cuda" and not torch.is_grad_enabled() and layer.bias is not None:
            # cuBLASLt's epilogue computes the tanh form; on a CPU the same call computes the erf form. This call has no
            # derivative on any device.
            return torch._addmm_activation(layer.bias, x, layer.weight.t(), use_gelu=True)
        return F.gelu(layer(x), approximate="tanh")


def _nowhere(device: torch.device) -> PackedLayout:
    """An empty layout, created on the device: copying one from the host would wait for the device in every block."""
    none = torch.empty(0, dtype=torch.int32, device=device)
    start = torch.zeros(1, dtype=torch.int32, device=device)
    return PackedLayout(grids=(), cu_seqlens=start, image_index=none, row=none, column=none, runs=())
