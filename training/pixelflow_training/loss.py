"""The flow-matching loss of a pack. Source: arXiv 2504.07963, equation 7."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pixelflow_kernels import PackedLayout


class _ImageLosses(torch.autograd.Function):
    """A segmented reduction whose gradient is a single product: ``2 (v - u) / (tokens * channels)`` for each image."""

    @staticmethod
    def forward(ctx: Any, velocities: Tensor, targets: Tensor, cu_seqlens: Tensor, image_index: Tensor) -> Tensor:
        difference = velocities - targets
        ctx.save_for_backward(difference, cu_seqlens, image_index)
        tokens = difference.square().mean(-1).double()
        # `unsafe` skips a check of the offsets that would synchronize with the GPU; a layout's offsets are valid.
        return torch.segment_reduce(tokens, "mean", offsets=cu_seqlens, unsafe=True).to(difference.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        difference, cu_seqlens, image_index = ctx.saved_tensors
        weight = 2 * gradient / (cu_seqlens.diff() * difference.shape[1])
        return difference * weight[image_index][:, None], None, None, None


def image_losses(velocities: Tensor, targets: Tensor, layout: PackedLayout) -> Tensor:
    """Mean squared error of each image over its tokens and channels: ``[T, P]``, ``[T, P] -> [n]``.

    There is no loop over images and no atomic sum, so results are reproducible bit for bit. An image's loss depends
    neither on its place in the pack nor on the other images: each token's mean is taken in the inputs' type, the mean
    over an image's tokens in float64. Targets get no gradient.
    """
    losses: Tensor = _ImageLosses.apply(velocities, targets, layout.cu_seqlens, layout.image_index)  # type: ignore[no-untyped-call]
    return losses


def flow_matching_loss(velocities: Tensor, targets: Tensor, layout: PackedLayout) -> Tensor:
    """Mean over images of each image's mean squared error: small and large images have the same weight."""
    return image_losses(velocities, targets, layout).mean()
