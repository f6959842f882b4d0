"""The PixelFlow transformer over packed tokens: one model for sampling and training.

Parameters have the published names; ``load_state_dict(..., strict=True)`` takes a published checkpoint. Source: arXiv
2504.07963, section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelflow_kernels import PackedLayout

from . import layers
from .config import SINUSOID_CHANNELS, ModelConfig
from .layers import at_least_fp32


@dataclass(frozen=True, eq=False, slots=True)
class Text:
    """Encoded prompts, one per image.

    Attributes:
        states: ``[n, L, E]``.
        mask: ``[n, L]``, 1 for a token and 0 for padding, or None where nothing is padded.
    """

    states: Tensor
    mask: Tensor | None = None


class RMSNorm(nn.Module):
    """RMSNorm with a learned weight."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., dim] -> [..., dim]``."""
        return layers.rms_norm(x, self.weight)


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


class ClassEmbedder(nn.Module):
    """One row per class, the null class last."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        """``[n] -> [n, C]``."""
        return self.embedding_table(labels)


class PatchEmbedder(nn.Module):
    """The strided convolution of the published model, as the linear map of flattened patches that it equals."""

    def __init__(self, in_channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[T, c * p * p] -> [T, C]``."""
        return F.linear(tokens, self.proj.weight.flatten(1), self.proj.bias)


class AdaLayerNorm(nn.Module):
    """A block's six modulation vectors from the conditioning."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        """``[n, C] ->`` shift1, scale1, gate1, shift2, scale2, gate2, each ``[n, C]`` in at least float32."""
        modulation = self.linear(F.silu(c))
        return modulation.to(at_least_fp32(modulation.dtype)).chunk(6, dim=-1)


class Attention(nn.Module):
    """Projections and norms of an attention; RMSNorm of q and k runs over the full width, all heads together."""

    def __init__(self, width: int, context_width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(context_width, width, bias=bias)
        self.v_proj = nn.Linear(context_width, width, bias=bias)
        self.o_proj = nn.Linear(width, width, bias=bias)
        self.q_norm = RMSNorm(width)
        self.k_norm = RMSNorm(width)

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed q of ``x``, normed k and plain v of ``context``, split into heads: ``[..., H, D]`` each."""
        q = self.q_norm(self.q_proj(x)).unflatten(-1, (self.heads, -1))
        k = self.k_norm(self.k_proj(context)).unflatten(-1, (self.heads, -1))
        return q, k, self.v_proj(context).unflatten(-1, (self.heads, -1))


class SelfAttention(Attention):
    """Attention among the tokens of an image, with 2-D RoPE on q and k."""

    def forward(self, x: Tensor, layout: PackedLayout, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """``[T, C] -> [T, C]``."""
        q, k, v = self.project(x, x)
        out = layers.self_attention(layers.rotate(q, rotary), layers.rotate(k, rotary), v, layout)
        return self.o_proj(out.flatten(-2))


class CrossAttention(Attention):
    """Attention from an image's tokens to its text, with 2-D RoPE on q alone."""

    def forward(self, x: Tensor, layout: PackedLayout, rotary: tuple[Tensor, Tensor], text: Text) -> Tensor:
        """``[T, C] -> [T, C]``; a padded text token's logits get -10000."""
        q, k, v = self.project(x, text.states)
        bias = None if text.mask is None else (1 - text.mask.to(x.dtype)) * layers.PADDING_BIAS
        out = layers.cross_attention(layers.rotate(q, rotary), k, v, bias, layout)
        return self.o_proj(out.flatten(-2))


class MLP(nn.Module):
    """Linear C -> 4C, GELU (tanh form), linear 4C -> C."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, C] -> [T, C]``."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class TransformerBlock(nn.Module):
    """Modulated self-attention, cross-attention where there is text, modulated MLP."""

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
        self, x: Tensor, c: Tensor, layout: PackedLayout, rotary: tuple[Tensor, Tensor], text: Text | None
    ) -> Tensor:
        """``x [T, C]``, ``c [n, C]``, ``rotary`` two of ``[T, D / 2]``."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.norm1(c)
        u = layers.modulate(layers.layer_norm(x), shift1, scale1, layout)
        x = layers.add_gated(x, self.attn1(u, layout, rotary), gate1, layout)
        if self.norm2 is not None and self.attn2 is not None and text is not None:
            x = x + self.attn2(self.norm2(x), layout, rotary, text)
        v = layers.modulate(self.norm3(x), shift2, scale2, layout)
        return layers.add_gated(x, self.mlp(v), gate2, layout)


class PackedTransformer(nn.Module):
    """The velocity field over a pack of images of any sizes.

    Args:
        config: the model's shape.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C, p = config.width, config.patch_size
        self.config = config
        self.patch_embed = PatchEmbedder(config.in_channels, C, p)
        self.timestep_embedder = ConditioningMLP(C)
        self.latent_size_embedder = ConditioningMLP(C)
        self.class_embedder = ClassEmbedder(config.num_classes, C) if config.num_classes > 0 else None
        self.transformer_blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.depth))
        self.proj_out_1 = nn.Linear(C, 2 * C)
        self.proj_out_2 = nn.Linear(C, p * p * config.out_channels)

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' type, in which matrix products run."""
        return self.proj_out_2.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.proj_out_2.weight.device

    def conditioning(self, t_model: Tensor, latent_size: Tensor, class_labels: Tensor | None) -> Tensor:
        """``c [n, C]``, the sum of the time, class and size embeddings."""
        c = self.timestep_embedder(t_model)
        if self.class_embedder is not None:
            c = c + self.class_embedder(class_labels)
        return c + self.latent_size_embedder(latent_size)

    def forward(
        self,
        tokens: Tensor,
        t_model: Tensor,
        layout: PackedLayout,
        latent_size: Tensor,
        class_labels: Tensor | None = None,
        text: Text | None = None,
    ) -> Tensor:
        """The velocity of every token.

        Args:
            tokens: patches ``[T, c * p * p]`` in (channel, row, column) order.
            t_model: ``[n]``, time on the 0..999 axis.
            layout: who the tokens belong to.
            latent_size: ``[n]``, the image's width in tokens (what the published model is told of the resolution).
            class_labels: ``[n]`` integers, ``num_classes`` for the null class; None for a model without classes.
            text: encoded prompts, for a model with cross-attention.

        Returns:
            ``[T, c * p * p]`` in (channel, row, column) order, in the model's type.

        Source: arXiv 2504.07963, section 3.3.
        """
        rotary = layers.rotary_tables(layout, self.config.attention_head_dim, at_least_fp32(self.dtype))
        c = self.conditioning(t_model, latent_size, class_labels)
        x = self.patch_embed(tokens.to(self.dtype))
        for block in self.transformer_blocks:
            x = block(x, c, layout, rotary, text)
        out = self.proj_out_1(F.silu(c))
        shift, scale = out.to(at_least_fp32(out.dtype)).chunk(2, dim=-1)
        x = self.proj_out_2(layers.modulate(layers.layer_norm(x), shift, scale, layout))
        p = self.config.patch_size
        return x.view(-1, p, p, self.config.out_channels).permute(0, 3, 1, 2).flatten(1)

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw fresh weights from torch's global generator.

        Linears Xavier-uniform with zero bias, the patch embedding likewise as a matrix, conditioning N(0, 0.02),
        modulations and output zero.
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
