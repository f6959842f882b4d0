"""From images to a packed multi-resolution batch of training pairs. Source: arXiv 2504.07963, equations 3 to 5."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pixelflow_engine.config import PixelFlowConfig
from pixelflow_engine.layers import patchify
from pixelflow_engine.schedule import make_stages
from pixelflow_kernels import PackedLayout


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """A pack of noisy images and the velocities that the model should find there.

    Attributes:
        tokens, targets: ``[T, c * p * p]``, patches in (channel, row, column) order, full resolution first.
        layout: who the tokens belong to.
        t_model: ``[n]`` float32.
        labels: ``[n]``, dropped ones replaced by the null class; None for a model without classes.
        latent_size: ``[n]``, width in tokens.
        stage: ``[n]``, the stage of each image.
    """

    tokens: Tensor
    targets: Tensor
    layout: PackedLayout
    t_model: Tensor
    labels: Tensor | None
    latent_size: Tensor
    stage: Tensor


def spread_stages(count: int, num_stages: int, generator: torch.Generator) -> Tensor:
    """A stage per image, counts differing by at most one, in random order: ``[count]``."""
    which = torch.randperm(num_stages, generator=generator)
    stages = which[torch.arange(count) % num_stages]
    return stages[torch.randperm(count, generator=generator)]


def make_batch(
    images: Tensor, labels: Tensor, config: PixelFlowConfig, label_drop: float, generator: torch.Generator
) -> Batch:
    """Draw stages, times, noise and label drops, and pack.

    Args:
        images: ``[n, c, R, R]`` float32 in [-1, 1].
        labels: ``[n]`` int64.
        config: the model's.
        label_drop: probability of the null class.
        generator: of all draws.
    """
    stages = make_stages(config.scheduler)
    K = config.scheduler.num_train_timesteps
    assigned = spread_stages(len(images), len(stages), generator)
    k = torch.randint(0, K, (len(images),), generator=generator)
    dropped = torch.rand(len(images), generator=generator) < label_drop
    labels = torch.where(dropped, config.model.num_classes, labels)

    pyramid = [images]  # pyramid[d]: halved d times
    for _ in stages:
        pyramid.append(F.interpolate(pyramid[-1], scale_factor=0.5, mode="bilinear", align_corners=False))

    p = config.model.patch_size
    tokens, targets, grids, members, t_model = [], [], [], [], []
    for stage in reversed(stages):
        chosen = (assigned == stage.index).nonzero().flatten()
        halvings = len(stages) - 1 - stage.index
        sharp = pyramid[halvings][chosen]
        coarse = F.interpolate(pyramid[halvings + 1][chosen], scale_factor=2, mode="nearest")
        eps = torch.randn(sharp.shape, generator=generator)
        end = stage.end * sharp + (1 - stage.end) * eps
        start = stage.start * coarse + (1 - stage.start) * eps
        tau = torch.from_numpy(stage.local_times(config.scheduler))[k[chosen]].float()[:, None, None, None]
        tokens.append(patchify(tau * end + (1 - tau) * start, p))
        targets.append(patchify(end - start, p))
        grids += [(sharp.shape[2] // p, sharp.shape[3] // p)] * len(chosen)
        members.append(chosen)
        t_model.append(torch.from_numpy(stage.model_times(config.scheduler))[k[chosen]].float())
    order = torch.cat(members)
    return Batch(
        tokens=torch.cat(tokens),
        targets=torch.cat(targets),
        layout=PackedLayout.from_grids(grids),
        t_model=torch.cat(t_model),
        labels=labels[order] if config.model.num_classes > 0 else None,
        latent_size=torch.tensor([columns for _, columns in grids]),
        stage=assigned[order],
    )
