"""Reference implementation in plain PyTorch: noise for entering a stage, and training pairs.

Source: arXiv 2504.07963, equations 3 to 6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pixelflow_kernels.philox import SAMPLING, TRAINING, counter_normals, normals_at

from .law import DEVIATION_SCALE, MEAN_SCALE

Shape = tuple[int, int, int]
Draw = Callable[[Tensor, Tensor, Tensor, int], Tensor]

# --- noise -------------------------------------------------------------------------------------------------


def initial_normals(seeds: Tensor, shape: Shape) -> Tensor:
    """Draw the normals of stage 0, ``[n, c, h, w]``: four neighbours in row-major order share a counter."""
    count = math.prod(shape)
    z = counter_normals(seeds, stage=0, count=-(-count // 4))
    return z.flatten(1)[:, :count].reshape(len(seeds), *shape).contiguous()


def block_normals(seeds: Tensor, stage: int, shape: Shape, purpose: int = SAMPLING) -> Tensor:
    """Draw independent normals ``[n, c, h/2, w/2, 4]``: the four pixels of a 2x2 block share a counter."""
    blocks = (shape[0], shape[1] // 2, shape[2] // 2)
    return counter_normals(seeds, stage, math.prod(blocks), purpose).reshape(len(seeds), *blocks, 4)


def training_normals(parts: Sequence[tuple[Tensor, int, Shape]], draw: Draw) -> list[Tensor]:
    """Draw :func:`block_normals` with the training purpose for several ``(seeds, stage, shape)`` in one call."""
    blocks = [(c, height // 2, width // 2) for _, _, (c, height, width) in parts]
    counts = [math.prod(shape) for shape in blocks]
    device = parts[0][0].device
    seeds = torch.cat([seeds.repeat_interleave(count) for (seeds, *_), count in zip(parts, counts, strict=True)])
    positions, stages = [], []
    for (of_part, stage, _), count in zip(parts, counts, strict=True):
        positions.append(torch.arange(count, device=device).repeat(len(of_part)))
        stages.append(torch.full_like(positions[-1], stage))
    drawn = draw(seeds, torch.cat(positions), torch.cat(stages), TRAINING).split([len(p) for p in positions])
    return [z.reshape(-1, *shape, 4) for z, shape in zip(drawn, blocks, strict=True)]


def correlate(z: Tensor) -> Tensor:
    """Give blocks of independent normals ``[..., 4]`` the block covariance ``(1 - g) I + g 1 1^T + 1e-6 I``.

    Computes ``sqrt(1 - g + 1e-6) (z - mean z) + sqrt(1 + 3g + 1e-6) mean z``, since the block mean and the deviations
    from it span the eigenspaces of the covariance. The four values are summed in pairs.
    """
    z0, z1, z2, z3 = z.unbind(-1)
    mean = (((z0 + z1) + (z2 + z3)) * 0.25)[..., None]
    return DEVIATION_SCALE * (z - mean) + MEAN_SCALE * mean


def from_blocks(blocks: Tensor) -> Tensor:
    """Rearrange ``[B, c, h/2, w/2, 4] -> [B, c, h, w]``; the four pixels of a block are in row-major order."""
    batch, channels, rows, columns, _ = blocks.shape
    grid = blocks.reshape(batch, channels, rows, columns, 2, 2).permute(0, 1, 2, 4, 3, 5)
    return grid.reshape(batch, channels, 2 * rows, 2 * columns)


def upsample_renoise(x: Tensor, noise: Tensor, alpha: float, beta: float) -> Tensor:
    """Compute ``alpha * upsample(x) + beta * noise`` in x's dtype for ``x [B, c, h, w]``, ``noise [B, c, 2h, 2w]``."""
    return (alpha * F.interpolate(x, scale_factor=2, mode="nearest") + beta * noise.to(x)).contiguous()


# --- training pairs ----------------------------------------------------------------------------------------


def signed(images: Tensor) -> Tensor:
    """Convert uint8 to float32 in [-1, 1] by ``x / 127.5 - 1``; return float32 unchanged."""
    if images.dtype != torch.uint8:
        return images
    # Divide by a tensor: for a Python number, torch on CUDA multiplies by the reciprocal, which rounds twice.
    return images.float() / torch.full((1,), 127.5, dtype=torch.float32, device=images.device) - 1


