"""Numbers of the cascade that its meaning and its kernels share."""

from __future__ import annotations

import math

GAMMA = -1.0 / 3.0
"""Correlation of the noise inside a 2x2 block, over its variance before renoising (arXiv 2504.07963, equation 6)."""

BLOCK_JITTER = 1e-6
"""Added to the variance inside a block, whose covariance would be singular without it."""

DEVIATION_SCALE = math.sqrt(1 - GAMMA + BLOCK_JITTER)
MEAN_SCALE = math.sqrt(1 + 3 * GAMMA + BLOCK_JITTER)
"""Square roots of the block covariance's two eigenvalues: of deviations from a block's mean, and of the mean."""

MAX_STAGES = 6
"""Deepest cascade of which training pairs are made: a source block of ``4^6`` pixels is the largest one tile."""
