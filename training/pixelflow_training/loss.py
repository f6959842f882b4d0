"""The flow-matching loss of a pack. Source: arXiv 2504.07963, equation 7."""

from __future__ import annotations

import torch
from torch import Tensor

from pixelflow_kernels import PackedLayout


def image_losses(velocities: Tensor, targets: Tensor, layout: PackedLayout) -> Tensor:
    """Mean squared error of each image over its tokens and channels: ``[T, P]``, ``[T, P] -> [n]``."""
    squares = (velocities - targets).square()
    means = [squares[run.tokens].reshape(run.count, -1).mean(-1) for run in layout.runs]
    return torch.cat(means)


def flow_matching_loss(velocities: Tensor, targets: Tensor, layout: PackedLayout) -> Tensor:
    """The mean over images of each image's mean squared error: a small image weighs as much as a large one."""
    return image_losses(velocities, targets, layout).mean()
