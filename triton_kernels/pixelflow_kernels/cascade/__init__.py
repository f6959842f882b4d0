"""Noise on entering a stage of the cascade, and the pairs that it is trained on."""

from .op import initial_normals, training_pairs, upsample_draw_renoise, upsample_renoise

__all__ = ["initial_normals", "training_pairs", "upsample_draw_renoise", "upsample_renoise"]
