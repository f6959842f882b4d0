"""The PixelFlow transformer over packed tokens, one model for sampling and training.

Parameters have the published names, so ``load_state_dict(..., strict=True)`` accepts a published checkpoint. Source:
arXiv 2504.07963, section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelflow_kernels import PackedLayout

from . import layers
from .config import SINUSOID_CHANNELS, ModelConfig
from .layers import at_least_fp32
from .operations import Operations, PlainOperations, Rotation, SideBySide, Text, TextTokens
from .ranges import named

__all__ = ["PackedTransformer", "Prompts", "Text"]


TextKeys = tuple[Tensor, Tensor]
"""Normalized keys, and values, of all prompts for one block, ``[..., H, D]`` each."""


@dataclass(frozen=True, eq=False, slots=True)
class Prompts:
    """What the blocks need of the prompts; constant over all steps.

    Attributes:
        text: the prompts' tokens.
        keys: keys and values for each block.
    """

    text: TextTokens
    keys: tuple[TextKeys, ...]

    def tensors(self) -> list[Tensor]:
        """All tensors, in an order that depends only on :meth:`kind`."""
        return [x for x in _fields(self.text).values() if isinstance(x, Tensor)] + [
            x for pair in self.keys for x in pair
        ]

    def kind(self) -> tuple[object, ...]:
        """A key for reuse: prompts of one kind differ only in the values of their tensors."""
        return tuple(tuple(x.shape) if isinstance(x, Tensor) else x for x in _fields(self.text).values())

    def clone(self) -> Prompts:
        """A copy that owns its memory."""
        own = {name: x.clone() for name, x in _fields(self.text).items() if isinstance(x, Tensor)}
        return Prompts(replace(cast("Any", self.text), **own), tuple((k.clone(), v.clone()) for k, v in self.keys))


def _fields(text: TextTokens) -> dict[str, object]:
    """Fields of text tokens by name; every implementation is a dataclass."""
    return {field.name: getattr(text, field.name) for field in fields(cast("Any", text))}


@dataclass(frozen=True, eq=False, slots=True)
class Surroundings:
    """What all blocks share and what does not change between evaluations.

    Attributes:
        layout: maps tokens to images.
        rotation: rotary position tables of the layout, in the form that the operations expect.
        prompts: the prompts, for a model with cross-attention.
    """

    layout: PackedLayout
    rotation: Rotation
    prompts: Prompts | None


def _fused(product: SideBySide | None) -> SideBySide:
    if product is None:
        raise ValueError("model: its weights do not lie side by side yet, see pixelflow_engine.fusion.fuse")
    return product


class RMSNorm(nn.Module):
    """Weight of an RMSNorm; the operations compute it, fused with neighboring operations."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class ConditioningMLP(nn.Module):
    """Embedding of a scalar: sinusoid, linear, SiLU, linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(SINUSOID_CHANNELS, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, value: Tensor) -> Tensor:
        """``[n] -> [n, C]``."""
        dtype = self.linear_1.weight.dtype
        features = layers.sinusoid(value, at_least_fp32(dtype)).to(dtype)
        return self.linear_2(F.silu(self.linear_1(features)))


class _Table(nn.Embedding):
    """An embedding that draws no values on the meta device, where torch would import its compiler to do so."""

    def reset_parameters(self) -> None:
        """See :class:`torch.nn.Embedding`."""
        if not self.weight.is_meta:
            super().reset_parameters()


class ClassEmbedder(nn.Module):
    """Class embedding table; the null class is the last row."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = _Table(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        """``[n] -> [n, C]``."""
        return self.embedding_table(labels)


class PatchEmbedder(nn.Module):
    """The published model's strided convolution, computed as the equivalent linear map of flattened patches.

    :mod:`pixelflow_engine.fusion` adds ``by_pixel``, the same map for patches in the order of the head's output.
    """

    def __init__(self, in_channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.by_pixel: SideBySide | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """``[T, c * p * p] -> [T, C]``; a patch is in (channel, row, column) order."""
        return F.linear(tokens, self.proj.weight.flatten(1), self.proj.bias)

    def embed_by_pixel(self, tokens: Tensor) -> Tensor:
        """``[T, p * p * c] -> [T, C]``; a patch is in (row, column, channel) order."""
        return _fused(self.by_pixel)(tokens)


class AdaLayerNorm(nn.Module):
    """Linear map from the conditioning to a block's six modulation vectors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, activated: Tensor) -> Tensor:
        """``SiLU(c) [n, C] -> [n, 6C]``: shift1, scale1, gate1, shift2, scale2, gate2, in at least float32."""
        modulation = self.linear(activated)
        return modulation.to(at_least_fp32(modulation.dtype))


