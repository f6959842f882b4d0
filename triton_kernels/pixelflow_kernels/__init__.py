"""Packed-sequence building blocks of PixelFlow: layouts, and one folder per fused operation."""

from .packing import PackedLayout, Run

__all__ = ["PackedLayout", "Run"]
