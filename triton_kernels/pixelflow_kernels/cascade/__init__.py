"""Noise for entering a stage of the cascade, and the training pairs of its stages."""

from .op import initial_normals, training_pairs, upsample_draw_renoise, upsample_renoise

__all__ = ["initial_normals", "training_pairs", "upsample_draw_renoise", "upsample_renoise"]
