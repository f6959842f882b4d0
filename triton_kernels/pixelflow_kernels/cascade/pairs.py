"""Kernel that makes the training pairs of all stages in one pass; each program reads one tile of one source image.

    end = e down(x, d) + (1 - e) eps      start = s up(down(x, d + 1)) + (1 - s) eps      (the same eps)
    token = tau end + (1 - tau) start     target = end - start

Source: arXiv 2504.07963, equations 3 to 5. A *cell* is a block of 2x2 pixels at the sample's own resolution: four sharp
values, one coarse value, and four normals that share a counter. It is computed from ``SIDE^2`` source pixels with
``SIDE = 2^(d + 1)``, so a tile of ``BLOCK`` source pixels holds ``BLOCK / SIDE^2`` cells. Samples of every stage take
the same number of programs, because each reads its whole image once.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixelflow_kernels.configs import arch_of, launch_config

from .normals import TRAINING, normals

# x / 127.5 for x in 0..255 as an exact product plus a small one, which gives all 256 correctly rounded quotients.
_HIGH: tl.constexpr = tl.constexpr(float.fromhex("0x1.01p-7"))
_LOW: tl.constexpr = tl.constexpr(float.fromhex("0x1.010102p-23"))


@triton.jit
def _signed(pixels):
    """Convert uint8 to float32 in [-1, 1]; return float32 unchanged."""
    if pixels.dtype == tl.uint8:
        pixels = pixels.to(tl.float32)
        pixels = (pixels * _HIGH + pixels * _LOW) - 1.0
    return pixels


@triton.jit
def _halve(x, CELLS: tl.constexpr, SIDE: tl.constexpr):
    """Average 2x2 blocks, ``[CELLS, SIDE, SIDE] -> [CELLS, SIDE / 2, SIDE / 2]``: columns first, then rows."""
    left, right = tl.split(tl.reshape(x, [CELLS, SIDE, SIDE // 2, 2]))
    x = tl.reshape(left * 0.5 + right * 0.5, [CELLS, SIDE // 2, 2, SIDE // 2])
    top, bottom = tl.split(tl.permute(x, [0, 1, 3, 2]))
    return top * 0.5 + bottom * 0.5


@triton.jit
def _sharp(
    image_ptr,
    stride_channel,
    stride_row,
    stride_column,
    channel,
    y,
    x,
    inside,
    CELLS: tl.constexpr,
    HALVINGS: tl.constexpr,
):
    """Return the four sharp values of each cell in row-major order: means over the quarters of its source block."""
    SIDE: tl.constexpr = 2 << HALVINGS
    row = (y * SIDE)[:, None, None] + tl.arange(0, SIDE)[None, :, None]
    column = (x * SIDE)[:, None, None] + tl.arange(0, SIDE)[None, None, :]
    place = channel.to(tl.int64)[:, None, None] * stride_channel
    place = place + row.to(tl.int64) * stride_row + column.to(tl.int64) * stride_column
    pixels = _signed(tl.load(image_ptr + place, mask=inside[:, None, None], other=0))
    for i in tl.static_range(HALVINGS):
        pixels = _halve(pixels, CELLS, SIDE >> i)
    left, right = tl.split(pixels)
    left_top, left_bottom = tl.split(left)
    right_top, right_bottom = tl.split(right)
    return left_top, right_top, left_bottom, right_bottom


@triton.jit
def _store_pair(
    tokens_ptr, targets_ptr, noise_ptr, place, inside, sharp, coarse, eps,
    start, start_rest, end, end_rest, tau, tau_rest,
):  # fmt: skip
    """Interpolate and store; ``eps`` is used only if ``noise_ptr`` is None."""
    if noise_ptr is not None:
        eps = tl.load(noise_ptr + place, mask=inside, other=0.0)
    end_pixel = end * sharp + end_rest * eps
    start_pixel = start * coarse + start_rest * eps
    token = tau * end_pixel + tau_rest * start_pixel
    tl.store(tokens_ptr + place, token.to(tokens_ptr.dtype.element_ty), mask=inside)
    tl.store(targets_ptr + place, end_pixel - start_pixel, mask=inside)


@triton.jit
def _place(channel, y, x, columns, CHANNELS: tl.constexpr, PATCH: tl.constexpr):
    """Offset of a pixel within its sample's tokens, which are patches in (channel, row, column) order."""
    token = y // PATCH * (columns // PATCH) + x // PATCH
    return ((token * CHANNELS + channel) * PATCH + y % PATCH) * PATCH + x % PATCH


