"""Constants of the cascade shared by its reference implementation and its kernels."""

from __future__ import annotations

import math

GAMMA = -1.0 / 3.0
"""Correlation of two pixels in a 2x2 block of noise, before ``BLOCK_JITTER`` (arXiv 2504.07963, equation 6)."""

BLOCK_JITTER = 1e-6
"""Added to the variances within a block, because its covariance matrix would be singular otherwise."""

DEVIATION_SCALE = math.sqrt(1 - GAMMA + BLOCK_JITTER)
MEAN_SCALE = math.sqrt(1 + 3 * GAMMA + BLOCK_JITTER)
"""Square roots of the block covariance's two eigenvalues: for deviations from the block mean, and for the mean."""

MAX_STAGES = 6
"""Maximum number of stages for training pairs: a source block of ``4^6`` pixels is the largest supported tile."""
