"""Floating-point operations of the model, from shapes, and peak rates of devices.

A multiplication and an addition count as two operations. Only matrix products and attention are counted, which is all
but about a thousandth. Recomputation of blocks to save memory is not counted. In attention's backward pass the
recomputed scores are counted, as in FlashAttention's published speeds, because no practical implementation stores them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .config import SINUSOID_CHANNELS, ModelConfig

PEAKS = {
    r"NVIDIA A100((?! MIG ).)*": 312e12,
    r"NVIDIA A10": 125e12,
    r"NVIDIA L4": 121e12,
    r"NVIDIA L40S": 362e12,
    r"NVIDIA H100 80GB HBM3": 989.4e12,
    r"NVIDIA H100 NVL": 835.5e12,
    r"NVIDIA H100 PCIe": 756e12,
    r"NVIDIA H200": 989.4e12,
    r"NVIDIA GH200((?! MIG ).)*": 989.4e12,
    r"NVIDIA B200": 2250e12,
    r"NVIDIA GeForce RTX 4090": 165.2e12,
}
"""Dense bfloat16 FLOP/s with float32 accumulation, from the vendors' data sheets. Keys are matched against the full
name that CUDA gives a device; partitions of a device (MIG) do not match."""


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations of a forward pass, by kind.

    Attributes:
        products: matrix products, except the first ones.
        first_products: products of patches and sinusoids, whose inputs need no gradient.
        attention: products of queries with keys and of attention weights with values.
    """

    products: int
    first_products: int
    attention: int

    @property
    def forward(self) -> int:
        """Operations of a forward pass."""
        return self.products + self.first_products + self.attention

    @property
    def training(self) -> int:
        """Operations of a forward and a backward pass.

        A product has two products in the backward pass, one for the gradient of its input and one for that of its
        weight; only one if the input needs no gradient. Attention has two products in the forward pass and five in the
        backward pass, one of which recomputes the scores: 2.5 times as many.
        """
        return 3 * self.products + 2 * self.first_products + 7 * self.attention // 2


def count(model: ModelConfig, lengths: Sequence[int]) -> Flops:
    """Count the operations of a forward pass over a pack.

    Args:
        model: a model without text.
        lengths: number of tokens of each image.

    Raises:
        ValueError: the model takes text, whose length is not known here.
    """
    if model.cross_attention_dim is not None:
        raise ValueError(f"model.cross_attention_dim: got {model.cross_attention_dim}, expected a model without text")
    C, tokens, images = model.width, sum(lengths), len(lengths)
    per_image = 2 * 2 * C * C + 12 * C * C * model.depth + 4 * C * C  # embeddings of two scalars; modulations
    return Flops(
        products=tokens * token_products(model) + images * per_image,
        first_products=tokens * patch_products(model) + images * 2 * 2 * SINUSOID_CHANNELS * C,
        attention=4 * C * model.depth * sum(length**2 for length in lengths),
    )


def token_products(model: ModelConfig) -> int:
    """Operations per token of the products in the blocks and the head."""
    C = model.width
    return 24 * C * C * model.depth + 2 * C * model.patch_size**2 * model.out_channels


def patch_products(model: ModelConfig) -> int:
    """Operations per token of the patch embedding."""
    return 2 * model.width * model.patch_size**2 * model.in_channels


def peak_flops(device_name: str) -> float | None:
    """Peak bfloat16 FLOP/s of a device by its name; None if unknown."""
    return next((peak for pattern, peak in PEAKS.items() if re.fullmatch(pattern, device_name)), None)
