"""Gradient norm, clipping, AdamW, moving average and rounded copies for a whole model in four launches."""

from .op import adamw_ema_, gradient_norm
from .optimizer import FusedAdamW
from .table import TensorTable

__all__ = ["FusedAdamW", "TensorTable", "adamw_ema_", "gradient_norm"]
