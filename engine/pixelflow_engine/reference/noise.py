"""The block-correlated noise added between two stages: its distribution, and the published code's way of drawing it.

Within each 2x2 block of pixels the covariance is ``(1 - g) I + g 1 1^T + 1e-6 I`` with ``g = -1/3``; blocks and
channels are independent. Source: arXiv 2504.07963, equation 6.
"""

from typing import Protocol

import torch
from torch import Tensor

from .schedule import GAMMA

BLOCK_JITTER = 1e-6


class NoiseSource(Protocol):
    """A sampler's source of noise.

    ``initial`` is called for the first stage and ``block`` for each later one, in order.
    """

    def initial(self, shape: tuple[int, int, int, int]) -> Tensor:
        """Independent standard normals ``[B, c, h, w]`` float32 for the first stage."""

    def block(self, stage: int, shape: tuple[int, int, int, int]) -> Tensor:
        """Block-correlated normals ``[B, c, h, w]`` float32 for entering ``stage``."""


def block_covariance() -> Tensor:
    """Covariance ``[4, 4]`` of a block, pixels in row-major order."""
    return torch.eye(4) * (1 - GAMMA) + torch.ones(4, 4) * GAMMA + BLOCK_JITTER * torch.eye(4)


def to_blocks(images: Tensor) -> Tensor:
    """``[B, c, h, w] -> [B, c, h/2, w/2, 4]``: each 2x2 block's pixels in row-major order."""
    batch, channels, height, width = images.shape
    grid = images.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return grid.permute(0, 1, 2, 4, 3, 5).flatten(-2)


def from_blocks(blocks: Tensor) -> Tensor:
    """``[B, c, h/2, w/2, 4] -> [B, c, h, w]``, the inverse of :func:`to_blocks`."""
    batch, channels, rows, columns, _ = blocks.shape
    grid = blocks.reshape(batch, channels, rows, columns, 2, 2).permute(0, 1, 2, 4, 3, 5)
    return grid.reshape(batch, channels, 2 * rows, 2 * columns)


def correlate(z: Tensor) -> Tensor:
    """Transform independent normals ``[B, c, h, w]`` to the block covariance.

    The mean of a block and the deviations from it are the eigenspaces of the covariance, so
    ``sqrt(1 - g + 1e-6) (z - mean z) + sqrt(1 + 3g + 1e-6) mean z`` has the right distribution. The four values are
    summed in pairs.
    """
    deviation_scale = (1 - GAMMA + BLOCK_JITTER) ** 0.5
    mean_scale = (1 + 3 * GAMMA + BLOCK_JITTER) ** 0.5
    blocks = to_blocks(z)
    z0, z1, z2, z3 = blocks.unbind(-1)
    mean = (((z0 + z1) + (z2 + z3)) * 0.25)[..., None]
    return from_blocks(deviation_scale * (blocks - mean) + mean_scale * mean)


class PublicNoise:
    """The published code's draws, one block at a time, from torch's global CPU generator; slow ground truth."""

    def initial(self, shape: tuple[int, int, int, int]) -> Tensor:
        """All values in one draw."""
        return torch.randn(shape)

    def block(self, stage: int, shape: tuple[int, int, int, int]) -> Tensor:
        """One draw of four per block, in (image, channel, block row, block column) order."""
        batch, channels, height, width = shape
        law = torch.distributions.MultivariateNormal(torch.zeros(4), block_covariance())
        draws = [law.sample() for _ in range(batch * channels * (height // 2) * (width // 2))]
        return from_blocks(torch.stack(draws).reshape(batch, channels, height // 2, width // 2, 4))
