"""A stage of the cascade as a problem to run, and the interface of a run.

All variants have the same weights, the same initial state and the same labels, so that their states can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from pixelflow_engine import PixelFlowConfig, flops
from pixelflow_engine.guidance import stagewise_weights

REFERENCE = "reference"
"""The variant that the others are checked against."""

GUIDANCE = 2.4
ATTEMPTS = 4
"""Attempts of Dopri5 after which a run ends, wherever it is: with random weights it could need any number."""

StageSolver = Literal["euler", "dopri5"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageProblem:
    """A stage to run.

    Attributes:
        config: configuration of the model.
        stage: index of the stage in the cascade.
        batch: number of images; with guidance the model sees twice as many sequences.
        steps: Euler steps.
        solver: ``euler`` or ``dopri5``.
        dtype: type of the matrix products.
        device: device to run on.
    """

    config: PixelFlowConfig
    stage: int
    batch: int
    steps: int
    solver: StageSolver
    dtype: torch.dtype
    device: torch.device

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the state, ``[B, c, h, w]``."""
        side = self.config.resolution >> (self.config.scheduler.num_stages - 1 - self.stage)
        return self.batch, self.config.model.in_channels, side, side

    @property
    def tokens(self) -> int:
        """Tokens of one image."""
        return (self.shape[3] // self.config.model.patch_size) ** 2

    @property
    def weight(self) -> float:
        """Guidance weight of the stage; with 1 there is no null half."""
        return stagewise_weights(GUIDANCE, self.config.scheduler.num_stages)[self.stage]

    @property
    def sequences(self) -> int:
        """Sequences that the model sees, null halves included."""
        return self.batch if self.weight == 1 else 2 * self.batch

    @property
    def flops(self) -> int:
        """Floating-point operations of the products and attention of an evaluation; a multiply-add counts as two.

        They are those of a model without text. Products with a row per image instead of per token are left out: the
        embeddings of time and size, and the modulations made from them (of every block, and before the last product).
        """
        return self.product_flops + self.attention_flops

    @property
    def product_flops(self) -> int:
        """Floating-point operations of the blocks' products, the patch embedding and the head."""
        model = self.config.model
        return self.sequences * self.tokens * (flops.token_products(model) + flops.patch_products(model))

    @property
    def attention_flops(self) -> int:
        """Floating-point operations of the products of queries with keys and of attention weights with values."""
        return flops.count(self.config.model, [self.tokens] * self.sequences).attention

    @property
    def pointwise_bytes(self) -> int:
        """Bytes that the pointwise work of an evaluation moves.

        A block has three fused passes, which together read and write 12 values per token and channel. Left out are
        weights, rows per image, token positions, and everything outside of the blocks.
        """
        model = self.config.model
        return 12 * self.dtype.itemsize * self.sequences * self.tokens * model.width * model.depth

    def start(self) -> Tensor:
        """Draw the state at the start of the stage, ``[B, c, h, w]`` float32; the same on every call."""
        generator = torch.Generator(self.device).manual_seed(1000 * self.stage + self.batch)
        return torch.randn(self.shape, generator=generator, device=self.device)

    def labels(self) -> Tensor:
        """Return the class labels ``[B]``."""
        return torch.arange(self.batch, device=self.device) * 7 % self.config.model.num_classes


@dataclass(frozen=True, eq=False, slots=True)
class Ran:
    """The result of a run.

    Attributes:
        first: state after the first Euler step, if requested.
        end: state at the end of the run.
        steps: number of Euler steps, or of Dopri5's attempts.
        evaluations: number of evaluations of the model.
    """

    first: Tensor | None
    end: Tensor
    steps: int
    evaluations: int


@dataclass(frozen=True, eq=False, slots=True)
class Attempt:
    """The first attempt of Dopri5 for the last image of the batch.

    Attributes:
        state: state after the attempt, ``[1, c, h, w]``; the initial state if the engine rejected it.
        reached: local time tau after the attempt, which is the length of the step; 0 if the engine rejected it.
    """

    state: Tensor
    reached: float


class StageRun(Protocol):
    """A stage that is ready to be run, any number of times, from its initial state."""

    def run(self, keep_first: bool = False) -> Ran:
        """Run the stage; on a GPU this may return before the work is done."""
        ...

    def attempt(self) -> Attempt | None:
        """Make the first attempt of Dopri5 from the initial state; None if its length is not known."""
        ...

    def close(self) -> None:
        """Release the run's resources."""
        ...
