"""A step of training as a problem to run, what it costs at least, and what a run of it is."""

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
"""The opponent that the others are compared with."""

PROBE = "proj_out_2.weight"
"""The parameter that a probe copies."""

SEED = 0
FIXED_STEP = 0
"""Whose batch all losses and gradients are compared on."""
IMAGES = 256
"""In the data set, at least four batches of them."""

POINTWISE_FORWARD, POINTWISE_BACKWARD = 12, 18
"""Values that a block's three fused passes move for each token and channel.

Forward: q and k in and out; residual and branch in, residual and norm out, twice. Backward: two gradients and q and k
in, two gradients out; two gradients, residual and branch in, two gradients out, twice. Rows per image are nothing
beside.
"""
OPTIMIZER_VALUES = 10
"""Of float32 for each parameter: its gradient for the norm; gradient, weight, both moments and average in; the last
four out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingProblem:
    """What is run.

    Attributes:
        config: of the model.
        batch: images of a step, equally many at each stage.
        dtype: of the matrix products; weights and the optimizer's state are float32.
        device: where.

    Raises:
        ValueError: the batch is not a multiple of the number of stages: its steps would differ in their work.
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
        """Its name."""
        return f"batch {self.batch}"

    @property
    def recipe(self) -> TrainConfig:
        """Settings: the published ones, which are the defaults."""
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
        """Of a batch."""
        return sum(self.lengths)

    @property
    def parameters(self) -> int:
        """Of the model."""
        return sum(torch.Size(shape).numel() for shape in parameter_shapes(self.config.model).values())

    @property
    def forward_flops(self) -> int:
        """Of a forward pass; see :mod:`pixelflow_engine.flops`."""
        return flops.count(self.config.model, self.lengths).forward

    @property
    def flops(self) -> int:
        """Of forward and backward."""
        return flops.count(self.config.model, self.lengths).training

    @property
    def bytes_moved(self) -> int:
        """What a step moves beside them: fused passes of the blocks, and one over the optimizer's state."""
        model = self.config.model
        values = (POINTWISE_FORWARD + POINTWISE_BACKWARD) * self.tokens * model.width * model.depth
        return self.dtype.itemsize * values + 4 * OPTIMIZER_VALUES * self.parameters

    def images(self) -> ImageSet:
        """Random images and their labels, on the CPU: what decoding would give."""
        config, generator = self.config, torch.Generator().manual_seed(SEED)
        count = max(IMAGES, 4 * self.batch)
        shape = (count, config.model.in_channels, config.resolution, config.resolution)
        pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        return ImageSet(pixels, torch.arange(count) * 7 % max(config.model.num_classes, 1))

    def positions(self, step: int) -> Tensor:
        """Samples consumed before each image of a step, ``[batch]``."""
        return torch.arange(step * self.batch, (step + 1) * self.batch)

    def fixed_batch(self) -> Batch:
        """The batch that all losses and gradients are compared on, on the CPU."""
        return training_batch(self.recipe, self.images(), FIXED_STEP)

    @property
    def casts(self) -> bool:
        """Whether products run in less than the weights' type, by automatic casts."""
        return self.dtype == torch.bfloat16

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Automatic casts to the problem's type; none where that is float32."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.casts):
            yield


@dataclass(frozen=True, eq=False, slots=True)
class Gradients:
    """What a forward and a backward pass gave, before clipping.

    Attributes:
        losses: of each image, ``[n]``, on the CPU.
        by_name: the gradient of the mean of them, for each parameter under its published name, on the CPU.
    """

    losses: Tensor
    by_name: dict[str, Tensor]

    @property
    def norm(self) -> float:
        """Of all gradients together."""
        return sum(g.double().square().sum().item() for g in self.by_name.values()) ** 0.5


@dataclass(frozen=True, slots=True)
class Stepped:
    """What a step reports, both read from the device.

    Attributes:
        loss: mean over images.
        norm: of the gradients, before clipping.
    """

    loss: float
    norm: float


class TrainingRun(Protocol):
    """Who trains: it has a model with the first weights, images and settings of its own accord."""

    def draw(self) -> Batch:
        """A batch as its steps make them, on the CPU, in the form that batches are checked in."""
        ...

    def gradients(self, batch: Batch) -> Gradients:
        """Losses and gradients of a given batch, at the weights as they are, which stay."""
        ...

    def step(self, phases: Phases) -> None:
        """A whole step, from images to averaged weights; on a GPU this may return before the work is done."""
        ...

    def last(self) -> Stepped:
        """What the last step reports; waits for it."""
        ...

    def probe(self) -> tuple[Tensor, Tensor]:
        """Copies of one parameter and of its average, on the CPU."""
        ...

    def peak_bytes(self) -> int | None:
        """The most memory that a step needs, weights and state included; None on a CPU."""
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...