class Attention(nn.Module):
    """Projections and norms of an attention; RMSNorm of q and k runs over the full width, across all heads."""

    def __init__(self, width: int, context_width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(context_width, width, bias=bias)
        self.v_proj = nn.Linear(context_width, width, bias=bias)
        self.o_proj = nn.Linear(width, width, bias=bias)
        self.q_norm = RMSNorm(width)
        self.k_norm = RMSNorm(width)


class SelfAttention(Attention):
    """Attention among the tokens of an image, with 2-D RoPE on q and k.

    :mod:`pixelflow_engine.fusion` concatenates the three projections; ``qkv`` is then their single product.
    """

    def __init__(self, width: int, context_width: int, heads: int, bias: bool) -> None:
        super().__init__(width, context_width, heads, bias)
        self.qkv: SideBySide | None = None

    def forward(self, u: Tensor, around: Surroundings, ops: Operations) -> Tensor:
        """``[T, C] -> [T, C]``."""
        return ops.linear(self.attended(u, around, ops), self.o_proj)

    def attended(self, u: Tensor, around: Surroundings, ops: Operations) -> Tensor:
        """Concatenated outputs of the heads, ``[T, C]``. Queries, keys and values are freed when this returns."""
        norms = (self.q_norm.weight, self.k_norm.weight)
        layout, rotation = around.layout, around.rotation
        if self.qkv is None:
            layers = (self.q_proj, self.k_proj, self.v_proj)
            q, k, v = ops.queries_keys_values(u, layers, *norms, layout, rotation, self.heads)
        else:
            q, k, v = ops.linear(u, self.qkv).chunk(3, dim=-1)
            q, k = ops.norm_rotate_qk(q, k, *norms, layout, rotation, self.heads)
            v = torch.unflatten(v, -1, (self.heads, -1))
        return ops.self_attention(q, k, v, layout).flatten(-2)


class CrossAttention(Attention):
    """Attention from an image's tokens to its text, with 2-D RoPE on q only."""

    def text_keys(self, text: TextTokens, ops: Operations) -> TextKeys:
        """Keys and values of the prompts, which are the same in every step."""
        k = ops.norm_heads(self.k_proj(text.states), self.k_norm.weight, self.heads)
        return k, torch.unflatten(self.v_proj(text.states), -1, (self.heads, -1))

    def forward(self, u: Tensor, keys: TextKeys | None, around: Surroundings, ops: Operations) -> Tensor:
        """``[T, C] -> [T, C]``."""
        if keys is None or around.prompts is None:
            raise ValueError("text: got None, expected prompts for a model with cross-attention")
        q = ops.norm_rotate(ops.linear(u, self.q_proj), self.q_norm.weight, around.layout, around.rotation, self.heads)
        out = ops.cross_attention(q, *keys, around.prompts.text, around.layout)
        return ops.linear(out.flatten(-2), self.o_proj)


class MLP(nn.Module):
    """Linear C -> 4C, GELU (tanh form), linear 4C -> C."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, v: Tensor, ops: Operations) -> Tensor:
        """``[T, C] -> [T, C]``."""
        return ops.linear(ops.linear_gelu(v, self.fc1), self.fc2)


class TransformerBlock(nn.Module):
    """Modulated self-attention, cross-attention (in text models) and modulated MLP."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C, heads, bias = config.width, config.num_attention_heads, config.attention_bias
        self.norm1 = AdaLayerNorm(C)
        self.attn1 = SelfAttention(C, C, heads, bias)
        self.norm2 = None if config.cross_attention_dim is None else RMSNorm(C)
        self.attn2 = (
            None if config.cross_attention_dim is None else CrossAttention(C, config.cross_attention_dim, heads, bias)
        )
        self.norm3 = RMSNorm(C)
        self.mlp = MLP(C)

    def forward(
        self,
        x: Tensor,
        u: Tensor,
        rows: Tensor,
        following: tuple[Tensor, Tensor],
        keys: TextKeys | None,
        around: Surroundings,
        ops: Operations,
    ) -> tuple[Tensor, Tensor]:
        """Run the block, including the norm that the next block (or the head) starts with.

        Args:
            x: the residual stream ``[T, C]``.
            u: the modulated norm of ``x``, ``[T, C]``.
            rows: this block's modulation, ``[n, 6C]``.
            following: shift and scale that the next block (or the head) starts with, ``[n, C]`` each.
            keys: keys and values of the prompts, for a model with cross-attention.
            around: what all blocks share.
            ops: implementation of the operations.

        Returns:
            x and u after the block.
        """
        own = rows.chunk(6, dim=-1)
        x, v = self.attend(x, u, own, keys, around, ops)
        return self.feed_forward(x, v, own, following, around, ops)

    def attend(
        self,
        x: Tensor,
        u: Tensor,
        own: tuple[Tensor, ...],
        keys: TextKeys | None,
        around: Surroundings,
        ops: Operations,
    ) -> tuple[Tensor, Tensor]:
        """The first half: attention and the norm that the MLP starts with.

        ``own`` are the block's six modulation vectors, ``[n, C]`` each.
        """
        _, _, gate1, shift2, scale2, _ = own
        layout = around.layout
        y = self.attn1(u, around, ops)
        if self.norm2 is None or self.attn2 is None:
            return ops.add_gated_rms_norm_modulate(x, y, gate1, self.norm3.weight, shift2, scale2, layout)
        x, w = ops.add_gated_rms_norm(x, y, gate1, self.norm2.weight, layout)
        y = self.attn2(w, keys, around, ops)
        return ops.add_rms_norm_modulate(x, y, self.norm3.weight, shift2, scale2, layout)

    def feed_forward(
        self,
        x: Tensor,
        v: Tensor,
        own: tuple[Tensor, ...],
        following: tuple[Tensor, Tensor],
        around: Surroundings,
        ops: Operations,
    ) -> tuple[Tensor, Tensor]:
        """The second half: the MLP and the norm that the next block (or the head) starts with."""
        gate2 = own[-1]
        return ops.add_gated_layer_norm_modulate(x, self.mlp(v, ops), gate2, *following, around.layout)


class PackedTransformer(nn.Module):
    """The velocity field over a pack of images of any sizes.

    Args:
        config: the model's shape.
        operations: implementation of the operations; defaults to plain PyTorch. It may be replaced at any time.

    Attributes:
        in_halves: call the two halves of a block one after the other instead of calling the block. A call keeps its
            arguments alive until it returns; without one, the old residual stream and its norm are freed as soon as new
            ones exist. Blocks whose call is compiled, sharded or recomputed must be called; a block with forward hooks
            is always called.
    """

    def __init__(self, config: ModelConfig, operations: Operations | None = None) -> None:
        super().__init__()
        C, p = config.width, config.patch_size
        self.config = config
        self.operations: Operations = PlainOperations() if operations is None else operations
        self.patch_embed = PatchEmbedder(config.in_channels, C, p)
        self.timestep_embedder = ConditioningMLP(C)
        self.latent_size_embedder = ConditioningMLP(C)
        self.class_embedder = ClassEmbedder(config.num_classes, C) if config.num_classes > 0 else None
        self.transformer_blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.depth))
        self.proj_out_1 = nn.Linear(C, 2 * C)
        self.proj_out_2 = nn.Linear(C, p * p * config.out_channels)
        self.all_modulations: SideBySide | None = None
        self.in_halves = False

    @property
    def blocks(self) -> list[TransformerBlock]:
        """The transformer blocks in order."""
        return cast("list[TransformerBlock]", list(self.transformer_blocks))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters and of the matrix products."""
        return self.proj_out_2.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.proj_out_2.weight.device

    def forward(
        self,
        tokens: Tensor,
        t_model: Tensor,
        layout: PackedLayout,
        latent_size: Tensor,
        class_labels: Tensor | None = None,
        text: Text | None = None,
        around: Surroundings | None = None,
    ) -> Tensor:
        """Compute the velocity of every token.

        Args:
            tokens: patches ``[T, c * p * p]`` in (channel, row, column) order.
            t_model: ``[n]``, time on the 0..999 axis.
            layout: maps tokens to images.
            latent_size: ``[n]``, the image's width in tokens (the published model's resolution input).
            class_labels: ``[n]`` integers, ``num_classes`` for the null class; None for a model without classes.
            text: encoded prompts, for a model with cross-attention.
            around: the result of :meth:`surroundings` for this layout and text, if already computed.

        Returns:
            ``[T, c * p * p]`` in (channel, row, column) order, in the model's dtype.

        Source: arXiv 2504.07963, section 3.3.
        """
        with named("modulations"):
            modulations = self.modulations(self.conditioning(t_model, latent_size, class_labels))
        if around is None:
            around = self.surroundings(layout, None if text is None else self.prompts(text))
        out = self.trunk(self.patch_embed(tokens.to(self.dtype)), modulations, around)
        p = self.config.patch_size
        return out.view(-1, p, p, self.config.out_channels).permute(0, 3, 1, 2).flatten(1)

    def conditioning(self, t_model: Tensor, latent_size: Tensor, class_labels: Tensor | None) -> Tensor:
        """``c [n, C]``, the sum of the time, class and size embeddings."""
        c = self.timestep_embedder(t_model)
        if self.class_embedder is not None:
            c = c + self.class_embedder(class_labels)
        return c + self.latent_size_embedder(latent_size)

    def modulations(self, c: Tensor) -> tuple[Tensor, ...]:
        """Modulations of every block, ``[n, 6C]``, and of the head, ``[n, 2C]`` (shift, scale), in at least float32."""
        if self.all_modulations is not None:
            return self.split_modulations(self.all_modulations(F.silu(c)))
        # One SiLU per product, the head's last, as in the reference, so that gradients of c are accumulated in the same
        # order.
        blocks = [block.norm1(F.silu(c)) for block in self.blocks]
        head = self.proj_out_1(F.silu(c))
        return *blocks, head.to(at_least_fp32(head.dtype))

    def all_modulations_of(self, activated: Tensor) -> Tensor:
        """``SiLU(c) [n, C] -> [n, (6 depth + 2) C]``: modulations of all blocks and of the head, concatenated."""
        return _fused(self.all_modulations)(activated)

    def split_modulations(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Split ``[n, (6 depth + 2) C]`` into the form that :meth:`modulations` returns."""
        C = self.config.width
        rows = rows.to(at_least_fp32(rows.dtype))
        return rows.split([6 * C] * self.config.depth + [2 * C], dim=-1)

    def prompts(self, text: Text) -> Prompts:
        """Project the prompts for every block."""
        attentions = [block.attn2 for block in self.blocks if block.attn2 is not None]
        if not attentions:
            raise ValueError("text: got prompts, expected None for a model without cross-attention")
        with named("text"):
            tokens = self.operations.text_tokens(text)
            return Prompts(tokens, tuple(attention.text_keys(tokens, self.operations) for attention in attentions))

    def surroundings(self, layout: PackedLayout, prompts: Prompts | None) -> Surroundings:
        """What the blocks need besides tokens and modulations; reusable for any number of evaluations."""
        rotation = self.operations.rotation(layout, self.config.attention_head_dim, at_least_fp32(self.dtype))
        return Surroundings(layout, rotation, prompts)

    def trunk(self, x: Tensor, modulations: tuple[Tensor, ...], around: Surroundings) -> Tensor:
        """Run all blocks and the head.

        Args:
            x: embedded patches ``[T, C]``.
            modulations: as returned by :meth:`modulations`, one row per image of the layout.
            around: layout, rotary tables and prompts.

        Returns:
            ``[T, p * p * c]`` in (row, column, channel) order.
        """
        ops, C = self.operations, self.config.width
        firsts = [(rows[:, :C], rows[:, C : 2 * C]) for rows in modulations]  # shift and scale of each first norm
        u = ops.layer_norm_modulate(x, *firsts[0], around.layout)
        for i, block in enumerate(self.blocks):
            keys = None if around.prompts is None else around.prompts.keys[i]
            with named("block", i):
                if self.in_halves and not (block._forward_hooks or block._forward_pre_hooks):
                    own = modulations[i].chunk(6, dim=-1)
                    x, u = block.attend(x, u, own, keys, around, ops)
                    x, u = block.feed_forward(x, u, own, firsts[i + 1], around, ops)
                else:
                    x, u = block(x, u, modulations[i], firsts[i + 1], keys, around, ops)
        return self.proj_out_2(u)

    @torch.no_grad()
    def initialize(self) -> None:
        """Initialize the weights from torch's global generator.

        Linear layers and the patch embedding (as a matrix) are Xavier-uniform with zero bias, the conditioning
        embeddings N(0, 0.02), the modulations and the output layer zero.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        if self.patch_embed.proj.bias is not None:
            nn.init.zeros_(self.patch_embed.proj.bias)
        for mlp in (self.timestep_embedder, self.latent_size_embedder):
            nn.init.normal_(mlp.linear_1.weight, std=0.02)
            nn.init.normal_(mlp.linear_2.weight, std=0.02)
        if self.class_embedder is not None:
            nn.init.normal_(self.class_embedder.embedding_table.weight, std=0.02)
        modulations = [module.linear for module in self.modules() if isinstance(module, AdaLayerNorm)]
        for linear in [*modulations, self.proj_out_1, self.proj_out_2]:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