def halve(x: Tensor) -> Tensor:
    """Average 2x2 blocks of ``[..., h, w]``: neighbouring columns first, then rows.

    This is bilinear downsampling without antialiasing, with the roundings of torch's CUDA kernel. It is written out
    because on a CPU the order in which torch adds the four values depends on sizes and channels.
    """
    x = x[..., 0::2] * 0.5 + x[..., 1::2] * 0.5
    return x[..., 0::2, :] * 0.5 + x[..., 1::2, :] * 0.5


def up(x: Tensor) -> Tensor:
    """Upsample ``[..., h, w]`` by a factor of 2, nearest neighbour."""
    return x.repeat_interleave(2, -2).repeat_interleave(2, -1)


def patchify(images: Tensor, p: int) -> Tensor:
    """Rearrange ``[n, c, h, w] -> [n * N, c * p * p]``: row-major patches, each in (channel, row, column) order."""
    n, channels, height, width = images.shape
    grid = images.reshape(n, channels, height // p, p, width // p, p)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels * p * p)


def unpatchify(tokens: Tensor, shape: Shape, p: int) -> Tensor:
    """Rearrange ``[n * N, c * p * p] -> [n, c, h, w]``, the inverse of :func:`patchify`."""
    channels, height, width = shape
    grid = tokens.reshape(-1, height // p, width // p, channels, p, p)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, *shape)


def rest(v: Tensor) -> Tensor:
    """Compute ``1 - v`` in the dtype of ``v``, then convert to float32."""
    return (1 - v).float()


def pair(images: Tensor, halvings: int, span: Tensor, tau: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Compute inputs and targets ``[n, c, h, w]`` of one stage.

    ``images`` is ``[n, c, 2^d h, 2^d w]`` with ``d = halvings``; ``span`` holds the stage's start and end.
    """
    sharp = images
    for _ in range(halvings):
        sharp = halve(sharp)
    start, end = span
    high = end.float() * sharp + rest(end) * eps
    low = start.float() * up(halve(sharp)) + rest(start) * eps
    tau = tau[:, None, None, None]
    return tau.float() * high + rest(tau) * low, high - low


def training_pairs(
    images: Tensor,
    index: Tensor,
    flip: Tensor | None,
    cu_seqlens: Tensor,
    spans: Tensor,
    tau: Tensor,
    seeds: Tensor | None,
    noise: Tensor | None,
    patch_size: int,
    draw: Draw = normals_at,
) -> tuple[Tensor, Tensor]:
    """Compute packed inputs and targets ``[T, c * p * p]`` float32 of all samples (see ``op.training_pairs``).

    ``draw`` is ``normals_at``, compiled or not.
    """
    p, (_, channels, height, width) = patch_size, images.shape
    tokens = torch.empty(int(cu_seqlens[-1]), channels * p * p, dtype=torch.float32, device=images.device)
    targets = torch.empty_like(tokens)
    # Samples of one stage are processed together: those with 1 / 4^d of the full number of tokens.
    lengths, whole = cu_seqlens.diff(), (height // p) * (width // p)
    members = {d: (lengths == whole >> 2 * d).nonzero().flatten() for d in range(len(spans))}
    members = {d: chosen for d, chosen in members.items() if len(chosen) > 0}
    shapes = {d: (channels, height >> d, width >> d) for d in members}
    normals = {}
    if seeds is not None and members:
        parts = [(seeds[chosen], len(spans) - 1 - d, shapes[d]) for d, chosen in members.items()]
        normals = dict(zip(members, training_normals(parts, draw), strict=True))
    for d, chosen in members.items():
        rows = (cu_seqlens[chosen, None] + torch.arange(whole >> 2 * d, device=images.device)).flatten()
        image = signed(images[index[chosen]])
        if flip is not None:
            image = torch.where(flip[chosen, None, None, None], image.flip(-1), image)
        eps = from_blocks(normals[d]) if noise is None else unpatchify(noise[rows], shapes[d], p)
        pairs = pair(image, d, spans[len(spans) - 1 - d], tau[chosen], eps)
        tokens[rows], targets[rows] = (patchify(x, p) for x in pairs)
    return tokens, targets
