"""Where a sampler's randomness comes from: counter-based normals of ours, or the published code's CPU random stream.

Counter-based noise. Philox4x32-10 (Salmon et al., SC 2011) turns (key, counter) into four 32-bit words: the key is the
image's 64-bit seed, the counter is (position, stage, purpose, 0). Box and Muller's transform turns the words into four
normals. One number therefore depends on the image's seed, the stage and the position alone, never on the batch. The
logarithm, sine and cosine are polynomials of float32 products and sums, each rounded on its own, division and square
root are IEEE's: any device that rounds as IEEE 754 says, with multiply-add fusion off, draws the same bits.

Block-correlated noise. Inside each 2x2 block of pixels the covariance is ``(1 - g) I + g 1 1^T + 1e-6 I``, g = -1/3
(arXiv 2504.07963, equation 6).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .schedule import GAMMA

Shape = tuple[int, int, int, int]

SAMPLING = 0
"""The counter's purpose word for sampling; others are free for other uses of the same seeds."""

BLOCK_JITTER = 1e-6
MAX_SEED = 2**64 - 1
_MASK32 = 0xFFFFFFFF


class NoiseSource(Protocol):
    """Called by a sampler once for the first stage and once on entering each later one, in order."""

    def initial(self, shape: Shape) -> Tensor:
        """Independent standard normals ``[B, c, h, w]`` float32."""
        ...

    def block(self, stage: int, shape: Shape) -> Tensor:
        """Block-correlated normals ``[B, c, h, w]`` float32, h and w even."""
        ...


