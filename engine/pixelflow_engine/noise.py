"""Sources of a sampler's noise: counter-based normals, or the published code's CPU random stream.

Counter-based noise. A value depends only on the image's seed, the stage and the position, never on the batch, and has
the same bits on every device (see ``pixelflow_kernels.philox``).

Block-correlated noise. Within each 2x2 block of pixels the covariance is ``(1 - g) I + g 1 1^T + 1e-6 I``, g = -1/3
(arXiv 2504.07963, equation 6).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pixelflow_kernels.cascade import upsample_draw_renoise
from pixelflow_kernels.cascade.law import BLOCK_JITTER, GAMMA
from pixelflow_kernels.cascade.reference import (
    block_normals,
    correlate,
    from_blocks,
    initial_normals,
    upsample_renoise,
)
from pixelflow_kernels.philox import seed_tensor
from pixelflow_kernels.registration import interpreting
from pixelflow_kernels.transfers import uploaded

from .schedule import Stage

__all__ = [
    "MAX_SEED",
    "CounterNoise",
    "NoiseSource",
    "PublicNoise",
    "Shape",
    "upsample_renoise",
]

Shape = tuple[int, int, int, int]

MAX_SEED = 2**64 - 1


class NoiseSource(Protocol):
    """Noise for a sampler, which calls it for the first stage and on entering each later stage, in order."""

    def initial(self, shape: Shape) -> Tensor:
        """Independent standard normals ``[B, c, h, w]`` float32."""
        ...

    def block(self, stage: int, shape: Shape) -> Tensor:
        """Block-correlated normals ``[B, c, h, w]`` float32, h and w even."""
        ...

    def enter(self, x: Tensor, stage: Stage) -> Tensor:
        """Enter a stage: ``alpha upsample(x) + beta n``, with twice the height and width of ``x [B, c, h, w]``."""
        ...


@dataclass(frozen=True, slots=True)
class CounterNoise:
    """Noise of each image from its own seed.

    Attributes:
        seeds: one per image, 0 to 2^64 - 1.
        device: the device on which the noise is drawn.
    """

    seeds: tuple[int, ...]
    device: torch.device

    def initial(self, shape: Shape) -> Tensor:
        """Normals of stage 0; four neighbors in row-major order share a counter."""
        return initial_normals(self._seeds(), shape[1:])

    def block(self, stage: int, shape: Shape) -> Tensor:
        """Normals of a later stage; the four pixels of a block share a counter."""
        return from_blocks(correlate(block_normals(self._seeds(), stage, shape[1:])))

    def enter(self, x: Tensor, stage: Stage) -> Tensor:
        """Uses the same values as :meth:`block`, generated inside the kernel that adds them."""
        if x.device.type == "cpu" and not interpreting():
            # The CPU implementation of the operation, called directly: the first call of any custom operation imports
            # torch's compiler.
            batch, channels, height, width = x.shape
            noise = self.block(stage.index, (batch, channels, 2 * height, 2 * width))
            return upsample_renoise(x.contiguous(), noise, stage.alpha, stage.beta)
        return upsample_draw_renoise(x, self._seeds(), stage=stage.index, alpha=stage.alpha, beta=stage.beta)

    def _seeds(self) -> Tensor:
        return uploaded(seed_tensor(self.seeds), self.device)


@dataclass(frozen=True, slots=True)
class PublicNoise:
    """The published code's draws, bit for bit, without its loop over blocks.

    Attributes:
        generator: a CPU generator; None for torch's global one.
        device: the device that needs the noise; it is drawn on the CPU.
    """

    generator: torch.Generator | None
    device: torch.device

    def initial(self, shape: Shape) -> Tensor:
        """All values in one draw."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float32, device="cpu").to(self.device)

    def block(self, stage: int, shape: Shape) -> Tensor:
        """Draws of four in (image, channel, block row, block column) order, each multiplied by the Cholesky factor.

        torch fills a tensor of fewer than 16 values one value at a time, and a longer contiguous one in vectors, with
        other values. A longer strided tensor is again filled one at a time, so a single strided draw equals many small
        ones.
        """
        batch, channels, height, width = shape
        blocks = (batch, channels, height // 2, width // 2, 4)
        count = math.prod(blocks)
        z = (
            torch.empty(2 * count, dtype=torch.float32, device="cpu")[::2]
            .normal_(generator=self.generator)
            .reshape(-1, 4)
        )
        return from_blocks(_block_product()(_block_factor(), z).reshape(blocks)).to(self.device)

    def enter(self, x: Tensor, stage: Stage) -> Tensor:
        """Uses the noise of :meth:`block`."""
        batch, channels, height, width = x.shape
        noise = self.block(stage.index, (batch, channels, 2 * height, 2 * width))
        return upsample_renoise(x, noise, stage.alpha, stage.beta)


_ROWS = 256


def _block_factor() -> Tensor:
    """The Cholesky factor of a block's covariance, ``[4, 4]`` float32."""
    identity, ones = (make(4, 4, dtype=torch.float32, device="cpu") for make in (torch.eye, torch.ones))
    return torch.linalg.cholesky(identity * (1 - GAMMA) + ones * GAMMA + BLOCK_JITTER * identity)


def _one_by_one(factor: Tensor, z: Tensor) -> Tensor:
    """Multiply each row of ``z [n, 4]`` by a factor ``[4, 4]`` separately, as the published loop does."""
    return torch.stack([torch.matmul(factor, four[:, None])[:, 0] for four in z])


@functools.cache
def _block_product() -> Callable[[Tensor, Tensor], Tensor]:
    """A function that equals :func:`_one_by_one` in every bit on this processor.

    Whether the library fuses multiply-adds in the product of a single block depends on the processor, and products of
    many blocks do not always round the same way. So both ways of multiplying many blocks are tested on a few.
    """
    seeded = torch.Generator("cpu").manual_seed(0)
    factor = _block_factor()
    z = torch.randn(3 * _ROWS - 7, 4, generator=seeded, dtype=torch.float32, device="cpu")
    want = _one_by_one(factor, z)
    return next((product for product in (_apart, _in_rows) if torch.equal(product(factor, z), want)), _one_by_one)


def _apart(factor: Tensor, z: Tensor) -> Tensor:
    """A batched product, one per block."""
    return torch.matmul(factor, z[..., None])[..., 0]


def _in_rows(factor: Tensor, z: Tensor) -> Tensor:
    """Products of a fixed number of blocks each; for other sizes the library may choose another routine."""
    parts = F.pad(z, (0, 0, 0, -len(z) % _ROWS)).split(_ROWS)
    return torch.cat([part @ factor.T for part in parts])[: len(z)]
