"""Norms of a transformer block fused with per-image modulation and the preceding gated residual, in one pass each."""

from .op import (
    add_gated_layer_norm_modulate,
    add_gated_rms_norm,
    add_gated_rms_norm_modulate,
    add_rms_norm_modulate,
    layer_norm_modulate,
)

__all__ = [
    "add_gated_layer_norm_modulate",
    "add_gated_rms_norm",
    "add_gated_rms_norm_modulate",
    "add_rms_norm_modulate",
    "layer_norm_modulate",
]
