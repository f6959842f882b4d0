"""The PixelFlow transformer in plain PyTorch, for one batch of images of one size, without packing or optimizations.

It is written to be read beside the paper (arXiv 2504.07963, section 3.3 and figure 3), and every faster path is tested
against it. What the method computes in float32 is computed in at least float32; in a float64 model (``model.double()``)
nothing is computed in less than float64.

Shapes: ``B`` images, ``N`` tokens of one image, ``H`` heads, ``D`` head dim, ``C = H * D`` width, ``p`` patch size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SINUSOID_CHANNELS = 256
NORM_EPS = 1e-6
PADDING_BIAS = -10000.0
CLASS_DROP_PROBABILITY = 0.1


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """Dtype of what the method computes in float32: float32, or float64 in a float64 model."""
    return torch.promote_types(dtype, torch.float32)


def sinusoid(value: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sinusoidal features of one scalar per image, cosines first: ``[B] -> [B, 256]``.

    Frequencies are ``exp(-ln(10000) i / 127)`` for i = 0..127; the last one is exactly 1/10000.
    """
    half = SINUSOID_CHANNELS // 2
    exponent = -math.log(10000.0) * torch.arange(half, dtype=dtype, device=value.device) / (half - 1)
    angle = value.to(dtype)[:, None] * torch.exp(exponent)
    return torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)


def rotary_angles(
    rows: int, columns: int, head_dim: int, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Angles of 2-D RoPE for tokens in row-major order: ``[rows * columns, D / 2]``.

    The first D/4 angles are from the column, the last D/4 from the row, each multiplied by
    ``theta_j = 10000^(-2j / (D/2))``.
    """
    quarter = head_dim // 4
    exponent = 2 * torch.arange(quarter, dtype=dtype, device=device) / (head_dim // 2)
    theta = 1.0 / torch.pow(torch.tensor(10000.0, dtype=dtype, device=device), exponent)
    row = torch.arange(rows, dtype=dtype, device=device).repeat_interleave(columns)
    column = torch.arange(columns, dtype=dtype, device=device).repeat(rows)
    return torch.cat([column[:, None] * theta, row[:, None] * theta], dim=-1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate neighboring pairs ``(a, b) -> (a cos - b sin, b cos + a sin)`` of ``x [B, N, H, D]``.

    The rotation is computed in the dtype of the angles, at least float32, and cast back.
    """
    cos, sin = torch.cos(angles)[:, None, :], torch.sin(angles)[:, None, :]
    a, b = x.to(angles.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """``[B, c, h, w] -> [B, N, c * p * p]``: row-major patches, each in (channel, row, column) order."""
    batch, channels, height, width = images.shape
    p = patch_size
    grid = images.reshape(batch, channels, height // p, p, width // p, p)
    patches = grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // p) * (width // p), channels * p * p)
    return patches.contiguous()  # for p = 1 this would be a view, whose products round differently


def unpatchify(patches: Tensor, rows: int, columns: int, patch_size: int) -> Tensor:
    """``[B, N, p * p * c] -> [B, c, rows * p, columns * p]`` from patches in (row, column, channel) order."""
    p = patch_size
    grid = patches.reshape(patches.shape[0], rows, columns, p, p, -1)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], -1, rows * p, columns * p)


class RMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension, in at least float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., dim] -> [..., dim]``, in the dtype of ``x``."""
        high = x.to(at_least_fp32(x.dtype))
        normed = high * torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + NORM_EPS)
        return (self.weight * normed).to(x.dtype)


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm without affine parameters over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x * (1 + scale) + shift`` per image.

    Computed in the dtype of ``scale``, at least float32, and cast back: ``x [B, N, C]``, ``shift`` and
    ``scale [B, C]``.
    """
    return (x.to(scale.dtype) * (1 + scale[:, None]) + shift[:, None]).to(x.dtype)


def gated(y: Tensor, gate: Tensor) -> Tensor:
    """``gate * y`` per image, computed in the dtype of ``gate``, at least float32, and cast to that of ``y``."""
    return (gate[:, None] * y.to(gate.dtype)).to(y.dtype)


