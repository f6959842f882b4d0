"""Packed-sequence building blocks of PixelFlow: layouts now, one folder per fused operation as they arrive."""

from .packing import PackedLayout, Run

__all__ = ["PackedLayout", "Run"]