@dataclass(frozen=True, slots=True)
class CounterNoise:
    """Noise of each image from its own seed.

    Attributes:
        seeds: one per image, 0 to 2^64 - 1.
        device: where the noise is drawn.
    """

    seeds: tuple[int, ...]
    device: torch.device

    def initial(self, shape: Shape) -> Tensor:
        """Normals of stage 0: four neighbours in row-major order share a counter."""
        _, channels, height, width = shape
        count = channels * height * width
        z = counter_normals(self.seeds, stage=0, count=-(-count // 4), device=self.device)
        return z.flatten(1)[:, :count].reshape(shape)

    def block(self, stage: int, shape: Shape) -> Tensor:
        """Normals of a later stage: the four pixels of a block share a counter."""
        batch, channels, height, width = shape
        blocks = (batch, channels, height // 2, width // 2, 4)
        z = counter_normals(self.seeds, stage, math.prod(blocks[1:4]), self.device)
        return from_blocks(correlate(z.reshape(blocks)))


@dataclass(frozen=True, slots=True)
class PublicNoise:
    """The published code's draws, bit for bit, without its loop over blocks.

    Attributes:
        generator: a CPU generator; None for torch's global one.
        device: where the noise is needed; it is drawn on the CPU.
    """

    generator: torch.Generator | None
    device: torch.device

    def initial(self, shape: Shape) -> Tensor:
        """One draw of everything."""
        return torch.randn(shape, generator=self.generator).to(self.device)

    def block(self, stage: int, shape: Shape) -> Tensor:
        """Draws of four in (image, channel, block row, block column) order, each through the Cholesky factor.

        torch fills a tensor of fewer than 16 values one by one and a longer contiguous one in vectors, with other
        numbers; a longer strided one goes one by one again, so a single strided draw equals the many small ones.
        """
        batch, channels, height, width = shape
        blocks = (batch, channels, height // 2, width // 2, 4)
        count = math.prod(blocks)
        z = torch.empty(2 * count)[::2].normal_(generator=self.generator).reshape(blocks)
        identity, ones = torch.eye(4), torch.ones(4, 4)
        factor = torch.linalg.cholesky(identity * (1 - GAMMA) + ones * GAMMA + BLOCK_JITTER * identity)
        return from_blocks(torch.matmul(factor, z[..., None])[..., 0]).to(self.device)


def correlate(z: Tensor) -> Tensor:
    """Give blocks of independent normals ``[..., 4]`` the block covariance.

    ``sqrt(1 - g + 1e-6) (z - mean z) + sqrt(1 + 3g + 1e-6) mean z``: a block's mean and the deviations from it are the
    covariance's eigenspaces. The four are summed left to right.
    """
    z0, z1, z2, z3 = z.unbind(-1)
    mean = ((((z0 + z1) + z2) + z3) * 0.25)[..., None]
    return math.sqrt(1 - GAMMA + BLOCK_JITTER) * (z - mean) + math.sqrt(1 + 3 * GAMMA + BLOCK_JITTER) * mean


def from_blocks(blocks: Tensor) -> Tensor:
    """``[B, c, h/2, w/2, 4] -> [B, c, h, w]``, the four pixels of a block in row-major order."""
    batch, channels, rows, columns, _ = blocks.shape
    grid = blocks.reshape(batch, channels, rows, columns, 2, 2).permute(0, 1, 2, 4, 3, 5)
    return grid.reshape(batch, channels, 2 * rows, 2 * columns)


def upsample_renoise(x: Tensor, noise: Tensor, alpha: float, beta: float) -> Tensor:
    """``alpha * upsample(x) + beta * noise``: ``x [B, c, h, w]``, ``noise [B, c, 2h, 2w]``."""
    return alpha * F.interpolate(x, scale_factor=2, mode="nearest") + beta * noise.to(x)


def counter_normals(seeds: Sequence[int], stage: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Four standard normals per counter, the same bits everywhere.

    Args:
        seeds: one per image, 0 to 2^64 - 1.
        stage: the stage they are for.
        count: counters 0 to count - 1 of each image.
        device: where to draw.

    Returns:
        ``[len(seeds), count, 4]`` float32. No value exceeds 5.77 in magnitude: the uniforms have 24 bits.
    """
    low = torch.tensor([seed & _MASK32 for seed in seeds], dtype=torch.int64, device=device)[:, None]
    high = torch.tensor([seed >> 32 for seed in seeds], dtype=torch.int64, device=device)[:, None]
    position = torch.arange(count, dtype=torch.int64, device=device)[None]
    zero = torch.zeros_like(position)
    words = philox4x32((position, zero + stage, zero + SAMPLING, zero), (low, high))
    first = box_muller(words[0], words[1])
    second = box_muller(words[2], words[3])
    return torch.stack([*first, *second], dim=-1)


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor], rounds: int = 10) -> tuple[Tensor, ...]:
    """Philox4x32: four counter words and two key words to four random words, all 0..2^32 - 1 in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low words of a 32x32-bit product; the int64 product wraps, which keeps its bit pattern."""
    product = a * b
    return (product >> 32) & _MASK32, product & _MASK32


def box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent normals from two random words (int64, 0..2^32 - 1), float32.

    ``u = (2k + 1) / 2^24`` with 23 random bits is exact and never 0 or 1. The angle is a quarter turn from the word's
    top two bits plus an angle within +-pi/4 from the next 23; where the circle starts does not matter.
    """
    u = (2 * (radius_word >> 9) + 1).to(torch.float32) * 2.0**-24
    radius = torch.sqrt(-2.0 * _log(u))
    offset = (2 * ((angle_word >> 7) & 0x7FFFFF) + 1).to(torch.float32) * 2.0**-24 - 0.5
    sin, cos = _sin_cos(offset * (math.pi / 2))
    quarter = angle_word >> 30
    swapped = (quarter & 1) == 1
    x, y = torch.where(swapped, sin, cos), torch.where(swapped, cos, sin)
    x = torch.where((quarter == 1) | (quarter == 2), -x, x)
    y = torch.where(quarter >= 2, -y, y)
    return radius * x, radius * y


def _log(u: Tensor) -> Tensor:
    """Natural logarithm of float32 in (0, 1), within 2 ulp.

    ``u = 2^e m`` with sqrt(1/2) <= m < sqrt(2); ``log u = e ln 2 + 2 artanh((m - 1) / (m + 1))``.
    """
    bits = u.view(torch.int32)
    # Subtracting the bits of sqrt(1/2) moves the exponent's boundary from 1 to sqrt(1/2).
    exponent = (bits - 0x3F3504F3) >> 23
    m = (bits - (exponent << 23)).view(torch.float32)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    series = _horner(z, (1 / 11, 1 / 9, 1 / 7, 1 / 5, 1 / 3))
    logarithm = 2.0 * s + 2.0 * (s * (z * series))
    return exponent.to(torch.float32) * math.log(2) + logarithm


def _sin_cos(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine within +-pi/4 by their Taylor series, within 2 ulp."""
    z = x * x
    sin = x + x * (z * _horner(z, (1 / 362880, -1 / 5040, 1 / 120, -1 / 6)))
    cos = 1.0 + z * _horner(z, (-1 / 3628800, 1 / 40320, -1 / 720, 1 / 24, -1 / 2))
    return sin, cos


def _horner(z: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """A polynomial by Horner's rule, highest power first, product and sum rounded apart."""
    total = torch.full_like(z, coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * z + coefficient
    return total