@triton.jit
def _rest(v):
    """Compute ``1 - v`` in the dtype of ``v``, then convert to float32."""
    return (1.0 - v).to(tl.float32)


@triton.jit
def _pair_tile(
    images_ptr, index_ptr, flip_ptr, spans_ptr, tau_ptr, seeds_ptr, noise_ptr, tokens_ptr, targets_ptr,
    stride_image, stride_channel, stride_row, stride_column, num_images, height, width, sample, tile, first, length,
    HALVINGS: tl.constexpr, STAGE: tl.constexpr, CHANNELS: tl.constexpr, PATCH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Process one tile of a sample whose image is halved HALVINGS times."""
    CELLS: tl.constexpr = BLOCK >> 2 * (HALVINGS + 1)
    HALF: tl.constexpr = PATCH // 2
    WIDE: tl.constexpr = CHANNELS * PATCH * PATCH
    rows, columns = height >> (HALVINGS + 1), width >> (HALVINGS + 1)
    cell = tile * CELLS + tl.arange(0, CELLS)
    inside = cell < CHANNELS * rows * columns
    if PATCH % 2 == 0:
        # Cells in the order of the pack: their upper pairs of pixels then form contiguous runs of PATCH, as do the
        # lower ones.
        channel = cell // HALF // HALF % CHANNELS
        token = cell // HALF // HALF // CHANNELS
        y = token // (columns // HALF) * HALF + cell // HALF % HALF
        x = token % (columns // HALF) * HALF + cell % HALF
    else:
        channel, y, x = cell // columns // rows, cell // columns % rows, cell % columns

    index = tl.load(index_ptr + sample)
    known = (index >= 0) & (index < num_images)
    source_x = x
    if flip_ptr is not None:
        flip = tl.load(flip_ptr + sample)
        source_x = tl.where(flip, columns - 1 - x, x)
    s00, s01, s10, s11 = _sharp(
        images_ptr + index * stride_image, stride_channel, stride_row, stride_column, channel, y, source_x,
        inside & known, CELLS, HALVINGS,
    )  # fmt: skip
    # An invalid image index cannot raise an error without synchronising with the device, so NaN makes it noticeable.
    s00 = tl.where(known, s00, float("nan"))
    # Mirroring does not change this mean.
    coarse = (s00 * 0.5 + s01 * 0.5) * 0.5 + (s10 * 0.5 + s11 * 0.5) * 0.5
    if flip_ptr is not None:
        s00, s01 = tl.where(flip, s01, s00), tl.where(flip, s00, s01)
        s10, s11 = tl.where(flip, s11, s10), tl.where(flip, s10, s11)
    if noise_ptr is None:
        seed = tl.load(seeds_ptr + sample)
        z00, z01, z10, z11 = normals((channel * rows + y) * columns + x, STAGE, TRAINING, seed)
    else:
        z00, z01, z10, z11 = coarse, coarse, coarse, coarse

    start, end = tl.load(spans_ptr + 2 * STAGE), tl.load(spans_ptr + 2 * STAGE + 1)
    tau = tl.load(tau_ptr + sample)
    start_rest, end_rest, tau_rest = _rest(start), _rest(end), _rest(tau)
    start, end, tau = start.to(tl.float32), end.to(tl.float32), tau.to(tl.float32)
    tokens_ptr += first.to(tl.int64) * WIDE
    targets_ptr += first.to(tl.int64) * WIDE
    if noise_ptr is not None:
        noise_ptr += first.to(tl.int64) * WIDE
    if PATCH % 2 == 0:
        coarse = tl.interleave(coarse, coarse)
        pixel = tile * (2 * CELLS) + tl.arange(0, 2 * CELLS)
        inside = pixel < length * (WIDE // 2)
        place = pixel + pixel // PATCH * PATCH
        _store_pair(
            tokens_ptr, targets_ptr, noise_ptr, place, inside, tl.interleave(s00, s01), coarse,
            tl.interleave(z00, z01), start, start_rest, end, end_rest, tau, tau_rest,
        )  # fmt: skip
        _store_pair(
            tokens_ptr, targets_ptr, noise_ptr, place + PATCH, inside, tl.interleave(s10, s11), coarse,
            tl.interleave(z10, z11), start, start_rest, end, end_rest, tau, tau_rest,
        )  # fmt: skip
    else:
        sharp, eps = (s00, s01, s10, s11), (z00, z01, z10, z11)
        for k in tl.static_range(4):
            place = _place(channel, 2 * y + k // 2, 2 * x + k % 2, 2 * columns, CHANNELS, PATCH)
            _store_pair(
                tokens_ptr, targets_ptr, noise_ptr, place, inside, sharp[k], coarse, eps[k],
                start, start_rest, end, end_rest, tau, tau_rest,
            )  # fmt: skip


@triton.jit
def _pair_kernel(
    images_ptr,
    index_ptr,
    flip_ptr,
    cu_seqlens_ptr,
    spans_ptr,
    tau_ptr,
    seeds_ptr,
    noise_ptr,
    tokens_ptr,
    targets_ptr,
    stride_image,
    stride_channel,
    stride_row,
    stride_column,
    num_images,
    height,
    width,
    tiles,
    STAGES: tl.constexpr,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per sample and tile; ``flip_ptr`` may be None, and one of ``seeds_ptr`` and ``noise_ptr`` is None."""
    sample, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    first = tl.load(cu_seqlens_ptr + sample)
    length = tl.load(cu_seqlens_ptr + sample + 1) - first
    # Every halving divides the number of tokens by four.
    full = (height // PATCH) * (width // PATCH)
    halvings = 0
    for k in tl.static_range(1, STAGES):
        halvings += tl.where(full >> 2 * k >= length, 1, 0)
    for k in tl.static_range(STAGES):
        if halvings == k:
            _pair_tile(
                images_ptr, index_ptr, flip_ptr, spans_ptr, tau_ptr, seeds_ptr, noise_ptr, tokens_ptr, targets_ptr,
                stride_image, stride_channel, stride_row, stride_column, num_images, height, width, sample, tile,
                first, length, k, STAGES - 1 - k, CHANNELS, PATCH, BLOCK,
            )  # fmt: skip


def launch_pairs(
    images: Tensor,
    index: Tensor,
    flip: Tensor | None,
    cu_seqlens: Tensor,
    spans: Tensor,
    tau: Tensor,
    seeds: Tensor | None,
    noise: Tensor | None,
    tokens: Tensor,
    targets: Tensor,
    patch_size: int,
    config: Mapping[str, int] | None = None,
) -> None:
    """Fill ``tokens`` and ``targets [T, c * p * p]``; all tensors except ``images`` are contiguous."""
    _, channels, height, width = images.shape
    if tokens.numel() == 0:
        return
    config = dict(config or launch_config("cascade.pairs", "all", arch_of(images.device)))
    stages = spans.shape[0]
    config["BLOCK"] = max(config["BLOCK"], 4**stages)  # a tile holds at least one cell of the smallest stage
    tiles = triton.cdiv(channels * height * width, config["BLOCK"])
    with torch.cuda.device_of(images):
        _pair_kernel[(index.shape[0] * tiles,)](
            images_ptr=images,
            index_ptr=index,
            flip_ptr=flip,
            cu_seqlens_ptr=cu_seqlens,
            spans_ptr=spans,
            tau_ptr=tau,
            seeds_ptr=seeds,
            noise_ptr=noise,
            tokens_ptr=tokens,
            targets_ptr=targets,
            stride_image=images.stride(0),
            stride_channel=images.stride(1),
            stride_row=images.stride(2),
            stride_column=images.stride(3),
            num_images=images.shape[0],
            height=height,
            width=width,
            tiles=tiles,
            STAGES=stages,
            CHANNELS=channels,
            PATCH=patch_size,
            enable_fp_fusion=False,  # level A: every product and sum rounds separately, as in eager PyTorch
            **config,
        )
