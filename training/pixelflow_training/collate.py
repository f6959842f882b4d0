"""Builds packed multi-resolution batches of training pairs from images. Source: arXiv 2504.07963, equations 3 to 5."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pixelflow_engine.config import PixelFlowConfig
from pixelflow_engine.schedule import make_stages
from pixelflow_kernels import PackedLayout
from pixelflow_kernels.cascade import training_pairs
from pixelflow_kernels.transfers import uploaded

from .data import SkippedImage
from .plan import Plan


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """A pack of noisy images with the velocities that the model is trained to predict.

    Attributes:
        tokens, targets: ``[T, c * p * p]`` float32, patches in (channel, row, column) order, full resolution first.
        layout: which tokens belong to which of the n images.
        t_model: ``[n]`` float32, the times that the model receives.
        labels: ``[n]``, dropped ones replaced by the null class; None for a model without classes.
        latent_size: ``[n]``, width in tokens.
        stage: ``[n]``, the stage of each image; always on the CPU, because no computation on the device uses it.
        skipped: images that could not be read and were replaced by others.
    """

    tokens: Tensor
    targets: Tensor
    layout: PackedLayout
    t_model: Tensor
    labels: Tensor | None
    latent_size: Tensor
    stage: Tensor
    skipped: tuple[SkippedImage, ...] = ()

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; the same object if it is there already."""
        if self.tokens.device == device:
            return self
        return Batch(
            tokens=self.tokens.to(device),
            targets=self.targets.to(device),
            layout=PackedLayout.from_grids(self.layout.grids, device),
            t_model=self.t_model.to(device),
            labels=None if self.labels is None else self.labels.to(device),
            latent_size=self.latent_size.to(device),
            stage=self.stage,
            skipped=self.skipped,
        )

    def clone(self) -> Batch:
        """Return a copy of the batch in memory of its own."""
        return Batch(
            tokens=self.tokens.clone(),
            targets=self.targets.clone(),
            layout=PackedLayout.from_grids(self.layout.grids, self.tokens.device),
            t_model=self.t_model.clone(),
            labels=None if self.labels is None else self.labels.clone(),
            latent_size=self.latent_size.clone(),
            stage=self.stage,
            skipped=self.skipped,
        )

    def parts(self, count: int) -> list[Batch]:
        """Split the batch into ``count`` packs, dealing out the images round-robin, as a step is dealt out to ranks."""
        return [self] if count == 1 else [self._part(index, count) for index in range(count)]

    def smallest(self) -> Batch:
        """Return a batch of one image: the last of the smallest ones."""
        lengths = [rows * columns for rows, columns in self.layout.grids]
        last = max(range(len(lengths)), key=lambda i: (-lengths[i], i))
        return self._part(last, len(lengths))

    def _part(self, index: int, count: int) -> Batch:
        ends = list(itertools.accumulate((rows * columns for rows, columns in self.layout.grids), initial=0))
        chosen = list(itertools.pairwise(ends))[index::count]
        tokens, targets = (torch.cat([x[at:end] for at, end in chosen]) for x in (self.tokens, self.targets))
        return Batch(
            tokens=tokens,
            targets=targets,
            layout=PackedLayout.from_grids(self.layout.grids[index::count], self.tokens.device),
            t_model=self.t_model[index::count],
            labels=None if self.labels is None else self.labels[index::count],
            latent_size=self.latent_size[index::count],
            stage=self.stage[index::count],
        )


def make_batch(images: Tensor, labels: Tensor, plan: Plan, config: PixelFlowConfig, *, compiled: bool = False) -> Batch:
    """Build the pack that a plan describes, on the device of the images; the host does not wait for it.

    Args:
        images: ``[n, c, H, W]`` uint8, or float32 in [-1, 1], in the order of the plan.
        labels: ``[n]`` int64, in the same order.
        plan: stages, times, label drops, flips and noise seeds.
        config: model and scheduler.
        compiled: whether a CPU draws noise by compiled code, with the same bits.

    Raises:
        ValueError: the number of images or labels differs from the plan's, or the image size does not suit the model.
    """
    for name, given in (("images", images), ("labels", labels)):
        if given.shape[0] != len(plan):
            raise ValueError(f"{name}: got {given.shape[0]}, expected {len(plan)}: one for each image of the plan")
    device, p = images.device, config.model.patch_size
    stages = make_stages(config.scheduler)
    tau = np.stack([stage.local_times(config.scheduler) for stage in stages])
    t_model = np.stack([stage.model_times(config.scheduler) for stage in stages])
    halvings = (len(stages) - 1 - plan.stage).tolist()
    grids = [((images.shape[2] >> d) // p, (images.shape[3] >> d) // p) for d in halvings]
    layout = PackedLayout.from_grids(grids, device)
    tokens, targets = training_pairs(
        images,
        layout,
        index=torch.arange(len(plan), device=device),
        spans=uploaded(torch.tensor([(stage.start, stage.end) for stage in stages], dtype=torch.float64), device),
        tau=uploaded(torch.from_numpy(tau)[plan.stage, plan.time], device),
        patch_size=p,
        seeds=uploaded(plan.noise_seed, device),
        flip=uploaded(plan.flip, device),
        compiled=compiled,
    )
    null = config.model.num_classes
    return Batch(
        tokens=tokens,
        targets=targets,
        layout=layout,
        t_model=uploaded(torch.from_numpy(t_model)[plan.stage, plan.time].float(), device),
        labels=labels.to(device).masked_fill(uploaded(plan.drop, device), null) if null > 0 else None,
        latent_size=uploaded(torch.tensor([columns for _, columns in grids]), device),
        stage=plan.stage,
    )
