"""Building blocks of PixelFlow on packed sequences: the packing layout, and one sub-package per fused operation."""

from .packing import PackedLayout, Run

__all__ = ["PackedLayout", "Run"]
