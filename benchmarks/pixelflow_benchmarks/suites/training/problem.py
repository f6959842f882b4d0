"""A training step as a problem to run, its least cost, and the interface of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pixelflow_engine import PixelFlowConfig, flops
from pixelflow_engine.config import parameter_shapes
from pixelflow_training.collate import Batch
from pixelflow_training.config import TrainConfig
from pixelflow_training.data import ImageSet
from pixelflow_training.loop import training_batch

from .phases import Phases

REFERENCE = "reference"
"""The variant that the others are compared with."""

PROBE = "proj_out_2.weight"
"""The parameter that :meth:`TrainingRun.probe` copies."""

SEED = 0
FIXED_STEP = 0
"""The step on whose batch losses and gradients are compared."""
IMAGES = 256
"""Images in the data set; four batches if these are more."""

POINTWISE_FORWARD, POINTWISE_BACKWARD = 12, 18
"""Values that a block's three fused passes move per token and channel.

Forward: q and k in and out; residual and branch in, residual and norm out, twice. Backward: two gradients and q and k
in, two gradients out; two gradients, residual and branch in, two gradients out, twice. Rows per image are negligible.
"""
OPTIMIZER_VALUES = 10
"""Float32 values moved per parameter: its gradient for the norm; gradient, weight, both moments and average in; the
last four out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingProblem:
    """A training step to run.

    Attributes:
        config: configuration of the model.
        batch: number of images of a step, equally many at each stage.
        dtype: type of the matrix products; weights and the optimizer's state are float32.
        device: device to run on.

    Raises:
        ValueError: the batch is not a multiple of the number of stages, so that steps would differ in their work.
    """

    config: PixelFlowConfig
    batch: int
    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        stages = self.config.scheduler.num_stages
        if self.batch < 1 or self.batch % stages:
            raise ValueError(f"batch: got {self.batch}, expected a multiple of {stages}, the model's number of stages")

    @property
    def case(self) -> str:
        """Name of the problem in records."""
        return f"batch {self.batch}"

    @property
    def recipe(self) -> TrainConfig:
        """The recipe, with the published settings, which are the defaults."""
        config = self.config
        return TrainConfig(
            model=config.model,
            scheduler=config.scheduler,
            resolution=config.resolution,
            batch_size=self.batch,
            seed=SEED,
        )

    @property
    def lengths(self) -> list[int]:
        """Tokens of each image of a batch, the largest first."""
        stages, p = self.config.scheduler.num_stages, self.config.model.patch_size
        sides = [(self.config.resolution >> halvings) // p for halvings in range(stages)]
        return [side * side for side in sides for _ in range(self.batch // stages)]

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return sum(self.lengths)

    @property
    def parameters(self) -> int:
        """Number of the model's parameters."""
        return sum(torch.Size(shape).numel() for shape in parameter_shapes(self.config.model).values())

    @property
    def forward_flops(self) -> int:
        """Floating-point operations of a forward pass; see :mod:`pixelflow_engine.flops`."""
        return flops.count(self.config.model, self.lengths).forward

    @property
    def flops(self) -> int:
        """Floating-point operations of a forward and a backward pass."""
        return flops.count(self.config.model, self.lengths).training

    @property
    def bytes_moved(self) -> int:
        """Bytes that a step moves outside of products and attention.

        These are fused passes of the blocks, and one optimizer pass over weights, gradients and state.
        """
        model = self.config.model
        values = (POINTWISE_FORWARD + POINTWISE_BACKWARD) * self.tokens * model.width * model.depth
        return self.dtype.itemsize * values + 4 * OPTIMIZER_VALUES * self.parameters

    def images(self) -> ImageSet:
        """Make random images and their labels on the CPU, in place of decoded ones."""
        config, generator = self.config, torch.Generator().manual_seed(SEED)
        count = max(IMAGES, 4 * self.batch)
        shape = (count, config.model.in_channels, config.resolution, config.resolution)
        pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        return ImageSet(pixels, torch.arange(count) * 7 % max(config.model.num_classes, 1))

    def positions(self, step: int) -> Tensor:
        """Return the positions of a step's images in training, ``[batch]``: how many samples come before each."""
        return torch.arange(step * self.batch, (step + 1) * self.batch)

    def fixed_batch(self) -> Batch:
        """Return the batch on which losses and gradients are compared, on the CPU."""
        return training_batch(self.recipe, self.images(), FIXED_STEP)

    @property
    def casts(self) -> bool:
        """Whether autocast runs products in a narrower type than that of the weights."""
        return self.dtype == torch.bfloat16

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Enable autocast to bfloat16 if that is the problem's type."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.casts):
            yield


@dataclass(frozen=True, eq=False, slots=True)
class Gradients:
    """Results of a forward and a backward pass, before clipping.

    Attributes:
        losses: loss of each image, ``[n]``, on the CPU.
        by_name: gradient of their mean for each parameter, by its published name, on the CPU.
    """

    losses: Tensor
    by_name: dict[str, Tensor]

    @property
    def norm(self) -> float:
        """Euclidean norm of all gradients together."""
        return sum(g.double().square().sum().item() for g in self.by_name.values()) ** 0.5


@dataclass(frozen=True, slots=True)
class Stepped:
    """What a step reports, read from the device.

    Attributes:
        loss: mean loss over the images.
        norm: norm of the gradients before clipping.
    """

    loss: float
    norm: float


class TrainingRun(Protocol):
    """A variant that is ready to train: it has a model with the initial weights, images and settings."""

    def draw(self) -> Batch:
        """Make a batch as the variant's steps do, and return it on the CPU in the form that is checked."""
        ...

    def gradients(self, batch: Batch) -> Gradients:
        """Compute losses and gradients of a given batch at the current weights, which do not change."""
        ...

    def step(self, phases: Phases) -> None:
        """Run a whole step, from images to averaged weights; on a GPU this may return before the work is done."""
        ...

    def last(self) -> Stepped:
        """Wait for the last step and return what it reports."""
        ...

    def probe(self) -> tuple[Tensor, Tensor]:
        """Return copies of one parameter and of its average, on the CPU."""
        ...

    def peak_bytes(self) -> int | None:
        """Return the peak memory of a step, weights and optimizer state included; None if unknown, as on a CPU."""
        ...

    def close(self) -> None:
        """Release the run's resources."""
        ...
