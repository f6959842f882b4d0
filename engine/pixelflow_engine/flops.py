"""Floating-point operations of the model, from shapes, and what devices could do at most.

A multiplication and an addition are two operations. Counted are matrix products and attention, which are all but a
thousandth. Of what blocks compute a second time to save memory, nothing is counted; of attention's backward pass the
scores are, as they are where FlashAttention's speed is told, because no implementation that one would use keeps them.
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
"""FLOP/s of dense bfloat16 products with float32 sums, by the makers' data sheets; by the whole name that CUDA gives a
device, among which parts of one (MIG) are not."""


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations of a forward pass.

    Attributes:
        products: of matrix products, but for the first ones.
        first_products: of patches and of sinusoids, whose inputs need no gradient.
        attention: of queries with keys and of weights with values.
    """

    products: int
    first_products: int
    attention: int

    @property
    def forward(self) -> int:
        """Of a forward pass."""
        return self.products + self.first_products + self.attention

    @property
    def training(self) -> int:
        """Of forward and backward.

        A product has two products backward, for its input's gradient and its weight's; one where the input needs
        none. Attention has two products forward and five backward, one of them the scores again: 2.5 times as many.
        """
        return 3 * self.products + 2 * self.first_products + 7 * self.attention // 2


def count(model: ModelConfig, lengths: Sequence[int]) -> Flops:
    """Count the operations of a pack.

    Args:
        model: one without text.
        lengths: tokens of each image.

    Raises:
        ValueError: the model takes text, whose length is not known here.
    """
    if model.cross_attention_dim is not None:
        raise ValueError(f"model.cross_attention_dim: got {model.cross_attention_dim}, expected a model without text")
    C, tokens, images = model.width, sum(lengths), len(lengths)
    per_image = 2 * 2 * C * C + 12 * C * C * model.depth + 4 * C * C  # embeddings of two scalars, modulations
    return Flops(
        products=tokens * token_products(model) + images * per_image,
        first_products=tokens * patch_products(model) + images * 2 * 2 * SINUSOID_CHANNELS * C,
        attention=4 * C * model.depth * sum(length**2 for length in lengths),
    )


def token_products(model: ModelConfig) -> int:
    """Of a token's products in the blocks and the head."""
    C = model.width
    return 24 * C * C * model.depth + 2 * C * model.patch_size**2 * model.out_channels


def patch_products(model: ModelConfig) -> int:
    """Of a token's embedding."""
    return 2 * model.width * model.patch_size**2 * model.in_channels


def peak_flops(device_name: str) -> float | None:
    """The most FLOP/s of a device in bfloat16, by its name; None where it is not known."""
    return next((peak for pattern, peak in PEAKS.items() if re.fullmatch(pattern, device_name)), None)
