"""A forward and backward pass of the model, run only to measure its memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pixelflow_engine import PixelFlowConfig
from pixelflow_engine.fused import FusedOperations
from pixelflow_engine.model import PackedTransformer
from pixelflow_kernels import PackedLayout
from pixelflow_kernels.varlen_attention import backends as attention_backends
from pixelflow_training.collate import Batch
from pixelflow_training.config import TrainConfig
from pixelflow_training.data import ImageSet
from pixelflow_training.graphs import shapes_of_steps
from pixelflow_training.loop import training_batch
from pixelflow_training.loss import flow_matching_loss
from pixelflow_training.recompute import recompute
from pixelflow_training.step import batch_losses

from .live import LiveBytes


@dataclass(eq=False, slots=True)
class TrainingStep:
    """A model that requires gradients, and its batch.

    Attributes:
        model: the model, with plain PyTorch operations.
        batch: batch of noisy images.
        gradients: bytes of the gradients of the last :meth:`run`.
    """

    model: PackedTransformer
    batch: Batch
    gradients: int = 0

    def run(self) -> None:
        """Compute loss and gradients; these are released at the end, so that every run starts from the same state."""
        self._backward()
        self.gradients = sum(p.grad.untyped_storage().nbytes() for p in self.model.parameters() if p.grad is not None)
        self.model.zero_grad(set_to_none=True)

    def fault(self) -> str | None:
        """Run, and return what is wrong, or None."""
        loss = self._backward()
        if not bool(loss.isfinite()):
            return "the loss is not finite"
        for name, parameter in self.model.named_parameters():
            if parameter.grad is None or not bool(parameter.grad.isfinite().all()):
                return f"the gradient of {name} is not there, or not finite"
        self.model.zero_grad(set_to_none=True)
        return None

    def _backward(self) -> Tensor:
        batch = self.batch
        velocities = self.model(batch.tokens, batch.t_model, batch.layout, batch.latent_size, batch.labels)
        loss = flow_matching_loss(velocities.float(), batch.targets, batch.layout)
        loss.backward()
        return loss.detach()


def training_step(
    config: PixelFlowConfig, weights: Mapping[str, Tensor], images: int, dtype: torch.dtype, device: torch.device
) -> TrainingStep:
    """Make a step on random images, spread over the stages as in training.

    Args:
        config: configuration of the model.
        weights: weights of the model.
        images: number of images.
        dtype: type of weights and products.
        device: device to run on.
    """
    with torch.device("meta"):
        model = PackedTransformer(config.model)
    model.load_state_dict({name: w.to(device, dtype, copy=True) for name, w in weights.items()}, assign=True)
    model.requires_grad_(True)
    side = config.resolution
    pixels = torch.randint(0, 256, (images, config.model.in_channels, side, side), dtype=torch.uint8)
    data = ImageSet(pixels, torch.arange(images) % max(config.model.num_classes, 1))
    recipe = TrainConfig(
        model=config.model, scheduler=config.scheduler, resolution=config.resolution, batch_size=images
    )
    return TrainingStep(model, training_batch(recipe, data, step=0).to(device))


def count_recipe(recipe: TrainConfig) -> tuple[int, int]:
    """Count the bytes of a recipe's largest pack on the fused operations, on fake tensors and for a single process.

    Returns:
        The bytes that live all the time (float32 weights, moments and averages; if the recipe computes in another type,
        also the copy that computes and the float32 sum of gradients), and the peak of what the forward and backward
        pass of a pack adds to them.
    """
    grids = max(shapes_of_steps(recipe), key=lambda parts: sum(rows * columns for rows, columns in parts[0]))[0]
    dtype, tokens = getattr(torch, recipe.compute.dtype), sum(rows * columns for rows, columns in grids)
    # Fake CPU tensors, as autograd requires CUDA for tensors on a CUDA device; their sizes are those of any device.
    with FakeTensorMode(), mock.patch.object(attention_backends, "why_not", return_value=None):
        model = PackedTransformer(recipe.model, FusedOperations("triton"))
        for part in model.modules():
            for name, parameter in part.named_parameters(recurse=False):
                setattr(part, name, nn.Parameter(parameter.detach().to(dtype)))
        recompute(model, recipe.compute.recompute)
        channels = recipe.model.in_channels * recipe.model.patch_size**2
        pixels, targets = (torch.empty(tokens, channels) for _ in range(2))
        times, sizes, labels = (torch.empty(len(grids), dtype=t) for t in (torch.float32, torch.int64, torch.int64))
        batch = Batch(pixels, targets, PackedLayout.from_grids(grids), times, labels, sizes, stage=sizes)
        with LiveBytes("cpu") as live:
            batch_losses(model, batch).sum().backward()
        values = sum(parameter.numel() for parameter in model.parameters())
    copied = dtype != torch.float32
    return values * (4 * 4 + (dtype.itemsize + 4 if copied else 0)), live.peak