class ConditioningMLP(nn.Module):
    """Embedding of a scalar: sinusoid, linear 256 -> C, SiLU, linear C -> C."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(SINUSOID_CHANNELS, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, value: Tensor) -> Tensor:
        """``[B] -> [B, C]``."""
        dtype = self.linear_1.weight.dtype
        features = sinusoid(value, at_least_fp32(dtype)).to(dtype)
        return self.linear_2(F.silu(self.linear_1(features)))


class ClassEmbedder(nn.Module):
    """Embedding table with one row per class; the null class is the last row."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        """``[B] integer -> [B, C]``."""
        return self.embedding_table(labels)


class PatchEmbedder(nn.Module):
    """The p x p convolution with stride p and bias, computed as the equivalent linear map of flattened patches."""

    def __init__(self, in_channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """``[B, c, h, w] -> [B, N, C]``."""
        patches = patchify(images, self.proj.kernel_size[0])
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    """Attention: RMSNorm of q and k over the full width, then heads, then 2-D RoPE (of q only in cross-attention)."""

    def __init__(self, width: int, context_width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(context_width, width, bias=bias)
        self.v_proj = nn.Linear(context_width, width, bias=bias)
        self.o_proj = nn.Linear(width, width, bias=bias)
        self.q_norm = RMSNorm(width)
        self.k_norm = RMSNorm(width)

    def forward(self, x: Tensor, context: Tensor | None, angles: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attention from ``x`` to itself or to a context.

        Args:
            x: ``[B, N, C]``.
            context: ``[B, L, E]``; None for self-attention.
            angles: ``[N, D / 2]``.
            bias: ``[B, 1, 1, L]``, added to the logits.

        Returns:
            ``[B, N, C]``.
        """
        source = x if context is None else context
        q = self.q_norm(self.q_proj(x)).unflatten(-1, (self.heads, -1))
        k = self.k_norm(self.k_proj(source)).unflatten(-1, (self.heads, -1))
        v = self.v_proj(source).unflatten(-1, (self.heads, -1))
        q = rotate(q, angles)
        if context is None:
            k = rotate(k, angles)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class AdaLayerNorm(nn.Module):
    """Linear map from the conditioning to a block's six modulation vectors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, conditioning: Tensor) -> tuple[Tensor, ...]:
        """``[B, C] ->`` shift1, scale1, gate1, shift2, scale2, gate2, each ``[B, C]`` in at least float32."""
        modulation = self.linear(F.silu(conditioning))
        return modulation.to(at_least_fp32(modulation.dtype)).chunk(6, dim=-1)


class MLP(nn.Module):
    """Linear C -> 4C, GELU (tanh form), linear 4C -> C."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C] -> [..., C]``."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class TransformerBlock(nn.Module):
    """Self-attention after a LayerNorm, cross-attention (in text models) and MLP after RMSNorms."""

    def __init__(self, width: int, heads: int, bias: bool, cross_attention_dim: int | None) -> None:
        super().__init__()
        self.norm1 = AdaLayerNorm(width)
        self.attn1 = Attention(width, width, heads, bias)
        if cross_attention_dim is not None:
            self.norm2 = RMSNorm(width)
            self.attn2 = Attention(width, cross_attention_dim, heads, bias)
        self.crosses = cross_attention_dim is not None
        self.norm3 = RMSNorm(width)
        self.mlp = MLP(width)

    def forward(
        self, x: Tensor, conditioning: Tensor, angles: Tensor, text: Tensor | None, text_bias: Tensor | None
    ) -> Tensor:
        """``x [B, N, C]``, ``conditioning [B, C]``, ``angles [N, D / 2]``, ``text [B, L, E]``."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.norm1(conditioning)
        x = x + gated(self.attn1(modulate(layer_norm(x), shift1, scale1), None, angles), gate1)
        if self.crosses:
            x = x + self.attn2(self.norm2(x), text, angles, text_bias)
        return x + gated(self.mlp(modulate(self.norm3(x), shift2, scale2)), gate2)


class PixelFlowTransformer(nn.Module):
    """The velocity field ``v(x, t, condition)`` of PixelFlow, with the published parameter names.

    Args:
        depth: number of blocks.
        num_attention_heads: H.
        attention_head_dim: D, a multiple of 4; the width is ``C = H * D``.
        in_channels, out_channels: image channels.
        patch_size: p.
        num_classes: number of classes without the null class; 0 for a model without a class table.
        attention_bias: whether the attention projections have a bias.
        cross_attention_dim: width of the text states; None for a model without cross-attention.
    """

    def __init__(
        self,
        *,
        depth: int,
        num_attention_heads: int,
        attention_head_dim: int,
        in_channels: int = 3,
        out_channels: int = 3,
        patch_size: int = 4,
        num_classes: int = 0,
        attention_bias: bool = True,
        cross_attention_dim: int | None = None,
    ) -> None:
        super().__init__()
        width = num_attention_heads * attention_head_dim
        self.patch_size = patch_size
        self.head_dim = attention_head_dim
        self.num_classes = num_classes
        self.patch_embed = PatchEmbedder(in_channels, width, patch_size)
        self.timestep_embedder = ConditioningMLP(width)
        self.latent_size_embedder = ConditioningMLP(width)
        if num_classes > 0:
            self.class_embedder = ClassEmbedder(num_classes, width)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, num_attention_heads, attention_bias, cross_attention_dim) for _ in range(depth)
        )
        self.proj_out_1 = nn.Linear(width, 2 * width)
        self.proj_out_2 = nn.Linear(width, patch_size * patch_size * out_channels)
        self.initialize()

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
        if self.num_classes > 0:
            nn.init.normal_(self.class_embedder.embedding_table.weight, std=0.02)
        modulations = [module.linear for module in self.modules() if isinstance(module, AdaLayerNorm)]
        for linear in [*modulations, self.proj_out_1, self.proj_out_2]:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def conditioning(self, t_model: Tensor, latent_size: Tensor, class_labels: Tensor | None) -> Tensor:
        """``c [B, C]``: the sum of the time, class and size embeddings."""
        c = self.timestep_embedder(t_model)
        if self.num_classes > 0:
            c = c + self.class_embedder(class_labels)
        return c + self.latent_size_embedder(latent_size)

    def forward(
        self,
        x: Tensor,
        t_model: Tensor,
        class_labels: Tensor | None = None,
        latent_size: Tensor | int | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Compute the velocity at ``x``.

        Args:
            x: images ``[B, c, h, w]`` in [-1, 1]; h and w are multiples of the patch size.
            t_model: ``[B]``, time on the 0..999 axis.
            class_labels: ``[B]`` integers; ``num_classes`` is the null class.
            latent_size: ``w // p``, one value or one per image; by default that of ``x``.
            encoder_hidden_states: text states ``[B, L, E]``.
            encoder_attention_mask: ``[B, L]``, 1 for tokens and 0 for padding.

        Returns:
            velocity ``[B, c, h, w]`` in the model's dtype.

        Source: arXiv 2504.07963, section 3.3.
        """
        batch, _, height, width = x.shape
        rows, columns = height // self.patch_size, width // self.patch_size
        dtype = self.proj_out_2.weight.dtype
        size = torch.as_tensor(columns if latent_size is None else latent_size, device=x.device).expand(batch)
        angles = rotary_angles(rows, columns, self.head_dim, x.device, at_least_fp32(dtype))
        text_bias = None
        if encoder_attention_mask is not None:
            text_bias = ((1 - encoder_attention_mask.to(dtype)) * PADDING_BIAS)[:, None, None, :]

        h = self.patch_embed(x.to(dtype))
        c = self.conditioning(t_model, size, class_labels)
        for block in self.transformer_blocks:
            h = block(h, c, angles, encoder_hidden_states, text_bias)
        out = self.proj_out_1(F.silu(c))
        shift, scale = out.to(at_least_fp32(dtype)).chunk(2, dim=-1)
        h = self.proj_out_2(modulate(layer_norm(h), shift, scale))
        return unpatchify(h, rows, columns, self.patch_size)
